"""What was proved, as a section of Markdown for RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu_proof.finding import FAILED, PROVED, UNPROVED
from benchmarks.gpu_proof.lines import Line
from benchmarks.gpu_proof.steps import STEPS

__all__ = ["section"]


def section(last: Mapping[str, Line]) -> str:
    """Return the section: machine, a table of steps, then what each proved, failed or could not try."""
    lines = [last[step.name] for step in STEPS if step.name in last]
    untried = [step.title for step in STEPS if step.name not in last]
    text = [*_head(lines), *_table(lines)]
    text += [f"Not run: {', '.join(untried)}.", ""] if untried else []
    for line in lines:
        text += _step(line)
    return "\n".join(text).rstrip("\n") + "\n"


def _head(lines: Sequence[Line]) -> Iterator[str]:
    dates = sorted({str(line["created"])[:10] for line in lines})
    yield f"## What a GPU machine proved ({' to '.join(dates[:1] + dates[1:][-1:]) or 'nothing yet'})"
    yield from dict.fromkeys(_machine(line) for line in lines)
    yield from ("", "`python -m benchmarks.gpu_proof`; each step in a process of its own.", "")


def _machine(line: Line) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    gpu = line["gpu"] or "no GPU"
    dry = " A dry run on the CPU: it proves nothing about a GPU." if line["dry"] else ""
    return _plain(f"{gpu}, driver {line['driver'] or 'unknown'}; {line['machine']}; {versions}.{dry}")


def _table(lines: Sequence[Line]) -> Iterator[str]:
    yield "| step | outcome | proved | failed | not proved | seconds |"
    yield "|---|---|---|---|---|---|"
    for line in lines:
        counts = [sum(each["outcome"] == kind for each in line["findings"]) for kind in (PROVED, FAILED, UNPROVED)]
        yield f"| {line['title']} | {line['outcome']} | {' | '.join(map(str, counts))} | {line['seconds']:.0f} |"
    yield ""


def _step(line: Line) -> Iterator[str]:
    yield f"### {line['title']}"
    if line["problem"]:
        yield f"- **The step ended early**: {_plain(line['problem'])}"
    for each in line["findings"]:
        yield f"- {_told(each)}"
    yield ""


def _told(finding: Mapping[str, Any]) -> str:
    claim, measured, reason = (_plain(finding[key] or "") for key in ("claim", "measured", "reason"))
    if finding["outcome"] == PROVED:
        return f"{claim}: {measured}" if measured else claim
    kind = "**Failed**" if finding["outcome"] == FAILED else "Not proved"
    return f"{kind}: {claim}: {reason}" + (f" ({measured})" if measured else "")


def _plain(text: object) -> str:
    """Return a text on one line that Markdown leaves as it is."""
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())
