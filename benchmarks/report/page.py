"""The HTML page: one file without network, that a browser may run nothing in but its own small script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison.findings import Findings, JudgeSummary, Line, Unit
from benchmarks.report import text
from benchmarks.report.flipped import changed_samples, choices, group_samples
from benchmarks.report.forest import HEIGHT, WIDTH, Bar, Scale, scale_of
from benchmarks.report.pictures import read_pictures
from benchmarks.report.plots import draw_plots
from benchmarks.report.provenance import artifact_of, provenance_of, suites_of
from benchmarks.report.template import asset, render

__all__ = ["page"]

TOLD = 10
"""Lines in the banner; of those that do not pass, all."""
SCRIPTS = ("diff.js", "labels.js", "samples.js")
"""Parts of the page's one script, in order."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line, ready to be shown."""

    line: Line
    place: int
    title: str
    gloss: str
    bar: Bar | None


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """A measure's change in each step, and from end to end."""

    title: str
    unit: Unit
    cells: tuple[tuple[float | None, tuple[int, int] | None], ...]
    total: Line | None


def page(findings: Findings, *, images: Path | None = None) -> str:
    """Return the page. With ``images``, the folder that image names start in, flipped samples' images are in it.

    Raises MissingExtraError without jinja2 or matplotlib; InputError for a folder that has none of the images.
    """
    return render("report.html.j2", _context(findings, images))


def _context(findings: Findings, images: Path | None) -> dict[str, Any]:
    deciding = [line for line in findings.lines if line.margin is not None]
    scale = scale_of(deciding)
    rows = _rows(deciding, scale)
    samples = changed_samples(findings.flips)
    pictures = (
        read_pictures(images, [each.first.image for each in samples if each.first.image]) if images is not None else {}
    )
    groups, unshown = group_samples(samples, pictures)
    script = "".join(map(asset, SCRIPTS))
    verdicts = Counter(line.verdict for line in deciding)
    judges = {line.judge for line in findings.lines if line.judge is not None}
    return {
        "findings": findings,
        "symbols": text.SYMBOLS,
        "meaning": text.MEANINGS[findings.verdict],
        "before": artifact_of(findings.baseline),
        "after": artifact_of(findings.candidate),
        "suites": suites_of(findings.baseline),
        "tally": [(verdict, verdicts[verdict]) for verdict in text.SYMBOLS if verdicts[verdict]],
        "rows": rows,
        "told": _told(rows),
        "cautions": text.further_cautions(findings),
        "others": _rows([line for line in findings.lines if line.margin is None], scale),
        "several_judges": len(judges) > 1,
        "judges": [text.visible(judge.name) for judge in findings.judges] or sorted(map(text.visible, judges)),
        "level": text.unbroken(text.level_of(findings)),
        "forest": {"width": WIDTH, "height": HEIGHT, "zero": scale.place(0), "margin": scale.place(1)},
        "plots": draw_plots(findings),
        "groups": groups,
        "unshown": unshown,
        "changed": len(samples),
        "choices": choices(groups),
        "digest": hashlib.sha256(json.dumps(findings.to_json(), default=str).encode()).hexdigest(),
        "with_images": images is not None,
        "step_rows": _step_rows(findings),
        "corrected": [(judge.name, _corrected(judge)) for judge in findings.judges if judge.corrected],
        "parts": provenance_of(findings),
        "margins": text.margins_of(findings.margins),
        "css": asset("style.css"),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    }


def _rows(lines: Sequence[Line], scale: Scale) -> list[Row]:
    return [
        Row(
            line=line,
            place=place,
            title=text.unbroken(text.title_of(line)),
            gloss=text.gloss_of(line),
            bar=scale.bar(line),
        )
        for place, line in enumerate(lines, 1)
    ]


def _told(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the lines that the banner tells of: all that do not pass and the first others; and those it folds away."""
    open_ = [row for row in rows if row.line.verdict != "PASS"]
    passed = [row for row in rows if row.line.verdict == "PASS"]
    room = max(TOLD - len(open_), 0)
    return open_ + passed[:room], passed[room:]


def _step_rows(findings: Findings) -> list[StepRow]:
    lines = {line.key: line for line in findings.lines}
    keys = dict.fromkeys(key for step in findings.steps for key in step.changes)
    order = [key for key in lines if key in keys] + [key for key in keys if key not in lines]
    return [
        StepRow(
            title=text.visible(lines[key].title if key in lines else key),
            unit=lines[key].unit if key in lines else "share",
            cells=tuple((step.changes.get(key), step.flips.get(key)) for step in findings.steps),
            total=lines.get(key),
        )
        for key in order
    ]


def _corrected(judge: JudgeSummary) -> dict[str, Any]:
    """Return what was corrected as a table: columns ``names``, a row each for ASR and RR of both runs."""
    found = judge.corrected or {}
    tables = {key: value for key, value in found.items() if isinstance(value, Mapping)}
    names = list(dict.fromkeys(name for value in tables.values() for name in value))
    return {
        "names": [text.plain(name).replace("_", " ") for name in names],
        "rows": [(_rate(key), [_figure(value.get(name)) for name in names]) for key, value in tables.items()],
        "rest": [(_rate(key), text.plain(value)) for key, value in found.items() if key not in tables],
    }


def _figure(value: Any) -> str:
    """Return a share with four decimals, two of them as an interval, anything else as it is."""
    if isinstance(value, float):
        return text.value_of(value, "number")
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return " to ".join(map(_figure, value))
    return text.plain(value)


def _rate(key: str) -> str:
    """Return ``ASR before`` of ``asr_before``."""
    name, _, side = text.plain(key).partition("_")
    return (
        f"{name.upper()} {side}" if name in ("asr", "rr") and side else name.upper() if name in ("asr", "rr") else key
    )
