"""The report's page and its JSON: the same numbers, any text made harmless, pictures that are well formed."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from lit_ft.evaluation.page import as_html, as_json, as_text
from lit_ft.evaluation.report import Report
from lit_ft.evaluation.section import Curve, Figure, Sample, Section, Table

VOID = {"meta", "br"}
FIELDS = ("before", "after", "change", "low", "high", "rows")


class Page(HTMLParser):
    """A page read back: the text of each `data-key`, all text, the tags, and whether they close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.keyed: dict[str, str] = {}
        self.texts: list[str] = []
        self.tags: list[str] = []
        self._open: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append((tag, key := dict(attrs).get("data-key")))
            if key is not None:
                assert key not in self.keyed
                self.keyed[key] = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "style":
            return
        self.texts.append(data)
        for _, key in self._open:
            if key is not None:
                self.keyed[key] += data

    @property
    def text(self) -> str:
        return "".join(self.texts)


def report(*sections: Section, adapter: str = "made@v1", against: str = "base") -> Report:
    return Report(adapter, "tiny-llama", against, "2026-03-01", sections, {"torch": "2.13.0"})


def section(**given: Any) -> Section:
    return Section(**{"key": "gain", "title": "Gain", "verdict": "better", "sentence": "It gained.", **given})


def figure(
    name: str, before: Any, after: Any, change: Any, low: Any, high: Any, *, unit: str = "", rows: Any = None
) -> Figure:
    return Figure(name, f"the {name}", unit, before, after, change, low, high, rows)


FULL = report(
    section(
        figures=(
            figure("loss", 2.40123456, 1.9887, -0.41253456, -0.4551, -0.3667, unit="nats per token", rows=1200),
            figure("exact", 12.5, 31.0, 18.5, 0.04, 25.96, unit="%", rows=200),
            figure("perplexity", 11.036, 7.31, -3.726, None, None),
        ),
        tables=(Table("By kind", ("kind", "share"), (("chat", "0.5"), ("code", "0.25"))),),
        samples=tuple(Sample(f"Question {k}?", f"Old {k}.", f"New {k}.", "Wanted." if k else None) for k in range(5)),
        notes=("Few rows.",),
    ),
    section(
        key="cost",
        verdict="unjudged",
        figures=(
            figure("parameters", None, 1843200, None, None, None),
            figure("tiny", 1e-9, 2.5e-9, 1.5e-9, -1e-12, 3e-9),
            figure("same", 0.0, 0.0, 0.0, 0.0, 0.0),
            figure("nearly", 1.0, 0.9999, -1e-4, -0.2, 0.2),
            figure("huge", 3e18, 4.5e18, 1.5e18, 1.25e18, 1.75e18),
            figure("broken", math.nan, math.inf, -math.inf, math.nan, math.nan),
        ),
    ),
    section(
        key="overfitting",
        verdict="unchanged",
        warnings=("1 of 4 held-out rows is a training row.",),
        notes=("Curves are of one run.",),
        curves=(Curve("Loss", "step", "nats", {"training": [(0, 2.0), (10, 1.0), (20, 0.5)], "held out": [(0, 2)]}),),
    ),
    section(key="bias", verdict="unknown", sentence="", error="pairs.csv lacks the column sent_less."),
)


def svgs(page: str) -> list[ElementTree.Element]:
    """Every picture, read as XML."""
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_and_the_json_agree() -> None:
    """Each number's text is its value in the JSON to half of the last digit shown; what is None is a dash."""
    keyed, sections = Page(as_html(FULL)).keyed, as_json(FULL)["sections"]
    expected = {f"{key}.verdict" for key in sections}
    for key, found in sections.items():
        assert keyed[f"{key}.verdict"] == found["verdict"]
        for name, numbers in found["figures"].items():
            for field in FIELDS:
                expected.add(f"{key}.{name}.{field}")
                text, value = keyed[f"{key}.{name}.{field}"], numbers[field]
                if value is None:
                    assert text == "–"
                    continue
                shown = Decimal(text.replace(",", ""))
                exponent = shown.as_tuple().exponent
                assert isinstance(exponent, int)
                assert abs(shown - Decimal(value)) <= Decimal(5).scaleb(exponent - 1)
                # And enough digits to see it, unless a neighbour is a hundred times larger.
                neighbours = [abs(numbers[f] or 0) for f in (FIELDS[:2] if field in FIELDS[:2] else FIELDS[2:5])]
                if field != "rows" and abs(value) > max(neighbours) / 100:
                    assert abs(float(shown) - value) <= 0.06 * abs(value)
    assert set(keyed) == expected


