"""What both runs were: every field of their records side by side, and where they differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.comparison.findings import Findings
from benchmarks.report.text import count, plain
from safevlm.files.storage import shown_bytes

__all__ = ["Field", "Part", "artifact_of", "provenance_of", "suites_of"]

PARTS: Mapping[str, tuple[str, ...]] = {
    "Artifact": ("artifact.",),
    "Runtime": ("runtime.",),
    "Suite": ("suite.",),
    "Settings": ("prompt", "preprocessing", "decoding", "threshold", "view"),
    "Imported": ("scored_by", "notes"),
    "When and where": ("created", "finished", "machine", "versions."),
}
MUST_AGREE = ("suite.", "prompt", "preprocessing", "decoding")
"""Fields that two comparable runs share; a difference in another one is what is being compared."""
SEED = "decoding.seed"
"""Sampled decodings are to differ in it."""
LEFT_OUT = ("schema_version",)
DOTTED = ("artifact.", "runtime.", "suite.")
"""Starts of names that are their part's title again."""
DATES = ("created", "finished")
"""They always differ, which means nothing."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field, a value for each side. ``broken``: it differs, though comparable runs agree in it."""

    name: str
    """Dotted, as in ``run.json``."""
    label: str
    """The name without what its part's title says."""
    values: tuple[str, ...]
    differs: bool
    broken: bool


@dataclass(frozen=True, kw_only=True)
class Part:
    """Fields that belong together."""

    title: str
    fields: tuple[Field, ...]


def provenance_of(findings: Findings) -> tuple[Part, ...]:
    """Return the fields of baseline, candidate and, where there is one, the third run."""
    sides = [side for side in (findings.baseline, findings.candidate, findings.against) if side]
    tables = [_side(side) for side in sides]
    names = list(dict.fromkeys(name for table in tables for name in table))
    taken: set[str] = set()
    parts = []
    for title, starts in PARTS.items():
        own = [name for name in names if name.startswith(starts)]
        taken.update(own)
        parts.append(Part(title=title, fields=tuple(_field(name, tables) for name in own)))
    rest = [name for name in names if name not in taken and name not in LEFT_OUT]
    parts.append(Part(title="Other", fields=tuple(_field(name, tables) for name in rest)))
    return tuple(part for part in parts if part.fields)


def artifact_of(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the artifact's name, and in short what it is: kind, bits, size."""
    if not runs:
        return "–", ""
    names = dict.fromkeys(plain(_under(run, "artifact").get("name")) for run in runs)
    first = _under(runs[0], "artifact")
    bits = _under(first, "compression").get("bits_per_weight")
    size = first.get("bytes")
    told = (
        plain(first["kind"]) if first.get("kind") else "",
        f"{plain(bits)} bit" if isinstance(bits, (int, float)) else "",
        shown_bytes(size) if isinstance(size, (int, float)) else "",
        plain(_under(runs[0], "runtime").get("name")) if _under(runs[0], "runtime").get("name") else "",
    )
    return ", ".join(names), " · ".join(each for each in told if each)


def suites_of(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return each suite's name and number of samples."""
    suites = [_under(run, "suite") for run in runs]
    told = [f"{plain(suite.get('name'))} ({count(suite.get('rows'), 'sample')})" for suite in suites]
    times = {each: told.count(each) for each in told}
    return ", ".join(f"{each} × {number} decodings" if number > 1 else each for each, number in times.items())


def _under(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}


def _side(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return dotted names and values of a side; where its runs differ, each value with its suite."""
    told = [(plain(_under(run, "suite").get("name")), dict(_flat(run))) for run in runs]
    names = dict.fromkeys(name for _, fields in told for name in fields)
    return {name: _joined([(suite, fields.get(name, "–")) for suite, fields in told]) for name in names}


def _joined(values: Sequence[tuple[str, str]]) -> str:
    if len({value for _, value in values}) == 1:
        return values[0][1]
    return "\n".join(f"{suite}: {value}" for suite, value in values)


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in record.items():
        name = f"{prefix}{plain(key)}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.") if value else ((name, "–"),)
        elif name == "notes" and isinstance(value, (list, tuple)) and value:
            yield name, "\n".join(map(plain, value))  # whole sentences
        else:
            yield name, plain(value)


def _field(name: str, tables: Sequence[Mapping[str, str]]) -> Field:
    values = tuple(table.get(name, "–") for table in tables)
    differs = name not in DATES and len(set(values[:2])) > 1
    return Field(
        name=name,
        label=name.partition(".")[2] if name.startswith(DOTTED) else name,
        values=values,
        differs=differs,
        broken=differs and name.startswith(MUST_AGREE) and name != SEED,
    )
