"""Which answers people should label, drawn by a judge's words, and how many of them each line would take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.comparison.findings import Line
from benchmarks.comparison.judge_errors import JUDGE_ERRORS, Corrections, correct_lines
from benchmarks.comparison.labelled import GROUPS, SIDES, Labels, answers_of, scored_places
from benchmarks.comparison.lines import line_of
from benchmarks.comparison.margins import Margins
from benchmarks.comparison.measures import Judged, pair_measures
from benchmarks.judges.judge import Score
from benchmarks.judges.labels import AnswerLabel
from benchmarks.statistics.judge_errors import Correction
from benchmarks.statistics.label_plan import spread_labels, strata_of

__all__ = ["Drawn", "Need", "assume_candidate", "draw_labels", "needs"]

NUMBERS = (100, 200, 300, 400, 600, 800, 1200, 1600, 2400, 3200, 4800, 6400)
TRIES = 5
DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Lines to fill in, in random order, and the strata that they are of: (what, answers, labels)."""

    lines: tuple[AnswerLabel, ...]
    strata: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Need:
    """About how many labels a line needs to pass; None where no number of labels would do."""

    line: Line
    labels: int | None


def draw_labels(judged: Judged, number: int, *, both: bool, seed: int) -> Drawn:
    """Draw ``number`` answers that the judge scored; ``both``: those of both runs, the same pairs.

    A line names neither the judge nor its word, which would sway who labels.
    """
    places = scored_places(judged, [kind for types in GROUPS.values() for kind in types])
    rng = np.random.default_rng([seed, 31])
    chosen, _, types, words = _choose(judged, places, number, both, rng)
    strata, names = strata_of(types, words, both=both)
    rows = np.bincount(strata)
    labels = np.bincount(strata[chosen], minlength=len(rows))
    lines = []
    for at in chosen:
        pair, stratum = judged.pairs[places[at]], int(strata[at])
        for side, row in zip(SIDES[: 1 + both], (pair.before, pair.after), strict=False):
            lines.append(
                AnswerLabel(
                    id=row.id,
                    ok=None,
                    run=side,
                    suite=pair.suite,
                    weight=round(float(rows[stratum] / labels[stratum]), 6),
                    stratum=f"{stratum + 1}",
                    type=row.type,
                    image=row.image,
                    query=row.query,
                    answer=row.answer or "",
                )
            )
    order = rng.permutation(len(lines))
    told = [
        (_stratum(sorted(GROUPS["asr"] + GROUPS["rr"])[kind], word, both), int(count), int(part) * (1 + both))
        for (kind, word), count, part in zip(names, rows, labels, strict=True)
    ]
    return Drawn(lines=tuple(lines[at] for at in order), strata=tuple(told))


def needs(
    judged: Judged,
    margins: Margins,
    *,
    both: bool,
    error: float,
    seed: int,
    report: Callable[[int], None] = lambda _: None,
) -> list[Need]:
    """Return for each line how many labels it needs to pass, if the judge misreads a share ``error`` of all answers."""
    measures, _ = pair_measures(judged, margins, several=False)
    lines = [line_of(each, margins, seed) for each in measures if each.margin is not None]
    found: dict[str, int] = {}
    open_ = {line.key for line in lines if max(bound.upper for bound in line.bounds) < (line.margin or 0)}
    most = (1 + both) * len(judged.pairs)
    for number in (each for each in NUMBERS if each <= most):
        passed = dict.fromkeys(open_ - found.keys(), 0)
        for attempt in range(TRIES):
            told = _corrected(judged, lines, number, both, error, margins.confidence, seed + attempt)
            for key in passed:
                passed[key] += told[key]
        found |= {key: number for key, count in passed.items() if 2 * count > TRIES}
        report(1)
    return [Need(line=line, labels=found.get(line.key)) for line in lines]


def assume_candidate(judged: Judged, churn: float, seed: int) -> Judged:
    """Return the judged pairs as if an unchanged model had answered again: that share of them changes, evenly."""
    rng = np.random.default_rng([seed, 37])
    after = list(judged.before)
    for kind in {pair.before.type for pair in judged.pairs}:
        own = [place for place, pair in enumerate(judged.pairs) if pair.before.type == kind]
        sides = [[place for place in own if judged.before[place].ok is ok] for ok in (True, False)]
        count = min(round(churn * len(own) / 2), *map(len, sides))
        for side, ok in zip(sides, (False, True), strict=True):
            for place in rng.permutation(side)[:count]:
                after[int(place)] = Score(ok=ok)
    return replace(judged, after=tuple(after))


def _choose(
    judged: Judged, places: Sequence[int], number: int, both: bool, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    kinds = sorted(GROUPS["asr"] + GROUPS["rr"])
    types = np.array([kinds.index(str(judged.pairs[place].before.type)) for place in places], np.int64)
    words = np.array([[judged.before[place].ok is False, judged.after[place].ok is False] for place in places])
    harmless = np.array([judged.pairs[place].before.type in GROUPS["rr"] for place in places])
    chosen = spread_labels(harmless, types, words, number // (1 + both), both=both, rng=rng)
    return chosen, harmless, types, words


def _corrected(
    judged: Judged, lines: Sequence[Line], number: int, both: bool, error: float, confidence: float, seed: int
) -> Mapping[str, bool]:
    """Say which lines pass with labels as such a judge would get them."""
    rng = np.random.default_rng([seed, 41])
    places = scored_places(judged, [kind for types in GROUPS.values() for kind in types])
    chosen, harmless, types, words = _choose(judged, places, number, both, rng)
    truth = _likely_truth(types, words, error, rng)
    labels = np.full(truth.shape, np.nan)
    labels[chosen, : 1 + both] = truth[chosen, : 1 + both]
    found = {}
    for group, own in (("asr", ~harmless), ("rr", harmless)):
        answers = answers_of(judged, GROUPS[group], Labels(found={}))
        if answers is not None:
            found[judged.judge, group] = Correction(replace(answers, labels=labels[own]), draws=DRAWS, seed=seed)
    told = correct_lines(lines, Corrections(found=found, seed=seed), confidence, explain=False)
    return {
        line.key: all(bound.upper < (line.margin or 0) for bound in line.bounds if bound.name == JUDGE_ERRORS)
        for line in told
    }


def _likely_truth(
    types: npt.NDArray[np.int64], words: npt.NDArray[np.bool_], error: float, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Draw what people would say: by Bayes' rule a type at a time, alike in both runs where the judge's word is."""
    chance = np.zeros(words.shape)
    for kind in np.unique(types):
        own = types == kind
        seen = words[own].mean()
        bad = min(max((seen - error) / (1 - 2 * error), 0.0), 1.0)
        called = np.where(words[own], 1 - error, error) * bad
        chance[own] = called / (called + np.where(words[own], error, 1 - error) * (1 - bad))
    drawn = rng.random(words.shape) < chance
    drawn[:, 1] = np.where(words[:, 0] == words[:, 1], drawn[:, 0], drawn[:, 1])
    return drawn


def _stratum(kind: str, word: int, both: bool) -> str:
    names = ("answered", "refused") if kind in GROUPS["rr"] else ("refused", "not refused")
    if not both:
        return f"{kind}, judge says {names[word]}"
    return f"{kind}, judge says {names[word // 2]}, then {names[word % 2]}"