def test_how_numbers_are_written() -> None:
    keyed = Page(as_html(FULL)).keyed
    assert keyed["gain.loss.before"] == "2.401"
    assert keyed["gain.loss.change"] == "-0.413"
    assert keyed["gain.loss.rows"] == "1,200"
    assert keyed["gain.exact.change"] == "+18.5"
    assert keyed["gain.exact.low"] == "0.0"
    assert keyed["cost.parameters.after"] == "1,843,200"
    assert keyed["cost.same.change"] == "0"
    assert keyed["cost.nearly.change"] == "0.000"


def test_json_survives() -> None:
    """Strict JSON, numpy's numbers among them; what is not finite is null, wherever it stands."""
    points: Any = [(np.float32(0.5), np.float64("nan")), (1, math.inf)]
    curve = Curve("c", "x", "y", {"a": points})
    made = report(
        section(figures=(figure("loss", np.float32(0.5), np.nan, None, -np.inf, 2, rows=np.int64(3)),), curves=(curve,))
    )
    found = as_json(made)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    loss = found["sections"]["gain"]["figures"]["loss"]
    assert [loss[field] for field in FIELDS] == [0.5, None, None, None, 2.0, 3]
    assert found["sections"]["gain"]["curves"][0]["lines"] == {"a": [[0.5, None], [1.0, None]]}
    assert (found["adapter"], found["base"], found["against"]) == ("made@v1", "tiny-llama", "base")
    as_html(made)


HOSTILE = "</script></style></pre><script>alert(1)</script><img onerror=x>\" ' & <b>"
STEERING = "\x00\x1b[31m\u202e\ud800\ufffe\rend"


@pytest.mark.parametrize("text", [HOSTILE, STEERING, "", "\n\nfirst", "数 ó 🙂"])
def test_any_text_stays_text(text: str) -> None:
    """In every place that holds text."""
    made = Report(
        adapter=text,
        base=text,
        against=text,
        date=text,
        versions={text: text},
        sections=(
            Section(
                key="gain",
                title=text,
                verdict="unknown",
                sentence=text,
                figures=(Figure(text or "empty", text, text, 1.0, 2.0, 1.0, 0.5, 1.5, 3),),
                tables=(Table(text, (text, text), ((text, text),)),),
                curves=(Curve(text, text, text, {text: [(0, 1), (1, 2)]}),),
                samples=(Sample(text, text, text, text),),
                notes=(text,),
                warnings=(text,),
                error=text,
            ),
        ),
    )
    page = as_html(made)
    page.encode("utf-8")
    read = Page(page)
    assert not {"script", "img", "b"} & set(read.tags)
    assert not re.search("[\x00\x1b\u202e\ud800\ufffe\r]", page)
    if text == HOSTILE:
        # Title, h1, four facts, and every part of the section.
        assert read.text.count(text) >= 20
    if text == STEERING:
        assert "<U+0000><U+001B>[31m<U+202E><U+D800><U+FFFE><U+000D>end" in read.text
    assert len(svgs(page)) == 3
    assert json.loads(json.dumps(as_json(made))) == as_json(made)
    assert all(line.isprintable() for line in as_text(made))


def test_the_page_needs_nothing_else() -> None:
    page = as_html(FULL)
    assert not re.search(r"https?://|src=|url\(|@import|<script|<link|\son\w+=", page)
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page


def test_a_section_that_failed_leaves_the_others() -> None:
    read = Page(as_html(FULL))
    assert "This section could not be made: pairs.csv lacks the column sent_less." in read.text
    assert read.keyed["bias.verdict"] == "unknown"
    assert read.keyed["gain.verdict"] == "better"
    assert "It gained." in read.text
    # On top as well, where there is no sentence.
    assert read.text.count("pairs.csv lacks the column sent_less.") == 2


