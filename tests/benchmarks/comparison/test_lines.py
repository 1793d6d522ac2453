"""Holm's correction stays within a judge, and the two levels decide one thing each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.comparison.findings import Bound, Line
from benchmarks.comparison.lines import decide_lines
from benchmarks.comparison.margins import Margins


def made(key: str, judge: str | None, p: float, *, change: float = 0.03, upper: float = 0.06) -> Line:
    return Line(
        key=key,
        title=key,
        group="safety",
        judge=judge,
        lower_is_better=True,
        n=1000,
        clusters=1000,
        before=0.1,
        after=0.1 + change,
        change=change,
        bounds=(Bound(name="samples", upper=upper),),
        worse=round(1000 * change) + 50,
        better=50,
        margin=0.05,
        p_harm=p,
    )


FIRST = [
    made("masr@a", "a", 0.012),
    made("rr@a", "a", 0.9),
    made("guard/fpr", None, 0.02),
    made("guard/recall", None, 1),
]
SECOND = [made("masr@b", "b", 0.03), made("rr@b", "b", 0.2)]


def test_a_second_judge_does_not_weaken_the_first_nor_the_first_the_second() -> None:
    alone, other = decide_lines(FIRST, Margins()), decide_lines(SECOND, Margins())
    for order in ([*FIRST, *SECOND], [*FIRST[:2], *SECOND, *FIRST[2:]]):
        both = {line.key: line for line in decide_lines(order, Margins())}
        assert all(both[line.key] == line for line in (*alone, *other))
    assert alone[0].p_holm == pytest.approx(4 * 0.012) and alone[0].verdict == "REGRESSION"
    assert other[0].p_holm == pytest.approx(2 * 0.03) and other[0].verdict == "INCONCLUSIVE"


def test_lines_without_a_judge_alone_are_one_family() -> None:
    found = decide_lines([replace(line, judge=None) for line in FIRST], Margins())
    assert found[0].p_holm == pytest.approx(4 * 0.012)


def test_confidence_and_harm_level_decide_one_thing_each() -> None:
    lines = [made("rr", "a", 0.03)]
    for confidence in (0.8, 0.95, 0.99):
        for level, verdict in ((0.05, "REGRESSION"), (0.01, "INCONCLUSIVE")):
            margins = Margins(confidence=confidence, harm_level=level)
            assert decide_lines(lines, margins)[0].verdict == verdict  # a bound that was given is not computed again
