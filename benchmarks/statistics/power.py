"""What a suite can prove of an unchanged model, and which more samples or decodings would prove enough.

An unchanged model is compared with itself in simulation (:mod:`benchmarks.statistics.simulation`) once; what other
sizes would give is read off the same comparisons, because a bound's distance from 0 shrinks with the root of samples
and of decodings. That is a prediction: the plan that is proposed is simulated itself. R comparisons, L lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from benchmarks.statistics.decision import decide
from benchmarks.statistics.simulation import MEAN, Sampled, Suite, compared, line_verdicts
from benchmarks.statistics.tango import one_sided_value
from safevlm.errors import InputError

__all__ = [
    "FACTORS",
    "KINDS",
    "Effort",
    "LineOutlook",
    "Outlook",
    "Plan",
    "enlarged",
    "kind_of",
    "look_ahead",
    "propose",
]

KINDS = ("pairs", "guard", "questions")
"""What can be made larger on its own."""
FACTORS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
NEW_ROW = 10
"""Answers that a new labelled row is worth: rows must be found and labelled, answers take a machine's time alone."""
POWER = 0.8
_TRIES = 4
_NORMAL = NormalDist()

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How many times as many rows of each kind, and sampled decodings of each answer; a guard is not sampled."""

    pairs: float = 1.0
    guard: float = 1.0
    questions: float = 1.0
    decodings: int = 1


@dataclass(frozen=True, kw_only=True)
class LineOutlook:
    """One line: what it has, how often an unchanged model passes, what harm is reported with 80 % power; shares."""

    key: str
    n: int
    margin: float
    churn: float
    passes: float
    harm: float
    """Smallest true worsening that is a REGRESSION with :data:`POWER`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outlook:
    """What ``comparisons`` simulated comparisons of an unchanged model say."""

    suite: Suite
    lines: tuple[LineOutlook, ...]
    passes: float
    regressions: float
    comparisons: int
    uppers: Floats
    """The larger bound of each comparison and line: RL, lines in the order of ``lines``."""

    def predicted(self, effort: Effort) -> float:
        """Return P(PASS) that ``effort`` is predicted to give."""
        return float(np.all([_passing(self, kind, effort) for kind in KINDS], axis=0).mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The cheapest effort found, and what its own simulation says."""

    effort: Effort
    outlook: Outlook
    reached: bool


def look_ahead(
    suite: Suite,
    *,
    runs: int,
    confidence: float,
    harm_level: float,
    seed: int = 0,
    draws: int = 2000,
    report: Callable[[int], None] = lambda _: None,
) -> Outlook:
    """Simulate ``runs`` comparisons of an unchanged model. Raises InputError for a suite without a margin."""
    keys = [key for key in suite.keys if math.isfinite(suite.margin(key)) and (key != MEAN or _typed(suite))]
    if not keys:
        raise InputError("no line has a margin, so there is nothing to plan. Give at least one margin.")
    margins = np.array([suite.margin(key) for key in keys])
    uppers, changes, moved, harmed = [], [], [], 0
    for found in compared(suite, {}, runs=runs, seed=seed, draws=draws, confidence=confidence):
        uppers.append(np.array([[max(each.uppers) for each in found[key]] for key in keys]).T)
        changes.append(np.array([[each.change for each in found[key]] for key in keys]).T)
        moved.append(np.array([[each.worse + each.better for each in found[key]] for key in keys]).T)
        for run in range(len(found[keys[0]])):
            verdicts = line_verdicts(suite, {key: found[key][run] for key in keys}, decide, harm_level)
            harmed += "REGRESSION" in verdicts.values()
        report(len(uppers[-1]))
    uppers_RL, changes_RL = np.concatenate(uppers), np.concatenate(changes)
    passed_RL, sizes = uppers_RL < margins, [_size(suite, key) for key in keys]
    churns = np.concatenate(moved).mean(axis=0) / sizes
    lines = tuple(
        LineOutlook(
            key=key,
            n=sizes[at],
            margin=float(margins[at]),
            churn=float(churns[at]),
            passes=float(passed_RL[:, at].mean()),
            harm=_harm(float(changes_RL[:, at].std()), suite, key, confidence, harm_level / len(keys)),
        )
        for at, key in enumerate(keys)
    )
    return Outlook(
        suite=suite,
        lines=lines,
        passes=float(passed_RL.all(axis=1).mean()),
        regressions=harmed / runs,
        comparisons=runs,
        uppers=uppers_RL,
    )


def propose(
    now: Outlook,
    simulated: Callable[[Suite], Outlook],
    *,
    target: float,
    most_decodings: int = 5,
    factors: Sequence[float] = FACTORS,
) -> Plan:
    """Return the cheapest effort whose own simulation (``simulated``) passes an unchanged model at ``target``.

    Where none of the efforts tried does, the one that comes nearest.
    """
    tried: list[Plan] = []
    aim = target
    for _ in range(_TRIES):
        effort = _cheapest(now, aim, most_decodings, factors)
        if tried and effort == tried[-1].effort:
            break
        outlook = now if effort == Effort() else simulated(enlarged(now.suite, effort))
        tried.append(Plan(effort=effort, outlook=outlook, reached=outlook.passes >= target))
        if tried[-1].reached:
            return tried[-1]
        aim = min(now.predicted(effort) + (target - outlook.passes) + 0.005, 1.0)
    return max(tried, key=lambda plan: plan.outlook.passes)


def enlarged(suite: Suite, effort: Effort) -> Suite:
    """Return the suite with so many times the rows and images of each kind, and so many decodings.

    New rows are on new images, as many to an image as before.
    """
    return replace(suite, lines=tuple(_enlarged(line, effort) for line in suite.lines))


def _enlarged(line: Sampled, effort: Effort) -> Sampled:
    kind = kind_of(line.key)
    factor = float(getattr(effort, kind))
    _, codes = np.unique(line.images, return_inverse=True)
    whole, part = divmod(round(len(codes) * factor), len(codes))
    copies = [codes + (codes.max() + 1) * turn for turn in range(whole)]
    copies.append(codes[:part] + (codes.max() + 1) * whole)
    own = effort.decodings if kind != "guard" else 1
    pool = line.pool if factor == 1 else f"{kind}:{line.pool}"
    images = line.images if factor == 1 else np.concatenate(copies)
    return replace(line, images=images, pool=pool, decodings=own)


def _cheapest(now: Outlook, aim: float, most_decodings: int, factors: Sequence[float]) -> Effort:
    """Return the effort that costs least among those predicted to reach ``aim``, otherwise the one predicted best."""
    efforts = list(_efforts(most_decodings, factors))
    kept: dict[tuple[str, float, int], npt.NDArray[np.bool_]] = {}
    best: tuple[bool, float, Effort] | None = None
    for effort in efforts:
        parts = []
        for kind in KINDS:
            at = kind, float(getattr(effort, kind)), 1 if kind == "guard" else effort.decodings
            if at not in kept:
                kept[at] = _passing(now, kind, effort)
            parts.append(kept[at])
        passes = float(np.all(parts, axis=0).mean())
        rank = (True, -_cost(now.suite, effort), effort) if passes >= aim else (False, passes, effort)
        if best is None or rank[:2] > best[:2]:
            best = rank
    assert best is not None
    return best[2]


def _efforts(most_decodings: int, factors: Sequence[float]) -> Iterator[Effort]:
    for decodings, pairs, guard, questions in product(range(1, most_decodings + 1), factors, factors, factors):
        yield Effort(pairs=pairs, guard=guard, questions=questions, decodings=decodings)


def _cost(suite: Suite, effort: Effort) -> float:
    """Return the answers that one run needs, and :data:`NEW_ROW` for each row that is not there yet."""
    total = 0.0
    for line in suite.lines:
        kind = kind_of(line.key)
        rows = len(line.images) * float(getattr(effort, kind))
        total += rows * (1 if kind == "guard" else effort.decodings) + NEW_ROW * (rows - len(line.images))
    return total


def _passing(now: Outlook, kind: str, effort: Effort) -> npt.NDArray[np.bool_]:
    """Return in which comparisons all lines of ``kind`` would pass: R."""
    own = [at for at, line in enumerate(now.lines) if kind_of(line.key) == kind]
    samples = float(getattr(effort, kind)) * (1 if kind == "guard" else effort.decodings)
    margins = np.array([now.lines[at].margin for at in own])
    found: npt.NDArray[np.bool_] = np.all(now.uppers[:, own] / math.sqrt(samples) < margins, axis=1)
    return found


def kind_of(key: str) -> str:
    """Return which of :data:`KINDS` a line belongs to."""
    if key.startswith("guard"):
        return "guard"
    return "questions" if key.startswith("utility") else "pairs"


def _typed(suite: Suite) -> list[Sampled]:
    return [line for line in suite.lines if line.typed]


def _parts(suite: Suite, key: str) -> list[Sampled]:
    return _typed(suite) if key == MEAN else [line for line in suite.lines if line.key == key]


def _size(suite: Suite, key: str) -> int:
    return sum(len(line.images) for line in _parts(suite, key))


def _harm(error: float, suite: Suite, key: str, confidence: float, level: float) -> float:
    """Return the least worsening that is a REGRESSION with :data:`POWER`; ``error`` is the change's without harm.

    Harm must be shown at ``level`` (Holm's first step), and must not be proven to lie within the margin. A worsening
    changes samples of its own, which widens the error.
    """
    parts = _parts(suite, key)
    own = sum(1 / len(line.images) for line in parts) / len(parts) ** 2
    power = _NORMAL.inv_cdf(POWER)
    shown, beyond = _NORMAL.inv_cdf(1 - level / 2) + power, one_sided_value(confidence) - power
    harm = shown * error
    for _ in range(50):  # the fixed point is approached from below
        harm = shown * math.sqrt(error**2 + own * harm * (1 - min(harm, 1.0)))
    return min(max(harm, suite.margin(key) - beyond * error), 1.0)
