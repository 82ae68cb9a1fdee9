"""What scores completions, and how a person says which of them are to: a judge, a Python function, or a sum of such."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import OmegaConf

from lit_ft.data.formats import Message
from lit_ft.errors import UserError

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_JUDGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}(@v[1-9][0-9]{0,8})?")
_FORMS = "NAME or NAME@vN of a judge, package.module:function, or a list of these or of {reward: …, weight: …}"


@dataclass(frozen=True)
class Sample:
    """A completion that is to be scored.

    Attributes:
        prompt: token ids.
        completion: token ids, with the token that ended it.
        ended: whether it came to its end, or was cut.
        prompt_text: as in the data: the messages of a conversation, or text.
        completion_text: without special tokens.
        row: of the data.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    ended: bool
    prompt_text: str | list[Message]
    completion_text: str
    row: Mapping[str, Any] | None


class Reward(ABC):
    """Scores completions; higher is better."""

    name: str

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """One finite score per sample.

        Raises:
            UserError: it gives none.
        """

    def parts(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        """What each of several rewards contributes to the scores, by its name; empty for one that has no parts."""
        return {}


@dataclass(frozen=True)
class RewardSpec:
    """One reward that was asked for: a judge's `NAME` or `NAME@vN`, or a function's `package.module:function`."""

    kind: Literal["judge", "function"]
    name: str
    weight: float = 1.0


def parse_rewards(setting: str, value: Any) -> list[RewardSpec]:
    """The rewards that `value` asks for, in its order.

    Args:
        setting: the name of the key that it was given for.
        value: a string, or a list of strings and of mappings with `reward` and perhaps `weight`; plain or OmegaConf's.

    Raises:
        UserError: it is anything else.
    """
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if value is None or value in ("", "???", [], ()):
        raise UserError(
            f"{setting}= says nothing to score completions with. Train a judge, python -m lit_ft +experiment=reward "
            f"name=judge, and give {setting}=judge; or give a Python function, {setting}=package.module:function."
        )
    entries = list(value) if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, Mapping):
        raise UserError(f"{setting}={value} is no list: put it into one, '{setting}=[{{reward: …, weight: …}}]'.")
    specs = [_spec(setting, entry) for entry in entries]
    names = [spec.name for spec in specs]
    if twice := next((name for k, name in enumerate(names) if name in names[:k]), None):
        raise UserError(f"{setting}: {twice} is given twice. Give it once, with the sum of the weights.")
    return specs


def _spec(setting: str, entry: Any) -> RewardSpec:
    if not isinstance(entry, Mapping):
        return _named(setting, entry, 1.0)
    if unknown := [key for key in entry if key not in ("reward", "weight")]:
        raise UserError(f"{setting}: {entry} has the unknown key {unknown[0]!r}; known are reward and weight.")
    if "reward" not in entry:
        raise UserError(f"{setting}: {entry} lacks the key reward, which says what is weighted.")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight == 0:
        raise UserError(
            f"{setting}: the weight {weight!r} of {entry['reward']} must be a finite number other than 0; a negative "
            "one makes a high score bad."
        )
    return _named(setting, entry["reward"], float(weight))


def _named(setting: str, name: Any, weight: float) -> RewardSpec:
    if isinstance(name, str) and _FUNCTION.fullmatch(name):
        return RewardSpec("function", name, weight)
    if isinstance(name, str) and _JUDGE.fullmatch(name):
        return RewardSpec("judge", name, weight)
    if isinstance(name, str) and re.search(r"\.py:|[/\\].*:", name):
        path, _, function = name.rpartition(":")
        module = re.sub(r"[/\\]+", ".", path.removesuffix(".py").lstrip("./\\"))
        raise UserError(
            f"{setting}={name} names a file. Name the module as an import would, {setting}={module}:{function}, and "
            "start from the folder that it is in."
        )
    raise UserError(f"{setting}={name!r} is no reward: give {_FORMS}.")
