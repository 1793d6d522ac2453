"""The suite of a baseline for planning: its lines, images, rates, and the churn between equal runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from benchmarks.comparison.margins import Margins
from benchmarks.comparison.measured import Comparison, measure
from benchmarks.comparison.measures import Measure
from benchmarks.runs.record import Run
from benchmarks.statistics.simulation import Sampled, Suite, keep_for_churn
from safevlm.errors import InputError

__all__ = ["Churn", "declared_suite", "measured_suite"]

Churn = tuple[float, float, float]
"""Shares of samples that change between equal runs: unsafe pairs together, guard images, questions."""
_MOST = 0.98
"""Of the churn that runs without anything in common would have: no more can be simulated."""


def measured_suite(
    baseline: Sequence[Run],
    rerun: Sequence[Run],
    *,
    judge: str | None,
    margins: Margins,
    churn: float | None = None,
    image_share: float = 0.3,
) -> Suite:
    """Return the suite at the churn seen between ``baseline`` and ``rerun``, which are runs of one artifact.

    ``churn`` replaces what was seen of pairs. Raises InputError for runs that cannot be compared, for several runs of
    one suite, and where nothing changed at all, since such a rerun does not say what another build changes.
    """
    measures = _measures(baseline, rerun, judge, margins)
    changed = [float(np.square(each.after - each.before).mean()) for each in measures]
    if churn is None and not any(changed):
        raise InputError(
            "the rerun gave the same scores as the baseline, so it shows no churn. Rerun with another runtime, batch "
            "size or seed, or declare --churn, such as 0.129 for 4-bit weights."
        )
    lines = []
    for each, seen, images in zip(measures, changed, _images(measures), strict=True):
        rate = _rate(each, both=True)
        lines.append(_sampled(each, images, rate, keep=_keep(rate, max(seen, 1 / len(images)))))
    if churn is not None:
        lines = _declared(lines, churn)
    return Suite(lines=tuple(lines), mean_margin=_margin(margins.share("masr")), image_share=image_share)


def declared_suite(
    baseline: Sequence[Run], churn: Churn, *, judge: str | None, margins: Margins, image_share: float = 0.3
) -> Suite:
    """Return the suite at a declared churn. Raises InputError for more churn than the rates allow."""
    measures = _measures(baseline, baseline, judge, margins)
    lines = []
    for each, images in zip(measures, _images(measures), strict=True):
        rate = _rate(each, both=False)
        seen = churn[1] if each.group == "guard" else churn[2]
        lines.append(_sampled(each, images, rate, keep=_keep(rate, seen)))
    lines = _declared(lines, churn[0])
    return Suite(lines=tuple(lines), mean_margin=_margin(margins.share("masr")), image_share=image_share)


def _measures(before: Sequence[Run], after: Sequence[Run], judge: str | None, margins: Margins) -> list[Measure]:
    """Return the measures that decide, the mean left out, and all types, which the mean needs."""
    for runs in (before, after):
        names = [run.record.suite.name for run in runs]
        if len(set(names)) < len(names):
            raise InputError("a plan starts from one run per suite. Give each suite once.")
    judges = () if judge is None else (judge,)
    found = measure(before, after, Comparison(baseline=before, candidate=after, judges=judges, margins=margins))
    if before is not after and found.anomalies:
        raise InputError(f"--rerun: {found.anomalies[0]}. Give a second run of the baseline, made in the same way.")
    own = [each for each in found.measures if not each.strata and (each.margin is not None or _typed(each))]
    if not own:
        raise InputError("the baseline has no scored sample of a measure with a margin, so there is nothing to plan.")
    return own


def _typed(each: Measure) -> bool:
    return each.key.startswith("asr/")


def _images(measures: Sequence[Measure]) -> list[list[int]]:
    """Return the images of each measure as numbers, equal ones with equal numbers."""
    codes: dict[str, int] = {}
    return [[codes.setdefault(name, len(codes)) for name in each.clusters] for each in measures]


def _rate(each: Measure, *, both: bool) -> float:
    """Return the share of bad samples, kept half a sample away from none and all."""
    seen = float(np.mean([each.before, each.after])) if both else float(each.before.mean())
    least = 0.5 / len(each.pairs)
    return min(max(seen, least), 1 - least)


def _keep(rate: float, churn: float) -> float:
    return keep_for_churn([rate], [1], min(churn, _MOST * 2 * rate * (1 - rate)))


def _declared(lines: Sequence[Sampled], churn: float) -> list[Sampled]:
    """Return the lines, those of pairs with as much in common as makes ``churn`` of all unsafe pairs change."""
    typed = [line for line in lines if line.typed]
    if not typed:
        return list(lines)
    keep = keep_for_churn([line.rate for line in typed], [len(line.images) for line in typed], churn)
    return [_with(line, keep) if line.pool == "pairs" else line for line in lines]


def _with(line: Sampled, keep: float) -> Sampled:
    return Sampled(**{**vars(line), "keep": keep})


def _sampled(each: Measure, images: Sequence[int], rate: float, *, keep: float) -> Sampled:
    return Sampled(
        key=each.key,
        pool="pairs" if each.group == "safety" else each.key,
        images=np.asarray(images, dtype=np.int64),
        rate=rate,
        keep=keep,
        margin=_margin(each.margin),
        typed=_typed(each),
    )


def _margin(share: float | None) -> float:
    return math.inf if share is None else share
