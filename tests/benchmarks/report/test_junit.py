"""A CI job is red unless the verdict is PASS, whatever strangers wrote into the runs."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from benchmarks.comparison.findings import Verdict
from benchmarks.report.junit import COMPARABLE, junit
from tests.benchmarks.report.sample_findings import sample_findings
from tests.benchmarks.report.sample_parts import HOSTILE


def parsed(data: bytes) -> tuple[ElementTree.Element, list[ElementTree.Element]]:
    suite = ElementTree.fromstring(data).find("testsuite")
    assert suite is not None
    return suite, suite.findall("testcase")


@pytest.mark.parametrize("verdict", ["PASS", "REGRESSION", "INCONCLUSIVE", "ANOMALOUS"])
def test_counts_are_right_and_only_pass_is_green(verdict: Verdict) -> None:
    findings = sample_findings(verdict, judges=2)
    suite, cases = parsed(junit(findings))
    deciding = [line for line in findings.lines if line.margin is not None]
    failures, errors = suite.findall("testcase/failure"), suite.findall("testcase/error")
    assert len(cases) == len(deciding) + 1
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == [
        str(len(cases)),
        str(len(failures)),
        str(len(errors)),
        "0",
    ]
    assert bool(failures or errors) == (verdict != "PASS")
    assert sorted(str(each.get("type")) for each in failures) == sorted(
        str(line.verdict) for line in deciding if line.verdict in ("REGRESSION", "INCONCLUSIVE")
    )
    assert [each.get("type") for each in errors] == ["ANOMALOUS"] * (verdict == "ANOMALOUS")
    assert len({case.get("name") for case in cases}) == len(cases)


def test_anomalous_runs_are_red_even_where_every_line_passes() -> None:
    findings = replace(sample_findings("PASS"), verdict="ANOMALOUS", anomalies=("rows are missing",))
    _, cases = parsed(junit(findings))
    red = [case.get("name") for case in cases if case.find("error") is not None]
    assert red == [COMPARABLE]


@pytest.mark.parametrize("verdict", ["REGRESSION", "INCONCLUSIVE"])
def test_a_verdict_without_a_red_line_is_red_all_the_same(verdict: Verdict) -> None:
    findings = replace(sample_findings("PASS"), verdict=verdict)
    suite, _ = parsed(junit(findings))
    assert [each.get("type") for each in suite.findall("testcase/failure")] == [verdict]
    assert suite.get("failures") == "1"


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_keeps_it_well_formed(hostile: str) -> None:
    findings = sample_findings("INCONCLUSIVE")
    lines = tuple(replace(line, title=hostile, reason=hostile, key=f"{line.key}{hostile}") for line in findings.lines)
    _, cases = parsed(junit(replace(findings, lines=lines, reasons=(hostile,), created=hostile)))
    told = [case.find("failure") for case in cases]
    assert any(each is not None and each.text for each in told)
