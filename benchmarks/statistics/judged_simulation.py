"""Pairs of runs whose truth is known, seen by a judge of known error and corrected by people's labels.

Answers are those of :mod:`benchmarks.statistics.simulation`. The judge calls a bad answer bad with its sensitivity and
a good one good with its specificity, in either run by itself: errors that both runs share would cost less. Labels are
drawn as ``benchmarks.labels`` draws them, or at random; bounds and rule are those of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks.statistics.judge_errors import Answers, Correction
from benchmarks.statistics.label_plan import spread_labels
from benchmarks.statistics.paired import line_statistics
from benchmarks.statistics.simulation import MEAN, Sampled, Suite, draw_badness, mean_where, where_of
from safevlm.errors import InputError

__all__ = ["DRAWINGS", "Drawing", "JudgeError", "Told", "judged_lines", "simulate_judged"]

Drawing = Literal["random", "words", "both"]
DRAWINGS: Mapping[Drawing, str] = {
    "random": "baseline, at random",
    "words": "baseline, by the judge's word",
    "both": "both runs, by the judge's words",
}
RR = "rr"
_BATCH = 100
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class JudgeError:
    """A judge of bad answers, 0..1. ``sensitivity_after`` is of the second run, where it is another one."""

    sensitivity: float
    specificity: float
    sensitivity_after: float | None = None


@dataclass(frozen=True, kw_only=True)
class Told:
    """How often a line passes: by the judge's words as they are, and corrected; ``corrected`` counts the latter."""

    uncorrected: float
    passed: float
    corrected: float


def judged_lines(suite: Suite) -> tuple[str, ...]:
    """Return the lines that a judge scores: the mean, its types, and RR."""
    return (MEAN, *(line.key for line in suite.lines if line.typed or line.key == RR))


def simulate_judged(
    suite: Suite,
    worsening: Mapping[str, float],
    key: str,
    judge: JudgeError,
    *,
    labels: int,
    drawing: Drawing = "random",
    runs: int,
    seed: int = 0,
    draws: int = 2000,
    confidence: float = 0.95,
    report: Callable[[int], None] = lambda _: None,
) -> Told:
    """Decide line ``key`` in ``runs`` comparisons in which each line is truly ``worsening`` worse.

    ``labels`` are over all judged lines. Raises InputError for a line that no judge scores.
    """
    if key not in judged_lines(suite):
        raise InputError(f"{key!r} is not a judged line. Allowed: {', '.join(judged_lines(suite))}.")
    rng, margin = np.random.default_rng([seed, 23]), suite.margin(key)
    asked = [line for line in suite.lines if line.typed or line.key == RR]
    group = [line for line in asked if line.typed != (key == RR)]
    where = mean_where(suite) if key == MEAN else where_of(next(line for line in asked if line.key == key))
    assert where is not None
    weights = [float(key in (MEAN, line.key)) for line in group]
    counts, done = np.zeros(3), 0
    while done < runs:
        size = min(_BATCH, runs - done)
        drawn = {
            line.key: bad
            for line, bad in zip(suite.lines, draw_badness(suite, worsening, size, rng), strict=True)
            if line in asked
        }
        truths = {key_: np.stack(bad, axis=1) for key_, bad in drawn.items()}
        words = {key_: _judged(truth, judge, rng) for key_, truth in truths.items()}
        chosen = [line.key for line in group if key in (MEAN, line.key)]
        seen = np.concatenate([words[each][:, 1].astype(np.float64) - words[each][:, 0] for each in chosen])
        found = line_statistics(where, seen, counted=key != MEAN, confidence=confidence, seed=0, draws=draws)
        for run, own in enumerate(found):
            answers = _answers(group, asked, truths, words, run, labels, drawing, rng)
            bound = Correction(answers, draws=draws, seed=seed).change(
                np.array(weights) / sum(weights), max(own.uppers), confidence
            )
            plain = max(own.uppers) < margin
            counts += plain, plain and bound is not None and bound.high < margin, bound is not None
        done += size
        report(size)
    uncorrected, passed, corrected = counts / runs
    return Told(uncorrected=uncorrected, passed=passed, corrected=corrected)


def _judged(truth_N2R: Bools, judge: JudgeError, rng: np.random.Generator) -> Bools:
    after = judge.sensitivity if judge.sensitivity_after is None else judge.sensitivity_after
    finds = np.array([judge.sensitivity, after])[:, None]
    chance = rng.random(truth_N2R.shape, dtype=np.float32)
    found: Bools = np.where(truth_N2R, chance < finds, chance >= judge.specificity)
    return found


def _answers(
    group: Sequence[Sampled],
    asked: Sequence[Sampled],
    truths: Mapping[str, Bools],
    words: Mapping[str, Bools],
    run: int,
    labels: int,
    drawing: Drawing,
    rng: np.random.Generator,
) -> Answers:
    """Return a group's answers of one comparison, labels drawn over all that is ``asked``."""
    truth_N2 = np.concatenate([truths[line.key][..., run] for line in asked])
    words_N2 = np.concatenate([words[line.key][..., run] for line in asked])
    types_N = np.repeat(np.arange(len(asked)), [len(line.images) for line in asked])
    if drawing == "random":
        chosen = rng.permutation(len(types_N))[:labels]
    else:
        harmless_N = np.repeat([line.key == RR for line in asked], [len(line.images) for line in asked])
        each = labels // 2 if drawing == "both" else labels
        chosen = spread_labels(harmless_N, types_N, words_N2, each, both=drawing == "both", rng=rng)
    labels_N2 = np.full(truth_N2.shape, np.nan)
    labels_N2[chosen, 0] = truth_N2[chosen, 0]
    if drawing == "both":
        labels_N2[chosen, 1] = truth_N2[chosen, 1]
    own = [asked.index(line) for line in group]
    keep = np.isin(types_N, own)
    pools = sorted({line.pool for line in asked})
    clusters_N = np.concatenate([line.images * len(pools) + pools.index(line.pool) for line in asked])
    places = np.searchsorted(own, types_N[keep])
    return Answers(types=places, clusters=clusters_N[keep], words=words_N2[keep], labels=labels_N2[keep])