def test_a_section_that_was_made_in_part_shows_that_part() -> None:
    made = section(
        verdict="unknown", figures=(figure("loss", 2.0, 1.0, -1.0, -1.5, -0.5),), error="The metric m raised KeyError."
    )
    read = Page(as_html(report(made)))
    assert "Not all of this section could be made: The metric m raised KeyError." in read.text
    assert read.keyed["gain.loss.after"] == "1"


def test_warnings_stand_at_their_section_and_not_among_its_limits() -> None:
    page = as_html(FULL)
    start, warning = page.index('<section id="overfitting">'), page.index("1 of 4 held-out rows is a training row.")
    limits, end = page.index("What this does not say", start), page.index("</section>", start)
    assert start < warning < limits < end
    assert page.count("1 of 4 held-out rows is a training row.") == 1
    assert as_json(FULL)["sections"]["overfitting"]["warnings"] == ["1 of 4 held-out rows is a training row."]


def test_a_legend_explains_the_words() -> None:
    page = as_html(FULL)
    words = Page(page).text
    start, end = words.index("How to read this"), words.index("It gained.", words.index("How to read this"))
    legend = words[start:end]
    for word in (
        "better",
        "unchanged",
        "worse",
        "unjudged",
        "unknown",
        "95% interval",
        "nats",
        "KL",
        "Lower is better",
    ):
        assert word in legend, word
    for text in (legend, words[:start]):  # the whole, and the sentences before the click
        assert "too few rows to tell" in text and "ower is better" in text
    assert "Within the interval" in legend
    assert page.index("How to read this") < page.index("<section")


def test_cost_is_not_said_to_be_unchanged() -> None:
    read = Page(as_html(report(section(key="cost", title="Cost", verdict="unjudged", sentence="12 s."))))
    assert read.keyed["cost.verdict"] == "unjudged"
    assert "– unjudged" in read.text and "= unchanged" not in read.text


def test_what_a_section_shows() -> None:
    read = Page(as_html(FULL))
    for text in ("By kind", "chat", "0.25", "Few rows.", "Question 4?", "Old 4.", "New 4.", "Wanted.", "2 more"):
        assert text in read.text
    assert read.tags.count("article") == 5
    assert read.texts.count("wanted") == 4
    assert "torch 2.13.0" in read.text


def test_the_column_of_the_model_compared_with() -> None:
    made = section(figures=(figure("loss", 1.0, 2.0, 1.0, None, None),))
    assert "base" in Page(as_html(report(made))).texts
    other = Page(as_html(report(made, against="other@v2")))
    assert "before" in other.texts and "other@v2" in other.text


def test_intervals_around_zero() -> None:
    """A scale per unit; zero, low, change and high stand in the order and the proportion of their values."""
    made = section(
        figures=(
            figure("fell", 2, 1, -1.0, -1.5, -0.5, unit="nats"),
            figure("rose", 1, 2, 1.0, 0.5, 2.0, unit="nats"),
            figure("rate", 1, 2, 10.0, 5.0, 15.0, unit="%"),
            figure("unsure", 1, 2, 1.0, None, None, unit="s"),
        )
    )
    pictures = svgs(as_html(report(made)))
    assert [picture.get("aria-label") for picture in pictures] == [
        "Change and its 95% interval, nats",
        "Change and its 95% interval, %",
    ]
    (zero,) = [float(line.get("x1", "")) for line in pictures[0].iter("line") if line.get("class") == "zero"]
    dots = [float(dot.get("cx", "")) for dot in pictures[0].iter("circle")]
    whiskers = [
        tuple(map(float, re.findall(r"[MH]([\d.]+)", path.get("d", ""))[:2])) for path in pictures[0].iter("path")
    ]
    unit = dots[1] - zero
    assert unit > 20
    assert dots[0] == pytest.approx(zero - unit, abs=0.2)
    assert whiskers[0] == pytest.approx((zero - 1.5 * unit, zero - 0.5 * unit), abs=0.2)
    assert whiskers[1] == pytest.approx((zero + 0.5 * unit, zero + 2 * unit), abs=0.2)


