"""Figures read the same in every format, and text of strangers becomes harmless without losing its letters."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.report import text
from benchmarks.report.forest import WIDTH, scale_of
from tests.benchmarks.report.sample_findings import line


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
