"""A third run between two others tells how much of the change is whose: compression, engine, preprocessing, noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.comparison.findings import Step
from benchmarks.comparison.measures import Measure
from benchmarks.comparison.pairing import changed_part
from benchmarks.runs.record import Run
from safevlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.comparison.measured import Comparison, Measured

__all__ = ["steps_between"]

FREE = ("preprocessing",)


def steps_between(comparison: Comparison, measure: Callable[..., Measured]) -> tuple[Step, ...]:
    """Return the way from baseline to the third run and on to the candidate, step by step.

    Raises InputError when the third run cannot be compared, preprocessing apart.
    """
    return tuple(
        _step(one, other, measure(one, other, comparison, free=FREE))
        for one, other in ((comparison.baseline, comparison.against), (comparison.against, comparison.candidate))
    )


def _step(before: Sequence[Run], after: Sequence[Run], measured: Measured) -> Step:
    if measured.anomalies:
        raise InputError(f"the run of --against cannot be compared: {measured.anomalies[0]}.")
    first = before[0].record
    twin = next(run.record for run in after if run.record.suite.name == first.suite.name)
    own = [each for each in measured.measures if each.margin is not None]
    return Step(
        title=changed_part(first, twin),
        before=_named(first.artifact.name, first.runtime.name),
        after=_named(twin.artifact.name, twin.runtime.name),
        changes={each.key: _change(each) for each in own},
        flips={
            each.key: (int((each.after > each.before).sum()), int((each.after < each.before).sum())) for each in own
        },
    )


def _change(measure: Measure) -> float:
    """Return after - before of the measure itself, the mean over strata's means where it has strata."""
    worsening = measure.after - measure.before
    groups = np.array(measure.strata or ("",) * len(worsening))
    change = float(np.mean([worsening[groups == name].mean() for name in np.unique(groups)]))
    return change if measure.lower_is_better else -change


def _named(artifact: str, runtime: str) -> str:
    return f"{artifact} ({runtime})"