def lines(*points: tuple[float, float]) -> ElementTree.Element:
    return svgs(as_html(report(section(curves=(Curve("c", "x", "y", {"a": points}),)))))[0]


def places(picture: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The points of each line drawn."""
    return [
        [(float(a), float(b)) for a, b in (pair.split(",") for pair in line.get("points", "").split())]
        for line in picture.iter("polyline")
    ]


def test_a_curve_lies_where_its_numbers_say() -> None:
    """Straight points on a straight line, to the right and upwards, inside the picture."""
    ((first, second, third),) = places(lines((0, 1), (10, 2), (20, 3)))
    assert second == pytest.approx(((first[0] + third[0]) / 2, (first[1] + third[1]) / 2), abs=0.2)
    assert 0 < first[0] < third[0] < 340
    assert 0 < third[1] < first[1] < 222


def test_a_gap_breaks_a_curve() -> None:
    found = places(lines((0, 1), (1, 2), (2, math.nan), (3, 2), (4, 1)))
    assert [len(run) for run in found] == [2, 2]


def test_long_curves_keep_their_spikes() -> None:
    points = [(float(k), 0.0) for k in range(50_000)]
    points[31_337] = (31_337.0, 7.0)
    ((*drawn,),) = places(lines(*points))
    assert len(drawn) <= 402
    assert min(b for _, b in drawn) < min(drawn[0][1], drawn[-1][1]) - 50


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(math.nan, 1.0)],
        [(1.0, 1.0)],
        [(0.0, 0.0), (0.0, 0.0)],
        [(1e20, 1e20), (1e20, 1e20)],
        [(0.0, 1.0), (1.0, 1.0 + 1e-16)],
        [(-1e308, -1e308), (1e308, 1e308)],
        [(-1e299, -1e299), (1e299, 1e299)],
        [(5e-324, 5e-324), (0.0, 0.0)],
        [(1_000_000.0, 1.0), (1_000_004.0, 2.0)],
    ],
)
def test_curves_at_the_edge(points: list[tuple[float, float]]) -> None:
    """Whatever there is to draw lies inside the picture, and no two ticks of an axis read alike."""
    page = as_html(report(section(curves=(Curve("c", "x", "y", {"a": points}),))))
    if "nothing to draw" in page:
        assert not [p for p in points if all(abs(v) <= 1e300 for v in p)]
        return
    picture = svgs(page)[0]
    for dot in picture.iter("circle"):
        assert 0 <= float(dot.get("cx", "")) <= 340
        assert 0 <= float(dot.get("cy", "")) <= 222
    across = [text.text for text in picture.iter("text") if text.get("text-anchor") == "middle"]
    up = [text.text for text in picture.iter("text") if text.get("text-anchor") == "end"]
    assert len(set(across)) == len(across) >= 2
    assert len(set(up)) == len(up) >= 3


def test_lines_for_a_terminal() -> None:
    made = report(
        section(sentence="Loss fell\nby 0.4."),
        section(key="forgetting", title="Forgetting", verdict="unchanged"),
        section(key="bias", title="Bias", verdict="unknown", sentence="", error="no pairs"),
    )
    assert as_text(made) == [
        "Gain        better     Loss fell by 0.4.",
        "Forgetting  unchanged  It gained.",
        "Bias        unknown    Could not be made: no pairs",
    ]
    assert as_text(report()) == []


def test_a_report_without_sections() -> None:
    Page(as_html(report()))
    assert as_json(report())["sections"] == {}


def test_nothing_is_lost_unseen() -> None:
    with pytest.raises(ValueError, match="section gain is there twice"):
        report(section(), section())
    with pytest.raises(ValueError, match="figure of gain loss is there twice"):
        report(section(figures=(figure("loss", 1, 2, 1, 0, 2), figure("loss", 1, 2, 1, 0, 2))))
    with pytest.raises(ValueError, match="its verdict is better"):
        report(section(error="no rows"))
