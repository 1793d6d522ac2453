"""The classes of the guard in the formats without a template: rows of a table, and test cases."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree

from benchmarks.comparison.class_drift import decided_rates
from benchmarks.comparison.findings import ClassRate, Findings
from benchmarks.report import text

__all__ = ["CLASS_HEAD", "class_cases", "class_rows"]

CLASS_HEAD = (
    "class",
    "images",
    "before",
    "after",
    "change",
    "exact interval",
    "worse",
    "better",
    "p (Holm)",
    "verdict",
)
RED = ("REGRESSION", "INCONCLUSIVE")


def class_rows(findings: Findings) -> list[tuple[str, ...]]:
    """Return the classes that are worse or not certified; those that pass are in the page and in report.json."""
    return [
        (
            f"{what} of {text.visible(each.name)}",
            text.count(rate.n) + (f" (lacks {text.count(rate.lacking)})" if rate.lacking else ""),
            _share(rate.before),
            _share(rate.after),
            "–" if rate.change is None else text.change_of(rate.change, "share"),
            text.interval_of(rate.interval, "share"),
            text.count(rate.worse),
            text.count(rate.better),
            text.p_value(rate.p_holm),
            str(rate.verdict),
        )
        for each, what, rate in decided_rates(findings.classes)
        if rate.verdict != "PASS"
    ]


def class_cases(findings: Findings) -> Iterator[ElementTree.Element]:
    """Yield a test case for each class: red where it is worse, skipped where it is not certified."""
    for each, what, rate in decided_rates(findings.classes):
        name = f"guard {what} of class {text.visible(each.name)}"
        case = ElementTree.Element("testcase", {"classname": "guard classes", "name": name, "time": "0"})
        if rate.verdict != "PASS":
            _mark(case, rate)
        yield case


def _mark(case: ElementTree.Element, rate: ClassRate) -> None:
    if rate.verdict in RED:
        failure = ElementTree.SubElement(case, "failure", {"type": rate.verdict, "message": rate.reason})
        failure.text = rate.reason
    else:
        ElementTree.SubElement(case, "skipped", {"message": f"not certified: {rate.reason}"})


def _share(value: float | None) -> str:
    return "–" if value is None else text.value_of(value, "share")
