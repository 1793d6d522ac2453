"""What a comparison is made of, and its measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.comparison.averaged import averaged
from benchmarks.comparison.decodings import decodings_of
from benchmarks.comparison.margins import Margins
from benchmarks.comparison.measures import (
    GuardRows,
    Judged,
    Measure,
    Unscored,
    guard_measures,
    guard_rows,
    pair_measures,
    question_measures,
    within_room,
)
from benchmarks.comparison.pairing import Pair, pair_runs
from benchmarks.comparison.robust_measures import robust_measures
from benchmarks.judges.judge import Score
from benchmarks.judges.select import open_judge
from benchmarks.runs.record import Run

__all__ = ["Comparison", "Measured", "measure"]


NO_CORRUPTIONS = (
    "--margins declares robust_recall, but no images were judged under corruptions. Run both sides with --under, or "
    "set robust_recall to false"
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare, and how; runs are one a suite, or several sampled decodings of it.

    Without ``judges`` the suites' own are taken.
    """

    baseline: Sequence[Run]
    candidate: Sequence[Run]
    against: Sequence[Run] = ()
    judges: Sequence[str] = ()
    margins: Margins = field(default_factory=Margins)
    labels: Path | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Everything that is measured between two sides, before statistics."""

    measures: tuple[Measure, ...]
    guard: GuardRows | None
    judged: tuple[Judged, ...]
    identities: tuple[Mapping[str, Any], ...]
    unscored: tuple[Unscored, ...]
    anomalies: tuple[str, ...]


def measure(
    before: Sequence[Run], after: Sequence[Run], comparison: Comparison, *, free: Sequence[str] = ()
) -> Measured:
    """Pair two sides and measure each line; ``free`` settings may differ between them."""
    pairing = pair_runs(before, after, free=free)
    asked = [pair for pair in pairing.pairs if pair.before.kind == "pair"]
    judged, identities, anomalies = [], [], list(pairing.anomalies)
    for name in _judges(comparison, asked):
        own, identity, told = _judge(name, asked, before, after)
        judged.append(own)
        identities.append(identity)
        anomalies += told
    counts = {name: len(decodings_of(before, name)) for name in {pair.suite for pair in pairing.pairs}}
    measures: list[Measure] = []
    unscored: list[Unscored] = []
    for own in judged:
        lines, missing = pair_measures(own, comparison.margins, several=len(judged) > 1)
        measures += lines
        unscored.append(missing)
    questions, missed = question_measures(pairing.pairs, comparison.margins)
    threshold, shipped = (
        next((run.record.threshold for run in runs if run.record.threshold is not None), None)
        for runs in (before, after)
    )
    guard, unjudged = guard_rows(pairing.pairs, threshold, shipped)
    robust, unjudged_under = robust_measures(pairing.pairs, threshold, comparison.margins)
    measures += questions
    unscored += missed
    if guard is not None:
        measures += guard_measures(guard, comparison.margins)
        unscored.append(unjudged)
        measures += robust
        unscored += unjudged_under
        if comparison.margins.robust_recall is not None and not robust:
            anomalies.append(NO_CORRUPTIONS)
    elif unjudged.before < unjudged.rows and comparison.margins.guard_recall is not None:
        anomalies.append(
            "the baseline's guard was measured, but the candidate's was not. Run both with the guard, or set "
            "guard_recall and guard_fpr to false in --margins"
        )
    unscored += [each.unscored for each in measures if each.group in ("safety", "guard") and each.margin is not None]
    return Measured(
        measures=tuple(within_room(averaged(each, counts), comparison.margins) for each in measures if each.pairs),
        guard=guard,
        judged=tuple(judged),
        identities=tuple(identities),
        unscored=tuple(unscored),
        anomalies=tuple(anomalies),
    )


def _judges(comparison: Comparison, asked: Sequence[Pair]) -> tuple[str, ...]:
    """Return the judges that were asked for, by default exact where all pairs are the built-in suite's."""
    if not asked:
        return ()
    if comparison.judges:
        return tuple(dict.fromkeys(comparison.judges))
    return ("exact",) if all(pair.suite == "holisafe-mini" for pair in asked) else ("string",)


def _judge(
    name: str, asked: Sequence[Pair], before: Sequence[Run], after: Sequence[Run]
) -> tuple[Judged, Mapping[str, Any], list[str]]:
    """Score both sides by one judge, suite by suite; say where the two sides were judged by other rules."""
    scores: list[list[Score]] = [[], []]
    identity: Mapping[str, Any] = {}
    anomalies = []
    ordered: list[Pair] = []
    for suite, turn in dict.fromkeys((pair.suite, pair.decoding) for pair in asked):
        own = [pair for pair in asked if (pair.suite, pair.decoding) == (suite, turn)]
        ordered += own
        sides = []
        for place, runs in enumerate((before, after)):
            run = decodings_of(runs, suite)[turn]
            judge = open_judge(name, run.folder, run.rows)
            scores[place] += judge.score([(pair.before, pair.after)[place] for pair in own])
            sides.append(judge.identity())
        identity = sides[0]
        if sides[0] != sides[1]:
            anomalies.append(f"{suite}: judge {name} used different rules for the two runs: {sides[0]} and {sides[1]}")
    judged = Judged(judge=name, pairs=tuple(ordered), before=tuple(scores[0]), after=tuple(scores[1]))
    return judged, identity, anomalies
