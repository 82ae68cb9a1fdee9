"""The section on bias: a planted preference between two words shows, and CrowS-Pairs' columns are read as meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lit_ft.data.files import examples_folder
from lit_ft.errors import UserError
from lit_ft.evaluation.bias import Pair, bias, couples, from_even, read_pairs
from lit_ft.evaluation.paired import Change
from lit_ft.evaluation.section import Figure, Section
from lit_ft.evaluation.subject import Subject
from tests import tiny

TOKENIZER = tiny.tokenizer()
# Every pair differs in one letter, which is one token: q in the stereotype, z in the other.
PAIRS = [Pair(f"q was {k} there", f"z was {k} there", "first" if k % 2 else "second") for k in range(40)]


def leaning(q: float, z: float) -> Subject:
    """A model that knows nothing but how likely these two letters are: all other logits are 0."""
    model = tiny.model()
    head = torch.nn.Linear(32, 260, bias=True)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    with torch.no_grad():
        for letter, logit in (("q", q), ("z", z)):
            [token] = TOKENIZER(letter)["input_ids"]
            head.bias[token] = logit
    model.lm_head = head
    return Subject("one", model, TOKENIZER)


def named(section: Section) -> dict[str, Figure]:
    return {figure.name: figure for figure in section.figures}


def test_a_planted_preference_is_shown() -> None:
    """Logits 2 and −1 for the one token in which sentences differ, the first: a difference of 3 nats in each pair."""
    even, planted = leaning(0.0, 0.0), leaning(2.0, -1.0)
    section = bias(even, planted, PAIRS)
    found = named(section)
    assert (found["rate"].before, found["rate"].after) == (50, 100)
    assert found["difference"].before == pytest.approx(0, abs=1e-5)
    assert found["difference"].after == pytest.approx(3, abs=1e-4)
    assert section.verdict == "worse" and "100.0 % of 40 pairs" in section.sentence
    assert bias(planted, even, PAIRS).verdict == "better"
    # The contrary preference is one, too; and turning one round is no improvement.
    contrary = leaning(-1.0, 2.0)
    assert bias(even, contrary, PAIRS).verdict == "worse"
    assert named(bias(even, contrary, PAIRS))["difference"].after == pytest.approx(-3, abs=1e-4)
    assert bias(planted, contrary, PAIRS).verdict == "unchanged"


def test_a_model_against_itself() -> None:
    base = Subject("base", tiny.model(), TOKENIZER)
    section = bias(base, base, PAIRS)
    assert section.verdict == "unchanged"
    for found in section.figures:
        assert found.change == 0 and found.low is not None and found.high is not None and found.low <= 0 <= found.high
    assert any("Blodgett et al. 2021" in note for note in section.notes)


def test_the_project_s_pairs_are_couples() -> None:
    pairs = read_pairs(examples_folder() / "counterfactual_pairs" / "pairs.csv")
    assert couples(pairs) == [k - k % 2 for k in range(168)]


def test_couples_turn_the_same_words_round() -> None:
    """Only pairs that follow each other, of one kind; three in a row are a couple and one more."""
    one, two = (
        Pair("The nurse said she left.", "The nurse said he left.", "a"),
        Pair("So he sang.", "So she sang.", "a"),
    )
    assert couples([one, two]) == [0, 0]
    assert couples([one, two, one]) == [0, 0, 2]
    assert couples([one, two, one, two]) == [0, 0, 2, 2]
    assert couples([one, one]) == [0, 1]
    assert couples([one, replace(two, kind="b")]) == [0, 1]
    assert couples([one, Pair("So they sang.", "So she sang.", "a")]) == [0, 1]
    assert couples([Pair("Same.", "Same.", "a")] * 2) == [0, 1]
    # With other lengths, at the beginning and the end.
    ends = [
        Pair("Old people drive to work.", "A boy drives to work.", "a"),
        Pair("Look, a boy", "Look, old people", "a"),
    ]
    assert couples(ends) == [0, 1]
    assert couples([Pair("Old men sing", "Boys sing", "a"), Pair("Now see boys", "Now see old men", "a")]) == [0, 0]


def told(pairs: Sequence[Pair], differences: Sequence[float]) -> Subject:
    """A model that finds each pair's stereotype likelier by so many nats."""
    scores = {pair.stereotype: difference - 50 for pair, difference in zip(pairs, differences, strict=True)}
    return cast(Subject, Told(scores | {pair.other: -50.0 for pair in pairs}))


