"""The figures of the tutorial are those of RESULTS.md."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """Return the cells of a table's lines."""
    return [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines() if "|" in line]


def test_each_step_costs_what_was_measured() -> None:
    shape, table = re.findall(r"<!-- figures: (\S+) -->\n((?:\|.*\n)+)", TUTORIAL)[0]
    part = re.search(rf"^\| {shape} \|.*\n(?:\| \|.*\n)+", RESULTS, re.MULTILINE)
    assert part is not None
    measured = {
        name: [seconds, peak, read]
        for cells in rows(part[0])
        for name, seconds, peak, read in [(cells[-5], cells[-4], cells[-3], cells[-1])]
    }
    steps = rows(table)[2:]
    assert len(steps) >= 8
    for name, *figures in steps:
        assert measured[name] == figures, name


def test_every_other_figure_stands_there_too() -> None:
    costs = TUTORIAL.partition("## What each step costs")[2].partition("<!-- quoted -->")[2]
    figures = re.findall(r"\b\d[\d.]*(?= (?:minutes|GiB|MiB|ms)\b)", costs)
    assert len(figures) >= 10
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", RESULTS), figure


def test_the_sections_it_names_exist() -> None:
    for section in re.findall(r'(?:section |from )"([^"]+)"', TUTORIAL, re.IGNORECASE):
        assert re.search(rf"^### {re.escape(section)}$", RESULTS, re.MULTILINE), section
