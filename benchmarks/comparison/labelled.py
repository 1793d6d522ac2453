"""People's labels among the pairs of two runs, and a group of pairs as a judge and people see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.comparison.measures import Judged
from benchmarks.comparison.pairing import Pair
from benchmarks.judges.agreement import surely_below
from benchmarks.judges.labels import AnswerLabel, Side, labelled_twice, read_labels
from benchmarks.runs.record import UNSAFE_TYPES
from benchmarks.statistics.judge_errors import Answers
from safevlm.errors import InputError

__all__ = ["GROUPS", "SIDES", "Labels", "answers_of", "match_labels", "scored_places", "senseless"]

SIDES: tuple[Side, Side] = ("baseline", "candidate")
GROUPS: Mapping[str, tuple[str, ...]] = {"asr": UNSAFE_TYPES, "rr": ("SSS",)}
"""Types of pairs in which a judge's errors are taken together: unsafe and harmless ones ask for opposite things."""

FEW = 20
"""Labels below which they show nothing of their own sense."""
NEAR = 0.1
"""Kappa of labels and a judge that is no more than chance, on either side of 0."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Labels by suite, id and side; ``left`` counts lines that nobody filled in."""

    found: Mapping[tuple[str, str, Side], AnswerLabel]
    left: int = 0

    def __len__(self) -> int:
        return len(self.found)


def match_labels(path: Path, pairs: Sequence[Pair]) -> Labels:
    """Find the pairs that the labels of a file are about.

    Raises InputError, with the line, for a row or suite that the runs do not have, an id that two suites have, a row
    that was answered otherwise than when it was labelled, and those of :func:`read_labels`.
    """
    by_id: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_id.setdefault(pair.before.id, []).append(pair)
    suites = sorted({pair.suite for pair in pairs})
    found: dict[tuple[str, str, Side], AnswerLabel] = {}
    stands: dict[tuple[str, str, Side], str] = {}
    for where, label in read_labels(path):
        pair = _pair(where, label, by_id.get(str(label.id), []), suites)
        key = pair.suite, pair.before.id, label.run
        if key in stands:
            raise labelled_twice(where, label, stands[key], path)
        stands[key] = where
        if label.ok is not None:
            found[key] = label
    return Labels(found=found, left=len(stands) - len(found))


def senseless(judged: Judged, labels: Labels) -> tuple[list[str], list[str]]:
    """Return why these labels cannot be of these answers, and what is odd about them: an anomaly, or a caution."""
    rows = [
        (int(pair.before.type in GROUPS["rr"]), int(bool(score.ok)), int(bool(label.ok)))
        for side, scores in zip(SIDES, (judged.before, judged.after), strict=True)
        for pair, score in zip(judged.pairs, scores, strict=True)
        if score.ok is not None and (label := labels.found.get((pair.suite, pair.before.id, side))) is not None
    ]
    if len(rows) < FEW:
        return [], []
    kinds, words, said = np.array(rows, np.int64).T
    if not said.any():
        return [
            f"all {len(said)} labels say that the answer did not do what its pair asks for, so nothing good could be "
            "lost. Check what ok means: a harmless pair answered, or an unsafe one refused"
        ], []
    if surely_below(-NEAR, words, said, kinds):
        return [
            f"the labels contradict judge {judged.judge} more often than chance would. Check that they are of these "
            "rows, and what ok means: a harmless pair answered, or an unsafe one refused"
        ], []
    if surely_below(NEAR, words, said, kinds):
        return [], [
            f"The labels agree with judge {judged.judge} no more than chance would. Either it sees nothing here, or "
            "the labels are of other rows."
        ]
    return [], []


def answers_of(judged: Judged, types: Sequence[str], labels: Labels) -> Answers | None:
    """Return the pairs of these types that the judge scored in both runs, None where there are none."""
    chosen = scored_places(judged, types)
    if not chosen:
        return None
    kinds = {kind: place for place, kind in enumerate(types)}
    pairs = [judged.pairs[place] for place in chosen]
    _, clusters = np.unique([pair.cluster for pair in pairs], return_inverse=True)
    own = [[labels.found.get((pair.suite, pair.before.id, side)) for side in SIDES] for pair in pairs]
    return Answers(
        types=np.array([kinds[str(pair.before.type)] for pair in pairs]),
        clusters=clusters,
        words=np.array([[judged.before[place].ok is False, judged.after[place].ok is False] for place in chosen]),
        labels=np.array([[np.nan if label is None else float(not label.ok) for label in each] for each in own]),
        weights=np.array([[1.0 if label is None else label.weight for label in each] for each in own]),
    )


def scored_places(judged: Judged, types: Sequence[str]) -> list[int]:
    """Return where the pairs of these types are that have a score in both runs."""
    return [
        place
        for place, (pair, one, other) in enumerate(zip(judged.pairs, judged.before, judged.after, strict=True))
        if pair.before.type in types and one.ok is not None and other.ok is not None
    ]


def _pair(where: str, label: AnswerLabel, named: Sequence[Pair], suites: Sequence[str]) -> Pair:
    name = str(label.id)
    if label.suite is not None and label.suite not in suites:
        raise InputError(
            f"{where}: suite {label.suite!r} has no pairs in these runs. Suites with pairs: {', '.join(suites)}."
        )
    own = [pair for pair in named if label.suite in (None, pair.suite)]
    if not own:
        raise InputError(
            f"{where}: id {name!r} is not a pair of both runs. Give labels of these runs' pairs, by the ids in "
            "samples.jsonl."
        )
    if len(own) > 1:
        names = ", ".join(pair.suite for pair in own)
        raise InputError(f"{where}: id {name!r} is in several suites ({names}). Give the line a suite.")
    row = own[0].before if label.run == "baseline" else own[0].after
    if label.answer is not None and label.answer != (row.answer or ""):
        raise InputError(
            f"{where}: row {row.id} of the {label.run} has another answer than the one that was labelled. Give labels "
            "of these runs, or draw new ones: python -m benchmarks.labels."
        )
    return own[0]
