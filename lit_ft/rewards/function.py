"""A person's Python function as a reward, called as TRL calls reward functions; whatever it does is checked."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_ft.errors import UserError
from lit_ft.rewards.base import Reward, Sample

# What is given beside the columns of the data, which cannot take its place; "prompt" and "completion" of a row are not
# what was asked and answered here.
_GIVEN = ("prompts", "completions", "completion_ids")
_WITHHELD = (*_GIVEN, "prompt", "completion")


class RewardFunction(Reward):
    """`function(prompts=[…], completions=[…], completion_ids=[…], **columns)`, which returns one number for each.

    Prompts and completions have the form of the data: strings, or lists of messages. Columns are those of the rows that
    the function's signature names, or all of them if it takes `**kwargs`; a row without a column gives None. Every
    argument is given by name, and only if the function takes it. The convention is that of TRL's GRPOTrainer.

    Args:
        path: `package.module:function`.

    Raises:
        UserError: there is no such function, or it cannot be called so.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        module_name, _, function_name = path.partition(":")
        module = _imported(path, module_name)
        try:
            function = getattr(module, function_name)
        except AttributeError:
            there = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"]
            names = f"Its functions are {', '.join(there)}." if there else "It has no functions."
            raise UserError(f"The reward {path}: {module.__file__} has no {function_name}. {names}") from None
        if not callable(function):
            raise UserError(f"The reward {path} is no function but {_a(function)}.")
        if inspect.iscoroutinefunction(function):
            raise UserError(f"The reward {path} is an async function: write `def` and not `async def`.")
        self._function: Callable[..., Any] = function
        self._files = _files(function, module)
        parameters = _parameters(function)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._names = [p.name for p in named]
        self._required = [p.name for p in named if p.default is p.empty]
        unnamed = any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters)
        if unnamed or not self._takes("completions"):
            raise UserError(
                f"The reward {path} takes ({', '.join(map(str, parameters))}), and is called with names: write "
                "def function(prompts, completions, **columns)."
            )

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        if not samples:
            return []
        arguments = self._arguments(samples)
        try:
            result = self._function(**arguments)
        except (Exception, SystemExit) as error:
            raise UserError(
                f"The reward function {self.name} raised {_first_line(error)} ({_where(error, self._files)}) for "
                f"{len(samples)} completions, the first {_beginning(samples[0])}."
            ) from error
        return self._checked(result, samples)

    def _arguments(self, samples: Sequence[Sample]) -> dict[str, Any]:
        given: dict[str, list[Any]] = {
            "prompts": [deepcopy(sample.prompt_text) for sample in samples],
            "completions": [_as_in_the_data(sample) for sample in samples],
            "completion_ids": [list(sample.completion) for sample in samples],
        }
        rows: list[Mapping[str, Any]] = [sample.row or {} for sample in samples]
        columns = list(dict.fromkeys(str(key) for row in rows for key in row if key not in _WITHHELD))
        # Copies: a function may change what it is given, and the data is there for every epoch.
        found = {key: deepcopy([row.get(key) for row in rows]) for key in columns if self._takes(key)}
        arguments = {key: value for key, value in given.items() if self._takes(key)} | found
        if missing := [name for name in self._required if name not in arguments]:
            raise UserError(
                f"The reward function {self.name} wants {', '.join(missing)}, and the rows of the data have "
                f"{', '.join(columns) or 'no other columns'}. Give such a column, or the argument a default."
            )
        return arguments

    def _takes(self, key: str) -> bool:
        return self._takes_all or key in self._names

    def _checked(self, result: Any, samples: Sequence[Sample]) -> list[float]:
        values = _as_list(result)
        if values is None:
            raise UserError(
                f"The reward function {self.name} returned {_a(result)}, and not a list of one number for each of the "
                f"{len(samples)} completions."
            )
        if len(values) != len(samples):
            raise UserError(
                f"The reward function {self.name} returned {len(values)} scores for {len(samples)} completions: it is "
                "to return one number for each."
            )
        scores = []
        for k, value in enumerate(values):
            score = _number(value)
            if score is None or not math.isfinite(score):
                what = f"{score}" if score is not None else "None" if value is None else f"{_a(value)} ({value!r:.40})"
                raise UserError(
                    f"The reward function {self.name} gives {what} for completion {k} of {len(samples)}, "
                    f"{_beginning(samples[k])}: it is to give a finite number."
                )
            scores.append(score)
        return scores


def _imported(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and (f"{name}.").startswith(f"{error.name}."):
            raise UserError(
                f"The reward {path}: there is no module {error.name} in {Path.cwd()}, nor is one installed. Start "
                "python -m lit_ft in the folder that holds it, or put that folder into PYTHONPATH."
            ) from error
        raise UserError(
            f"The reward {path}: importing {name} raised {_first_line(error)} ({_where(error)})."
        ) from error


def _files(function: Any, module: ModuleType) -> set[str]:
    """Where the code of `function` is, for saying where in it something went wrong."""
    code = inspect.unwrap(function)
    code = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
    files = {module.__file__ or ""}
    with contextlib.suppress(TypeError):  # written in C
        files.add(inspect.getfile(code))
    return files


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C, and silent about it
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]


def _as_in_the_data(sample: Sample) -> Any:
    """A completion as text, or as the conversation's next message."""
    if isinstance(sample.prompt_text, str):
        return sample.completion_text
    return [{"role": "assistant", "content": sample.completion_text}]


def _as_list(result: Any) -> list[Any] | None:
    """The items of what a function returned; None if it has no items in an order."""
    import numpy as np
    import torch

    if isinstance(result, (np.ndarray, torch.Tensor)):
        return list(result.tolist()) if result.ndim else None
    return list(result) if isinstance(result, Sequence) and not isinstance(result, (str, bytes)) else None


def _number(value: Any) -> float | None:
    """A real number, true and false included, or one item of numpy or torch; else None."""
    import numpy as np
    import torch

    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _a(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _beginning(sample: Sample) -> str:
    return repr(sample.completion_text[:60])


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where(error: BaseException, files: set[str] | None = None) -> str:
    """File and line that raised; with `files` the last of them in the traceback, if it passes there."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    own = [frame for frame in frames if files is not None and frame.filename in files]
    last = (own or frames)[-1]
    return f"{last.filename}, line {last.lineno}"
