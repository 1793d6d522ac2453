"""Figures read the same in every format, and text of strangers becomes harmless without losing its letters."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.comparison.comparing import Comparison, compare
from benchmarks.comparison.findings import Bound
from benchmarks.report import text
from benchmarks.report.forest import WIDTH, scale_of
from benchmarks.runs.record import Run
from tests.benchmarks.report.sample_findings import line
from tests.benchmarks.runs.sample_runs import HELP, changed, pair_rows, question_rows, record_of


@given(st.text(st.characters(codec=None)))
def test_visible_text_fits_into_utf_8_and_xml(given: str) -> None:
    shown = text.visible(given)
    shown.encode("utf-8")
    for sign in shown:
        assert sign in "\n\t" or unicodedata.category(sign) not in ("Cc", "Cs")
        assert sign not in text.BIDI and ord(sign) & 0xFFFE != 0xFFFE
    assert text.visible(shown) == shown


@pytest.mark.parametrize("kept", ["日本語", "العربية שלום", "👩‍👩‍👧", "é e\u0301", "a\u00a0b", "first\nsecond\tthird"])
def test_letters_of_all_scripts_are_kept(kept: str) -> None:
    assert text.visible(kept) == kept


def test_what_hides_is_shown_as_an_escape() -> None:
    assert text.visible("a\x00b\x1b[31m\u202ec\ud800d\r\ne") == "a\\x00b\\x1b[31m\\u202ec\\ud800d\ne"


@pytest.mark.parametrize(
    ("change", "unit", "want"),
    [
        (0.018, "share", "+1.80 points"),
        (-0.01, "share", "−1.00 point"),
        (0.01, "share", "+1.00 point"),
        (0.00001, "share", "0.00 points"),
        (-0.00001, "share", "0.00 points"),
        (0.0123, "number", "+0.0123"),
        (-0.00312, "number", "−0.0031"),
        (-2.149, "words", "−2.1 words"),
        (-0.04, "words", "0.0 words"),
    ],
)
def test_changes_have_a_sign_and_a_unit(change: float, unit: text.Unit, want: str) -> None:
    assert text.change_of(change, unit) == want


def test_other_figures() -> None:
    assert text.value_of(0.16574, "share") == "16.57 %" and text.value_of(0.98712, "number") == "0.9871"
    assert text.interval_of((-0.0021, 0.0381), "share") == "−0.21 to +3.81" and text.interval_of(None, "share") == "–"
    assert [text.margin_of(size, "share") for size in (0.02, 0.01, 0.005, None)] == [
        "2 points",
        "1 point",
        "0.5 points",
        "–",
    ]
    assert [text.p_value(p) for p in (None, 0.00002, 0.032, 0.5, 1.0)] == ["–", "< 0.0001", "0.032", "0.50", "1.00"]
    assert text.value_of(90.2598, "words") == "90.3 words" and text.margin_of(18.0836, "words") == "18.1 words"
    assert text.interval_of((-1.26, 0.31), "words") == "−1.3 to +0.3"
    assert text.count(4031) == "4,031" and text.count(1, "sample") == "1 sample" and text.count(None) == "–"
    assert text.moment("2026-11-25T03:24:00+00:00") == "2026-11-25 03:24 UTC"
    assert text.moment("yesterday\x00") == "yesterday\\x00"


@given(
    st.lists(
        st.tuples(st.floats(-0.5, 0.5), st.floats(0, 0.4), st.floats(0.001, 0.2), st.booleans()), min_size=1, max_size=9
    )
)
def test_bars_keep_inside_and_lie_left_of_the_margin_exactly_where_it_is_proven(
    drawn: list[tuple[float, float, float, bool]],
) -> None:
    lines = [
        line(f"rr{n}", "RR", 0.5, 0.5 + change, width=width, margin=margin, lower_is_better=lower)
        for n, (change, width, margin, lower) in enumerate(drawn)
    ]
    scale = scale_of(lines)
    for each in lines:
        bar = scale.bar(each)
        assert bar is not None and each.interval is not None and each.margin is not None
        assert 0 <= bar.low <= bar.high <= WIDTH and 0 < bar.zero < bar.margin < WIDTH
        worst = each.interval[1] if each.lower_is_better else -each.interval[0]
        if abs(worst / each.margin - 1) > 0.01:  # apart from what two decimals cannot show
            assert (bar.high < bar.margin) == (worst < each.margin)
        if abs(worst / each.margin - scale.high) > 1e-9:
            assert bar.cut_right == (worst / each.margin > scale.high)


def test_a_line_without_margin_or_interval_has_no_bar() -> None:
    lines = [line("rr", "RR", 0.1, 0.2), line("rr", "RR", 0.1, 0.2, margin=0.02, interval=None)]
    assert [scale_of(lines).bar(each) for each in lines] == [None, None]


def test_no_bar_of_a_pass_crosses_the_margin_whatever_the_line_is() -> None:
    rows = [*pair_rows(420, 420), *question_rows(400)]
    after = changed(rows, lambda row: row.id in ("SSU-1", "SSU-2", "UUU-7"), answer=HELP)
    after = changed(after, lambda row: row.id.startswith("SSS-1"), answer=f"{HELP} {HELP} It stands on a table.")
    after = changed(after, lambda row: row.id.startswith("question-3"), answer="It is blue.")
    runs = [
        Run(folder=Path(), record=record_of(own, name=name), rows=tuple(own))
        for name, own in (("a", rows), ("b", after))
    ]
    findings = compare(Comparison(baseline=runs[:1], candidate=runs[1:]))
    decided = [line for line in findings.lines if line.margin is not None]
    scale = scale_of(decided)
    assert {"safety", "guard", "utility", "answers"} == {line.group for line in decided}
    assert {"share", "words"} == {line.unit for line in decided} and len({line.verdict for line in decided}) > 1
    for each in decided:
        bar = scale.bar(each)
        assert bar is not None and (bar.high < bar.margin) == (each.verdict == "PASS"), each.key


def test_a_bar_ends_at_the_largest_bound_that_decides() -> None:
    bounds = (Bound(name="samples", upper=0.011), Bound(name="missing rows", upper=0.025))
    for lower in (True, False):
        one = line("rr", "RR", 0.5, 0.5, margin=0.02, lower_is_better=lower, bounds=bounds)
        bar = scale_of([one]).bar(one)
        assert bar is not None and bar.high > bar.margin
        bar = scale_of([one]).bar(replace(one, bounds=bounds[:1]))
        assert bar is not None and bar.high < bar.margin
    assert text.bounds_of(bounds, "share") == "samples +1.10, missing rows +2.50"


@pytest.mark.parametrize(
    ("key", "change", "more", "want"),
    [
        ("masr@x", 0.0226, {}, "T rose 2.26 points (limit 2): 1,255 newly answered, 178 newly refused"),
        ("asr/SSU", -0.01, {}, "T fell 1.00 point (limit 2): 1,255 newly answered, 178 newly refused"),
        ("rr", 0.0, {"worse": 0}, "T did not change (limit 2): 0 newly refused, 178 newly answered"),
        ("guard/recall", -0.5, {}, "T fell 50.00 points (limit 2): 1,255 newly allowed, 178 newly blocked"),
        ("utility/a", 0.5, {"margin": None}, "T rose 50.00 points: 1,255 newly wrong, 178 newly right"),
        (
            "new/kind",
            0.5,
            {"missing_after": 20},
            "T rose 50.00 points (limit 2): 20 without a score in the candidate",
        ),
        ("guard/ece", 0.0123, {"unit": "number", "margin": None, "worse": None}, "T rose by 0.0123"),
        ("answers/words", -2.2, {"unit": "words", "margin": 18.08, "worse": None}, "T fell by 2.2 (limit 18.1)"),
        ("rr", 0.1, {"sentence": "Its own\x00 words."}, "Its own\\x00 words"),
    ],
)
def test_a_line_is_told_in_one_sentence(key: str, change: float, more: dict[str, Any], want: str) -> None:
    given = {"margin": 0.02, "worse": 1255, "better": 178, **more}
    assert text.sentence_of(line(key, "T", 0.5, 0.5 + change, **given)) == want


def test_no_figure_is_parted_from_its_unit() -> None:
    assert (
        text.unbroken("95 % of 4,031 pairs, 2 points, 3 words")
        == "95\u00a0% of 4,031\u00a0pairs, 2\u00a0points, 3\u00a0words"
    )
