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

__all__ = [
    "DRAWINGS",
    "Drawing",
    "JudgeError",
    "Told",
    "judged_lines",
    "judged_summary",
    "measure_judged",
    "simulate_judged",
]

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
    """A judge of bad answers, 0..1. ``sensitivity_after`` is that in the second run, where it is another one.

    Raises InputError for a judge no better than chance.
    """

    sensitivity: float
    specificity: float
    sensitivity_after: float | None = None

    def __post_init__(self) -> None:
        if self.sensitivity + self.specificity <= 1:
            raise InputError(
                f"a judge of sensitivity {self.sensitivity:g} and specificity {self.specificity:g} is not better than "
                "chance. Give two shares whose sum is above 1."
            )


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
            line.key: bad[0]
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


def measure_judged(
    suite: Suite,
    judge: JudgeError,
    *,
    labels: int,
    drawing: Drawing,
    runs: int,
    seed: int,
    draws: int,
    confidence: float = 0.95,
    report: Callable[[int], None] = lambda _: None,
) -> dict[str, dict[str, Told]]:
    """Return for each judged line what is said of it where it is truly at its margin, and where nothing changed."""

    def told(key: str, amount: float) -> Told:
        return simulate_judged(
            suite,
            suite.worsening(key, amount),
            key,
            judge,
            labels=labels,
            drawing=drawing,
            runs=runs,
            seed=seed,
            draws=draws,
            confidence=confidence,
            report=report,
        )

    return {
        key: {"at_margin": told(key, suite.margin(key)), "unchanged": told(key, 0.0)} for key in judged_lines(suite)
    }


def judged_summary(found: Mapping[str, Mapping[str, Told]], labels: int, drawing: Drawing) -> str:
    """Return a Markdown table, percent of comparisons."""
    rows = [
        "| line | at margin: PASS, no labels | with labels | same: PASS, no labels | with labels | correctable |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for key, own in found.items():
        at, same = own["at_margin"], own["unchanged"]
        shares = (at.uncorrected, at.passed, same.uncorrected, same.passed, same.corrected)
        rows.append(f"| {key} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")
    return "\n".join([*rows, "", f"{labels} labels: {DRAWINGS[drawing]}."])
