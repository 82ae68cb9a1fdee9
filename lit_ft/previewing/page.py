"""What the preview shows, as text for a terminal and as one HTML page: sections of lines, lines of pieces."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Style = Literal["", "changed", "trained", "faint"]
_COLOURS: dict[Style, str] = {"changed": "33", "trained": "1;32", "faint": "2"}
# What would move a terminal's cursor or turn its text around; line breaks and tabs may stay.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h2 { font-size: 1.1rem; margin: 1.6rem 0 0.4rem; }
pre { font: 13px/1.45 ui-monospace, monospace; margin: 0; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.trained { background: #bfe8c5; color: #123d1a; }
.changed { background: #ffe9a8; color: #4d3a00; }
.faint { opacity: 0.65; }
"""


class Piece(NamedTuple):
    """Text in one style; it may have line breaks."""

    text: str
    style: Style = ""


Line = list[Piece]


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    lines: Sequence[Line]


def plain(*texts: str) -> list[Line]:
    """Lines without any style."""
    return [[Piece(text)] for text in texts]


def columns(rows: Sequence[Sequence[str]]) -> list[Line]:
    """A table as lines: the first column to the left, the others to the right, the first row faint."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [cell.ljust(widths[0]) if k == 0 else cell.rjust(widths[k]) for k, cell in enumerate(row)]
        lines.append([Piece("  ".join(cells).rstrip(), "" if number else "faint")])
    return lines


def as_text(sections: Sequence[Section], *, colours: bool) -> str:
    """For a terminal (`colours`), or with ⟦ and ⟧ around what is trained."""
    parts = []
    for section in sections:
        title = f"\x1b[1m{section.title}\x1b[0m" if colours else section.title
        body = "\n".join("".join(_written(piece, colours) for piece in line) for line in section.lines)
        parts.append(title + "\n" + "\n".join(f"  {line}" for line in body.split("\n")))
    return "\n\n".join(parts) + "\n"


def _written(piece: Piece, colours: bool) -> str:
    text = visible(piece.text)
    if not colours:
        return f"⟦{text}⟧" if piece.style == "trained" else text
    if not piece.style:
        return text
    # Line by line, since each is indented afterwards.
    return "\n".join(f"\x1b[{_COLOURS[piece.style]}m{line}\x1b[0m" for line in text.split("\n"))


def visible(text: str) -> str:
    """`text` with its control characters spelled out: a row must not steer the terminal that shows it."""
    return _CONTROL.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def as_html(title: str, sections: Sequence[Section]) -> str:
    """One page that needs nothing else: no script, and its policy lets a browser fetch nothing."""
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        body = "\n".join("".join(_marked(piece) for piece in line) for line in section.lines)
        # A line break right after <pre> would be dropped.
        parts.append(f"<section>\n<h2>{html.escape(section.title)}</h2>\n<pre>\n{body}</pre>\n</section>")
    return "\n".join([*parts, "</body>\n</html>\n"])


def _marked(piece: Piece) -> str:
    text = html.escape(visible(piece.text))
    tag = "mark" if piece.style == "trained" else "span"
    return f'<{tag} class="{piece.style}">{text}</{tag}>' if piece.style else text