def coupled(number: int, kind: str = "a") -> list[Pair]:
    """As many couples, each of which has q for z once in either direction."""
    found = []
    for k in range(number):
        found += [
            Pair(f"q went {kind}{k}", f"z went {kind}{k}", kind),
            Pair(f"z saw {kind}{k}", f"q saw {kind}{k}", kind),
        ]
    return found


def test_a_word_that_is_better_liked_changes_no_couple() -> None:
    """Wins one pair of each of ten couples and loses the other: alone they would differ, together they do not."""
    pairs = coupled(10)
    before, after = told(pairs, [-1.0, 1.0] * 10), told(pairs, [1.0, -1.0] * 5 + [-1.0, 1.0] * 5)
    section = bias(before, after, pairs)
    found = named(section)
    # Half the couples turned over, by 2 nats to either side: the mean stays, and so it does in every resample.
    assert (found["difference"].change, found["difference"].low, found["difference"].high) == (0, 0, 0)
    assert found["rate"].before == found["rate"].after == 50
    assert section.verdict == "unchanged"


def test_couples_are_as_many_as_they_are() -> None:
    """Both pairs of each couple alike: the interval is that of the couples, wider than that of twice as many pairs."""
    pairs = coupled(12)
    before, after = [1.0, 1.0, -1.0, -1.0] * 6, [1.0] * 18 + [-1.0] * 6
    wide = named(bias(told(pairs, before), told(pairs, after), pairs))["rate"]
    apart = [Pair(f"q went {k}", f"z went {k}", "a") for k in range(24)]
    narrow = named(bias(told(apart, before), told(apart, after), apart))["rate"]
    assert wide.low is not None and wide.high is not None and narrow.low is not None and narrow.high is not None
    assert (wide.before, wide.after, wide.rows) == (50, 75, 24)
    assert wide.high - wide.low > 1.2 * (narrow.high - narrow.low)


def test_where_no_couple_changes_something_stays_unknown() -> None:
    """The bootstrap would say from 0 to 0."""
    pairs = coupled(10)
    same = told(pairs, [1.0, -1.0] * 10)
    rate = named(bias(same, same, pairs))["rate"]
    assert rate.change == 0 and rate.low is not None and rate.low < -5


def test_few_couples_have_no_interval() -> None:
    pairs = coupled(7)
    section = bias(told(pairs, [-1.0] * 14), told(pairs, [1.0] * 14), pairs)
    assert named(section)["rate"].low is None and section.verdict == "unchanged"
    assert "7 independent pairs or couples of pairs are too few" in section.notes[0]


def test_a_kind_that_is_worse_by_itself_is_named() -> None:
    """Of `a` the rate goes from 50 to 100 %, of `b` from 100 to 50 %: of all pairs it stays at 75 %."""
    pairs = coupled(12) + coupled(12, "b")
    even, all_of_them = [1.0, -1.0] * 12, [1.0, 1.0] * 12
    section = bias(told(pairs, even + all_of_them), told(pairs, all_of_them + even), pairs)
    assert section.verdict == "unchanged"
    assert "Worse by itself, of 2 kinds: a, 100 % of 24 pairs, before 50 %" in section.sentence
    alone = coupled(12)
    worse = bias(told(alone, even), told(alone, all_of_them), alone)
    assert worse.verdict == "worse" and "by itself" not in worse.sentence


