"""Classes of the guard in every format: all of them on the page, those that do not pass in the short ones."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.comparison.class_drift import class_drift
from benchmarks.comparison.findings import ClassDrift, Findings
from benchmarks.comparison.margins import Margins
from benchmarks.comparison.measures import GuardRows
from benchmarks.report.junit import junit
from benchmarks.report.markdown import markdown
from benchmarks.report.page import page
from tests.benchmarks.report.sample_findings import sample_findings
from tests.benchmarks.report.sample_parts import HOSTILE

NAMES = ("safe", "lost", "few", "<b>kept</b>")


@pytest.fixture(scope="module")
def drift() -> tuple[ClassDrift, ...]:
    """One class that is lost whole, one of ten images, one that is kept; its name is markup."""
    labels = np.repeat(np.arange(4), (200, 40, 10, 60))
    before = np.full((len(labels), 4), 0.01)
    before[np.arange(len(labels)), labels] = 0.97
    after = before.copy()
    after[labels == 1] = before[0]
    rows = GuardRows(pairs=(), before=before, after=after, labels=labels, threshold=0.5)
    return class_drift(rows, NAMES, Margins())


@pytest.fixture(scope="module")
def findings(drift: tuple[ClassDrift, ...]) -> Findings:
    return replace(sample_findings("REGRESSION"), classes=drift)


def test_the_page_shows_every_class_and_what_it_lacks(findings: Findings) -> None:
    shown = page(findings).replace("\u00a0", " ")
    section = shown[shown.index('<section id="classes"') :].partition("</section>")[0]
    assert section.count("<tr ") == 2 + 3 + 4  # heads, recall of three classes, false blocks of four
    assert section.count('badge regression">') == 1 and section.count("NOT CERTIFIED") == 1
    assert "lacks 19" in section and "40 of 40 images newly missed" in section
    assert "<b>" not in section and "&lt;b&gt;kept" in section and 'href="#classes"' in shown


def test_the_short_report_names_only_those_that_do_not_pass(findings: Findings) -> None:
    text = markdown(findings).replace("\u00a0", " ")
    rows = [line for line in text.splitlines() if line.startswith(("| recall of", "| FPR of"))]
    assert [row.split(" |")[0] for row in rows] == ["| recall of lost", "| recall of few"]
    assert "10 (lacks 19)" in rows[1] and rows[0].endswith("REGRESSION |")
    passing = replace(findings, classes=(findings.classes[0], findings.classes[3]))
    assert "Each class of the guard passes." in markdown(passing)
    assert "lass of the guard" not in markdown(replace(findings, classes=()))


def test_ci_is_red_for_a_lost_class_and_skips_what_is_not_certified(findings: Findings) -> None:
    suite = ElementTree.fromstring(junit(findings)).find("testsuite")
    assert suite is not None and suite.get("skipped") == "1"
    cases = {str(case.get("name")): case for case in suite.findall("testcase")}
    assert cases["guard recall of class lost"].find("failure") is not None
    assert cases["guard recall of class few"].find("skipped") is not None
    assert len(cases["guard FPR of class lost"]) == 0 and len(cases) == int(suite.get("tests") or 0)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_text(findings: Findings, name: str) -> None:
    hostile = replace(findings, classes=(*findings.classes[:1], replace(findings.classes[1], name=name)))
    assert "<script>document.title" not in page(hostile).partition("</style>")[2]
    ElementTree.fromstring(junit(hostile))
    row = next(line for line in markdown(hostile).splitlines() if line.startswith("| recall of"))
    assert row.count(" | ") >= 9 and "\n" not in row
