"""Bring two runs' rows together by sample, and say what forbids comparing them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.comparison.decodings import check_numbers, runs_by_suite
from benchmarks.runs.record import Row, Run, RunRecord

__all__ = ["Pair", "Pairing", "changed_part", "differences", "pair_runs"]

SHOWN = 3
CONTENT = ("kind", "image", "query", "type", "category", "subcategory", "under", "label", "reference")


@dataclass(frozen=True, eq=False)
class Pair:
    """One sample in both runs; ``suite`` is its suite's name, ``decoding`` counts sampled decodings from 0."""

    suite: str
    before: Row
    after: Row
    decoding: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """What tells its sample from every other one."""
        return self.suite, self.before.id

    @property
    def cluster(self) -> str:
        """The image, otherwise the sample itself: what is resampled and swapped as a whole."""
        return f"{self.suite}\0{self.before.image or self.before.id}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairing:
    """Samples that both sides have, in the baseline's order by suite and id, and why the comparison is no fair one."""

    pairs: tuple[Pair, ...]
    anomalies: tuple[str, ...]


def pair_runs(baseline: Sequence[Run], candidate: Sequence[Run], *, free: Sequence[str] = ()) -> Pairing:
    """Pair the runs of two sides suite by suite, and several sampled decodings of a suite in the order of their seeds.

    ``free`` names settings that may differ (``preprocessing``, for a run that is to show its effect).

    Raises InputError when a side is empty, has a suite twice without sampling it, or more decodings than the other.
    """
    before, after = runs_by_suite(baseline, "baseline"), runs_by_suite(candidate, "candidate")
    anomalies = [f"suite {name} was run on only one side" for name in sorted(before.keys() ^ after.keys())]
    pairs: list[Pair] = []
    for name in sorted(before.keys() & after.keys()):
        check_numbers(before[name], after[name], name)
        for side, runs in (("baseline", before[name]), ("candidate", after[name])):
            anomalies += [f"{name}: {told}" for told in _unlike(runs, side)]
        for turn, (one, other) in enumerate(zip(before[name], after[name], strict=True)):
            mark = f"{name}, decoding {turn + 1}" if len(before[name]) > 1 else name
            anomalies += [f"{mark}: {told}" for told in differences(one.record, other.record, free=free)]
            incomplete = (*_incomplete(one, "baseline"), *_incomplete(other, "candidate"))
            anomalies += [f"{mark}: {told}" for told in incomplete]
            found, told = _match(mark, one.rows, other.rows)
            pairs += [replace(pair, suite=name, decoding=turn) for pair in found]
            anomalies += told
    return Pairing(pairs=tuple(pairs), anomalies=tuple(anomalies))


def _unlike(runs: Sequence[Run], side: str) -> list[str]:
    """Name what differs between decodings of one side: they are to be the same but for the seed."""
    first, told = runs[0].record, []
    for run in runs[1:]:
        part = changed_part(first, run.record)
        if differences(first, run.record) or "noise" not in part:
            told.append(f"decodings of the {side} are not of the same thing: {runs[0].folder} and {run.folder}")
    return told


def differences(before: RunRecord, after: RunRecord, *, free: Sequence[str] = ()) -> list[str]:
    """Return each setting that must agree and does not, with both values."""
    one, other = before.settings(), after.settings()
    told = [
        f"the two runs differ in {name}: {_shown(one[name], other[name])}"
        for name in one
        if name not in free and one[name] != other[name]
    ]
    views = before.guard_view, after.guard_view
    if "view" not in free and None not in views and views[0] != views[1]:
        told.append(f"the two runs differ in view: {views[0]} and {views[1]}")
    return told


def changed_part(before: RunRecord, after: RunRecord) -> str:
    """Name what differs between two runs: compression, engine, preprocessing, view, several of them, or noise."""
    parts = {
        "compression": (before.artifact.sha256, before.artifact.name) != (after.artifact.sha256, after.artifact.name),
        "engine": before.runtime.as_stated_with(after.runtime) != after.runtime.as_stated_with(before.runtime),
        "preprocessing": before.preprocessing != after.preprocessing,
        "view": before.guard_view != after.guard_view and None not in (before.guard_view, after.guard_view),
    }
    return " and ".join(name for name, changed in parts.items() if changed) or "noise (the same again)"


def _incomplete(run: Run, side: str) -> list[str]:
    told = []
    if len(run.rows) != run.record.suite.rows:
        how = "is unfinished: run it again with --resume" if run.record.finished is None else "lacks rows"
        told.append(f"the {side} has {len(run.rows)} of {run.record.suite.rows} rows and {how}")
    if run.record.artifact.leaked:
        told.append(f"the {side} ({run.record.artifact.name}) was calibrated on samples of an evaluation suite")
    if run.record.artifact.random_weights:
        told.append(f"the {side} ({run.record.artifact.name}) has random weights, so its answers mean nothing")
    return told


def _match(name: str, before: Sequence[Row], after: Sequence[Row]) -> tuple[list[Pair], list[str]]:
    others = {row.id: row for row in after}
    alone = [row.id for row in before if row.id not in others]
    alone += sorted(others.keys() - {row.id for row in before})
    told = []
    if alone:
        told.append(
            f"{name}: {len(alone)} rows are in only one of the runs, such as {', '.join(sorted(alone)[:SHOWN])}"
        )
    pairs = [Pair(name, row, others[row.id]) for row in sorted(before, key=lambda row: row.id) if row.id in others]
    changed = [pair for pair in pairs if _content(pair.before) != _content(pair.after)]
    if changed:
        one = changed[0]
        field = next(f for f in CONTENT if getattr(one.before, f) != getattr(one.after, f))
        values = _shown(getattr(one.before, field), getattr(one.after, field))
        told.append(f"{name}: {len(changed)} samples differ between the runs, such as {one.key[1]}: {field} {values}")
    return pairs, told


def _content(row: Row) -> tuple[Any, ...]:
    return tuple(getattr(row, field) for field in CONTENT)


def _shown(one: Any, other: Any) -> str:
    """Return two values, of two mappings only what differs."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        return "; ".join(f"{key} {_short(one.get(key))} against {_short(other.get(key))}" for key in keys)
    return f"{_short(one)} against {_short(other)}"


def _short(value: Any) -> str:
    text = "not stated" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 160 else f"{text[:157]}..."
