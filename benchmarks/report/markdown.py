"""The report in short, as Markdown for a model card, and the ``model-index`` block of its front matter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.comparison.class_drift import decided_rates
from benchmarks.comparison.findings import Findings, Line
from benchmarks.report import text
from benchmarks.report.classes import CLASS_HEAD, class_rows
from benchmarks.report.model_index import model_index_yaml
from benchmarks.report.provenance import artifact_of, provenance_of, suites_of

__all__ = ["markdown"]

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")
"""Signs that Markdown or the HTML in it would read as markup."""
HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{20,116}\b")
"""A digest; its first twelve digits name a file as well."""
SHORT = ("artifact.sha256", "artifact.compression.", "runtime.", "suite.sha256", "scored_by", "notes", "machine")
"""Fields of the provenance that a model card needs."""


def markdown(findings: Findings) -> str:
    """Return verdict, both tables, cautions and provenance in short; every text of strangers is plain text.

    Raises MissingExtraError without PyYAML.
    """
    before, after = artifact_of(findings.baseline), artifact_of(findings.candidate)
    further = text.further_cautions(findings)
    blocks = [
        f"## Safety regression: {text.SYMBOLS[findings.verdict]} {findings.verdict}",
        f"{_safe(before[0])} → {_safe(after[0])}, {_safe(suites_of(findings.baseline) or 'no suite')}"
        f"{f', {_safe(text.moment(findings.created))}' if findings.created else ''}.",
        text.MEANINGS[findings.verdict],
        "\n>\n".join(f"> {_safe(each)}" for each in findings.judge_cautions),
        _judges(findings),
        f"Level: {_safe(text.level_of(findings))}.",
        _list(findings.reasons),
        _sentences([line for line in findings.lines if line.margin is not None]),
        _deciding([line for line in findings.lines if line.margin is not None], findings.confidence),
        _others([line for line in findings.lines if line.margin is None]),
        _classes(findings),
        "### What you may not conclude\n\n" + _list(further) if further else "",
        _provenance(findings),
        _margins(findings.margins),
        _model_index(findings) if findings.lines else "",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _judges(findings: Findings) -> str:
    """Name each judge with the pairs that it could not score."""
    told = [
        f"- Judge {_safe(judge.name)}: {_safe(text.count(judge.pairs, 'pair'))}; unscored: "
        f"{judge.unscored_before:,} before, {judge.unscored_after:,} after."
        for judge in findings.judges
    ]
    return "\n".join(told)


def _sentences(lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    told = (f"{text.SYMBOLS[line.verdict] if line.verdict else '–'} {text.sentence_of(line)}." for line in lines)
    judged = [f"{text.title_of(line)}: {line.judge_sentence}" for line in lines if line.judge_sentence]
    return "Line by line:\n\n" + _list(told) + ("\n\nThe judge’s errors:\n\n" + _list(judged) if judged else "")


def _model_index(findings: Findings) -> str:
    """Return the block in a fence that none of its texts can end."""
    block = model_index_yaml(findings)
    longest = max((len(run) for run in re.findall("`+", block)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"### For the model card's front matter\n\n{fence}yaml\n{block}{fence}"


def _deciding(lines: Sequence[Line], confidence: float) -> str:
    if not lines:
        return "No measure with a margin could be computed."
    corrected = any(line.corrected is not None for line in lines)
    head = ("measure", "before", "after", "change", f"{100 * confidence:g} % interval")
    head += (*(("corrected",) if corrected else ()), "at most worse by", "margin", "worse", "better")
    rows = [
        (
            text.visible(line.title),
            text.value_of(line.before, line.unit),
            text.value_of(line.after, line.unit),
            text.change_of(line.change, line.unit),
            text.interval_of(line.interval, line.unit),
            *((text.corrected_of(line) or "–",) if corrected else ()),
            text.upper_of(line),
            text.margin_of(line.margin, line.unit),
            text.count(line.worse),
            text.count(line.better),
            text.p_value(line.p_holm),
            f"{text.SYMBOLS[line.verdict]} {line.verdict}" if line.verdict else "–",
        )
        for line in lines
    ]
    return _table((*head, "p (Holm)", "verdict"), rows)


def _others(lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    rows = [
        (
            text.visible(line.title),
            text.value_of(line.before, line.unit),
            text.value_of(line.after, line.unit),
            text.change_of(line.change, line.unit),
            text.interval_of(line.interval, line.unit),
        )
        for line in lines
    ]
    return "Further measures, which decide nothing:\n\n" + _table(
        ("measure", "before", "after", "change", "interval"), rows
    )


def _classes(findings: Findings) -> str:
    rows = class_rows(findings)
    if not rows:
        return "Each class of the guard passes." if any(decided_rates(findings.classes)) else ""
    return "Classes of the guard that are worse or not certified:\n\n" + _table(CLASS_HEAD, rows)


def _provenance(findings: Findings) -> str:
    parts = provenance_of(findings)
    fields = [field for part in parts for field in part.fields if field.name.startswith(SHORT)]
    if not fields:
        return ""
    sides = [name for name, side in (("before", findings.baseline), ("after", findings.candidate)) if side]
    if findings.against:
        sides.append("third run")
    rows = [(field.name, *field.values) for field in fields]
    return "### Provenance\n\n" + _table(("field", *sides), rows, figures=False)


def _margins(margins: Mapping[str, Any]) -> str:
    if not margins:
        return ""
    told = "; ".join(f"{name}: {size}" for name, size in text.margins_of(margins))
    return f"Margins and limits. {_safe(told)}."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, figures: bool = True) -> str:
    rule = ["---", *["---:" if figures else "---"] * (len(head) - 1)]
    told = [[_safe(cell, figure=figures and at > 0) for at, cell in enumerate(row)] for row in (head, *rows)]
    lines = [told[0], rule, *told[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(texts: Iterable[str]) -> str:
    return "\n".join(f"- {_safe(each)}" for each in texts)


def _safe(words: str, *, figure: bool = False) -> str:
    """Return text that stays in its line and cell and is no markup; no figure breaks, no digest is long."""
    whole = " ".join(text.visible(HASH.sub(r"\1", words)).split())
    return SPECIAL.sub(r"\\\1", whole.replace(" ", "\u00a0") if figure else text.unbroken(whole))
