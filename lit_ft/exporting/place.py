"""Where an export is written: beside its place, and renamed when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_ft.adapter import flush_all, system_reason
from lit_ft.errors import UserError


def check_free(output: Path) -> None:
    """Raise UserError if something stands at `output`."""
    if os.path.lexists(output):
        raise UserError(f"output={output} exists already, and nothing is overwritten. Choose another, or remove it.")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, which becomes `output` when the block ends; on any error nothing is left.

    Raises:
        UserError: something stands there already, the disk is full, or the folder cannot be written.
    """
    output = Path(os.path.abspath(output.expanduser()))  # noqa: PTH100 - a link in it is not followed
    check_free(output)
    made = [folder for folder in output.parents if not folder.exists()]
    staging = output.parent / f".{output.name}-{uuid.uuid4().hex[:12]}"
    done = False
    try:
        staging.mkdir(parents=True)
        yield staging
        flush_all(staging)
        check_free(output)  # rename would take the place of an empty folder
        staging.rename(output)
        done = True
    except UserError:
        raise
    except Exception as error:
        if (reason := system_reason(error)) is None:
            raise
        raise UserError(
            f"{output} could not be written: {reason}. Nothing was left there. Free some space or choose another place "
            "with output=FOLDER."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not done:
            for folder in made:  # the deepest comes first
                with contextlib.suppress(OSError):
                    folder.rmdir()


def copy(paths: list[Path], folder: Path) -> None:
    """Copy files into `folder` under their names."""
    for path in paths:
        shutil.copyfile(path, folder / path.name)
