"""The mean badness of each sample over several sampled decodings, and which of them shows how it changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import numpy as np

from benchmarks.comparison.measures import Judged, Measure, Scored

__all__ = ["averaged", "net_changes"]


def averaged(measure: Measure, counts: Mapping[str, int]) -> Measure:
    """Return the measure with one row a sample: its mean badness over the decodings, of which each suite has so many.

    A sample that lacks the score of a decoding in either run is lost. A guard is not sampled, so its rows stay.
    """
    if measure.group == "guard" or all(counts[pair.suite] == 1 for pair in measure.pairs):
        return measure
    places: dict[tuple[str, str], list[int]] = {}
    for at, pair in enumerate(measure.pairs):
        places.setdefault(pair.key, []).append(at)
    whole = [own for (suite, _), own in places.items() if len(own) == counts[suite]]
    kept = {measure.pairs[own[0]].key for own in whole}
    return replace(
        measure,
        pairs=tuple(measure.pairs[own[0]] for own in whole),
        before=np.array([measure.before[own].mean() for own in whole]),
        after=np.array([measure.after[own].mean() for own in whole]),
        strata=tuple(measure.strata[own[0]] for own in whole) if measure.strata else (),
        lost=_lost(measure, kept),
    )


def _lost(measure: Measure, kept: Set[tuple[str, str]]) -> tuple[Scored, ...]:
    """Return the samples that are not kept, one row each: without a score where one decoding of a run has none."""
    found: dict[tuple[str, str], list[Scored]] = {}
    scored = zip(measure.pairs, measure.before.tolist(), measure.after.tolist(), strict=True)
    for row in (*scored, *measure.lost):
        if row[0].key not in kept:
            found.setdefault(row[0].key, []).append(row)
    return tuple(
        (rows[0][0], _mean([one for _, one, _ in rows]), _mean([two for _, _, two in rows])) for rows in found.values()
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def net_changes(judged: Judged) -> list[int]:
    """Return the places of samples that changed, of several decodings the first that changed as the sum of them did."""
    places: dict[tuple[str, str], list[int]] = {}
    for at, (pair, one, other) in enumerate(zip(judged.pairs, judged.before, judged.after, strict=True)):
        if one.ok is not None and other.ok is not None:
            places.setdefault(pair.key, []).append(at)
    found = []
    for own in places.values():
        changes = [bool(judged.after[at].ok) - bool(judged.before[at].ok) for at in own]
        net = int(np.sign(sum(changes)))
        if net:
            found.append(own[changes.index(net)])
    return found
