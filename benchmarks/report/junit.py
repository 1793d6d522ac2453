"""JUnit XML: a CI job is red unless the verdict is PASS.

One test case a line with a margin, one for each class of the guard (skipped where it is not certified), and one,
``the runs can be compared``, for what makes a comparison ANOMALOUS.
"""

from __future__ import annotations

from xml.etree import ElementTree

from benchmarks.comparison.findings import Findings, Line
from benchmarks.report import text
from benchmarks.report.classes import class_cases

__all__ = ["COMPARABLE", "junit"]

COMPARABLE = "the runs can be compared"


def junit(findings: Findings) -> bytes:
    """Return the document, UTF-8. REGRESSION and INCONCLUSIVE are failures of different types, ANOMALOUS an error."""
    cases = [_comparable(findings)]
    cases += [_line(line) for line in findings.lines if line.margin is not None]
    cases += class_cases(findings)
    red = [_number(cases, kind) for kind in ("failure", "error")]
    if findings.verdict != "PASS" and not any(red):  # whatever the lines say, the verdict counts
        _red(cases[0], "failure", findings.verdict, "\n".join(findings.reasons))
        red = [_number(cases, kind) for kind in ("failure", "error")]
    counts = {"tests": str(len(cases)), "failures": str(red[0]), "errors": str(red[1]), "time": "0"}
    counts["skipped"] = str(_number(cases, "skipped"))
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": f"safety regression: {findings.verdict}", **counts})
    if findings.created:
        suite.set("timestamp", text.visible(findings.created))
    suite.extend(cases)
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _comparable(findings: Findings) -> ElementTree.Element:
    case = ElementTree.Element("testcase", {"classname": "safety", "name": COMPARABLE, "time": "0"})
    if findings.verdict == "ANOMALOUS":
        _red(case, "error", "ANOMALOUS", "\n".join(findings.anomalies or findings.reasons))
    return case


def _line(line: Line) -> ElementTree.Element:
    name = f"{text.visible(line.title)} [{text.visible(line.key)}]"
    case = ElementTree.Element("testcase", {"classname": line.group, "name": name, "time": "0"})
    if line.verdict == "ANOMALOUS":
        _red(case, "error", line.verdict, line.reason)
    elif line.verdict in ("REGRESSION", "INCONCLUSIVE"):
        _red(case, "failure", line.verdict, line.reason)
    ElementTree.SubElement(case, "system-out").text = (
        f"before {text.value_of(line.before, line.unit)}, after {text.value_of(line.after, line.unit)}, "
        f"change {text.change_of(line.change, line.unit)} ({text.interval_of(line.interval, line.unit)}), "
        f"margin {text.margin_of(line.margin, line.unit)}, p after Holm {text.p_value(line.p_holm)}"
    )
    return case


def _red(case: ElementTree.Element, kind: str, verdict: str, reason: str) -> None:
    told = text.visible(reason) or verdict
    ElementTree.SubElement(case, kind, {"type": verdict, "message": told.partition("\n")[0]}).text = told


def _number(cases: list[ElementTree.Element], kind: str) -> int:
    return sum(case.find(kind) is not None for case in cases)
