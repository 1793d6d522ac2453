"""Several sampled decodings of one suite on either side: which belong together, and the mean badness of each sample.

A greedy answer is one draw of what a model might say after the slightest change. Sampled at a temperature, several
times under other seeds, its chance of a bad answer is measured instead, and less of what is compared is noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.runs.record import Run
from safevlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.comparison.measures import Judged, Measure, Scored

__all__ = ["averaged", "check_numbers", "decodings_of", "net_changes", "runs_by_suite"]


def runs_by_suite(runs: Sequence[Run], side: str) -> dict[str, list[Run]]:
    """Return a side's runs by suite, several decodings of one in the order of their seeds.

    Raises InputError when the side is empty, and when two runs of a suite are not sampled under two seeds.
    """
    if not runs:
        raise InputError(f"the {side} run is missing. Give --{side} a run record.")
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.record.suite.name, []).append(run)
    for name, own in found.items():
        if len(own) > 1:
            found[name] = _sampled(own, name, side)
    return found


def decodings_of(runs: Sequence[Run], suite: str) -> list[Run]:
    """Return a side's runs of one suite, in the order of their seeds."""
    own = [run for run in runs if run.record.suite.name == suite]
    return own if len(own) == 1 else sorted(own, key=lambda run: run.record.seed or 0)


def check_numbers(before: Sequence[Run], after: Sequence[Run], name: str) -> None:
    """Raise InputError where one side has more decodings of a suite than the other."""
    if len(before) != len(after):
        raise InputError(
            f"suite {name} has {len(before)} runs in the baseline and {len(after)} in the candidate. Give both sides "
            "the same number of sampled decodings."
        )


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


def _sampled(runs: Sequence[Run], name: str, side: str) -> list[Run]:
    greedy = [run for run in runs if run.record.seed is None]
    if greedy:
        raise InputError(
            f"{side}: {runs[0].folder} and {runs[1].folder} are both runs of suite {name}, and {greedy[0].folder} does "
            "not state a decoding seed. Give only one, or runs of benchmarks.run --temperature T with one --seed each."
        )
    ordered = sorted(runs, key=lambda run: run.record.seed or 0)
    for one, other in pairwise(ordered):
        if one.record.seed == other.record.seed:
            raise InputError(
                f"{side}: {one.folder} and {other.folder} have the same decoding seed {one.record.seed}, so they are "
                "not two decodings. Run one of them again with another --seed."
            )
    return ordered
