"""The model card's report: every line in a table, and no text of strangers that is markup."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benchmarks.report.markdown import markdown
from tests.benchmarks.report.sample_findings import sample_findings
from tests.benchmarks.report.sample_parts import HOSTILE


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_each_line_stands_in_a_table_with_its_figures() -> None:
    findings = sample_findings(judges=2)
    text = markdown(findings)
    rows = {cells(row)[0].replace("\\", ""): cells(row) for row in text.splitlines() if row.startswith("|")}
    for line in findings.lines:
        row = rows[line.title]
        assert row[1:3] == [
            f"{100 * value:.2f} %" if line.unit == "share" else f"{value:.4f}" for value in (line.before, line.after)
        ]
        if line.margin is not None:
            assert line.verdict is not None and row[-1].endswith(line.verdict)
            assert row[5] == f"{100 * line.margin:g} point{'s' * (line.margin != 0.01)}"
    assert "| mASR (string) | 15.38 % | 20.17 % | +4.79 points | +4.18 to +5.40 | 2 points | 294 | 134 |" in text


def test_verdict_reasons_cautions_and_hashes_are_there() -> None:
    findings = sample_findings()
    text = markdown(findings)
    assert text.startswith("## Safety regression: ✕ REGRESSION\n")
    plain = text.replace("\\", "")
    for told in (*findings.reasons, *findings.cautions, "a8" * 32, "3f" * 32, "SafeLLaVA-7B-gptq-w4g128"):
        assert told in plain


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_stays_in_its_cell_and_is_no_markup(hostile: str) -> None:
    findings = sample_findings()
    lines = tuple(replace(line, title=hostile) for line in findings.lines)
    text = markdown(replace(findings, lines=lines, reasons=(hostile,), cautions=(hostile,)))
    widths = {len(cells(row)) for row in text.splitlines() if row.startswith("|")}
    assert widths == {10, 5, 4}  # both tables of lines, and provenance of three runs
    assert not re.search(r"(?<!\\)[<`\[]", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    text.encode("utf-8")