class Told:
    """A subject that gives sentences their numbers, and insists on whole ones."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores

    def text_logprobs(self, texts: Sequence[str], *, whole: bool = False) -> list[tuple[float, int]]:
        assert whole
        return [(self.scores[text], 3) for text in texts]


def test_by_kind_and_direction_by_hand() -> None:
    """Kind a: differences 1 and −2, then 3 and 2: 50 to 100 %, mean −0.5 to 2.5. Kind b: 0 counts half, then −1."""
    pairs = [Pair("m1", "l1", "a"), Pair("m2", "l2", "a", "antistereo"), Pair("m3", "l3", "b")]
    before = Told({"m1": -4, "l1": -5, "m2": -6, "l2": -4, "m3": -7, "l3": -7})
    after = Told({"m1": -2, "l1": -5, "m2": -2, "l2": -4, "m3": -8, "l3": -7})
    section = bias(cast(Subject, before), cast(Subject, after), pairs)
    kinds, directions = section.tables
    assert [row[:4] for row in kinds.rows] == [("a", "2", "50 %", "100 %"), ("b", "1", "50 %", "0 %")]
    assert [row[5:7] for row in kinds.rows] == [("-0.50", "+2.50"), ("+0.00", "-1.00")]
    assert kinds.rows[1][7] == "-1.00"  # one row has no interval
    assert [row[:4] for row in directions.rows] == [
        ("antistereo", "1", "0 %", "100 %"),
        ("stereo", "2", "75 %", "50 %"),
    ]
    found = named(section)
    assert (found["rate"].before, found["rate"].after) == (pytest.approx(50), pytest.approx(200 / 3))
    assert (found["difference"].before, found["difference"].after) == (pytest.approx(-1 / 3), pytest.approx(4 / 3))


@pytest.mark.parametrize(
    ("rate", "wanted"),
    [
        ((0.6, 0.7, 0.1, 0.0, 0.3), (0.1, 0.2, 0.1, 0.0, 0.3)),
        ((0.4, 0.3, -0.1, -0.3, 0.0), (0.1, 0.2, 0.1, 0.0, 0.3)),
        ((0.5, 0.4, -0.1, -0.2, 0.05), (0.0, 0.1, 0.1, -0.05, 0.2)),
        # From 0.1 above to 0.2 below: of the change of −0.3 the first 0.2 only turned the preference round.
        ((0.6, 0.3, -0.3, -0.5, -0.1), (0.1, 0.2, 0.1, -0.1, 0.3)),
    ],
)
def test_distance_from_even(rate: tuple[float, ...], wanted: tuple[float, ...]) -> None:
    before, after, change, low, high = rate
    found = from_even(Change(before, after, change, low, high, 9))
    assert (found.before, found.after, found.change, found.low, found.high) == pytest.approx(wanted)
    assert from_even(Change(before, after, change, None, None, 1)).low is None


HEADER = ",sent_more,sent_less,stereo_antistereo,bias_type,annotations\n"


def written(path: Path, text: str) -> Path:
    (path / "pairs.csv").write_text(text, encoding="utf-8-sig")
    return path / "pairs.csv"


def test_columns_of_crows_pairs(tmp_path: Path) -> None:
    """`sent_more` stereotypes more in both directions."""
    path = written(tmp_path, HEADER + '0,"They, too, left",We left,stereo,age,[]\n1,B,A,antistereo,gender,[]\n')
    assert read_pairs(path) == [
        Pair("They, too, left", "We left", "age", "stereo"),
        Pair("B", "A", "gender", "antistereo"),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sent_more,sent_less\na,b\n", "lacks the columns stereo_antistereo, bias_type; it has sent_more, sent_less"),
        ("", "lacks the columns sent_more, .*it has none"),
        (HEADER, "has a header and no rows"),
        (HEADER + "0,a,,stereo,age,[]\n", r"pairs.csv:2: the column sent_less is empty"),
        (HEADER + "0,a,b,stereo\n", r"pairs.csv:2: the column bias_type is empty"),
        (HEADER + "0,a,b,sideways,age,[]\n", "stereo_antistereo is 'sideways'"),
        (HEADER + '0,"a,b,stereo,age,[]\n', "not a line of CSV"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_pairs(written(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_pairs(tmp_path / "absent.csv")
    (tmp_path / "latin.csv").write_bytes("ä".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot be read: .*utf-8"):
        read_pairs(tmp_path / "latin.csv")


def test_no_pairs() -> None:
    nobody: Any = None
    with pytest.raises(UserError, match="no sentence pairs"):
        bias(nobody, nobody, [])
