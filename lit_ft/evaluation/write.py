"""Writing a report: the page and its numbers, both or neither."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from lit_ft.errors import UserError
from lit_ft.evaluation.page import as_html, as_json
from lit_ft.evaluation.report import Report


def write_report(report: Report, folder: Path) -> Path:
    """Write `report.json` and `report.html` into `folder`, over those of before; returns the page's path.

    Raises:
        UserError: they cannot be written there; what was there before stays.
    """
    texts = {
        # Escaped to ASCII: a model's answer may hold half a surrogate pair, which no file can.
        "report.json": json.dumps(as_json(report), indent=2, allow_nan=False) + "\n",
        "report.html": as_html(report),
    }
    beside = {name: folder / f".{name}-{uuid.uuid4().hex[:8]}" for name in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            beside[name].write_text(text, encoding="utf-8")
        for name, path in beside.items():
            path.replace(folder / name)
    except OSError as error:
        raise UserError(
            f"The report cannot be written into {folder} ({error.strerror or error}): give another folder with output=."
        ) from error
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)
    return folder / "report.html"
