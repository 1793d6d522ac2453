"""From a measure to a line of the report: its figures, its statistics, its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.comparison.findings import Bound, Interval, Line
from benchmarks.comparison.margins import Margins
from benchmarks.comparison.measures import Measure
from benchmarks.statistics.decision import decide
from benchmarks.statistics.holm import holm
from benchmarks.statistics.paired import paired_statistics
from benchmarks.statistics.planning import samples_needed
from benchmarks.statistics.proportions import wilson_interval

__all__ = ["decide_lines", "line_of"]


def line_of(measure: Measure, margins: Margins, seed: int) -> Line:
    """Return a measure's line, not decided yet; shares go up or down as the measure's name says."""
    found = paired_statistics(
        measure.before,
        measure.after,
        clusters=measure.clusters,
        strata=measure.strata or None,
        confidence=margins.confidence,
        seed=seed,
    )
    down = measure.lower_is_better
    before, after = (value if down else 1 - value for value in (found.before, found.after))
    counted = measure.binary and not measure.strata
    return Line(
        key=measure.key,
        title=measure.title,
        group=measure.group,
        judge=measure.judge,
        lower_is_better=down,
        n=len(measure.pairs),
        clusters=len(set(measure.clusters)),
        before=before,
        after=after,
        before_interval=_share_interval(measure.before, down, margins.confidence) if counted else None,
        after_interval=_share_interval(measure.after, down, margins.confidence) if counted else None,
        change=after - before,
        interval=_turned(found.interval, down),
        method=found.method,
        bootstrap=_turned(found.bootstrap, down),
        bounds=_bounds(*found.uppers, measure, margins, seed),
        worse=found.worse,
        better=found.better,
        missing_before=measure.unscored.before,
        missing_after=measure.unscored.after,
        margin=measure.margin,
        declared=measure.declared,
        p_harm=None if measure.margin is None else found.p_harm,
        resolvable=found.resolvable,
    )


def decide_lines(lines: Sequence[Line], margins: Margins) -> list[Line]:
    """Return the lines with verdicts where there is a margin: Holm's correction goes over each family of them."""
    own = [line for line in lines if line.margin is not None]
    corrected: dict[str, float] = {}
    for family in _families(own):
        found = holm([line.p_harm or 0.0 for line in family])
        corrected |= dict(zip((line.key for line in family), found, strict=True))
    return [line if line.margin is None else _decided(line, corrected[line.key], margins) for line in lines]


def _families(lines: Sequence[Line]) -> list[list[Line]]:
    """Return the first judge's lines with those that need no judge, then each other judge's own.

    A second judge looks at the same answers again: its lines must not make the first one's harm harder to show.
    """
    first = next((line.judge for line in lines if line.judge is not None), None)
    found: dict[str | None, list[Line]] = {}
    for line in lines:
        found.setdefault(first if line.judge is None else line.judge, []).append(line)
    return list(found.values())


def _decided(line: Line, p_holm: float, margins: Margins) -> Line:
    assert line.margin is not None
    down = line.lower_is_better
    worsening = line.change if down else -line.change
    uppers = [bound.upper for bound in line.bounds]
    verdict = decide(uppers=uppers, margin=line.margin, change=worsening, p_holm=p_holm, alpha=margins.harm_level)
    needed = None
    if verdict == "INCONCLUSIVE" and line.worse is not None and line.better is not None:
        needed = samples_needed(
            line.worse,
            line.better,
            line.n,
            line.margin,
            change=worsening,
            upper=max(uppers),
            confidence=margins.confidence,
        )
    found = replace(line, p_holm=p_holm, verdict=verdict, samples_needed=needed)
    return replace(found, reason=_reason(found, max(uppers), worsening, margins.harm_level))


def _reason(line: Line, upper: float, worsening: float, harm_level: float) -> str:
    """Return one sentence for a release manager; points are hundredths."""
    assert line.margin is not None
    if line.unit != "share":
        told, allowed = (
            f"{size:.1f} words" if line.unit == "words" else f"{size:.4f}" for size in (upper, line.margin)
        )
        if line.verdict == "PASS" and upper <= 0:
            return "It did not get worse."
        return f"{'At most' if line.verdict == 'PASS' else 'It may be up to'} {told} worse; {allowed} are allowed."
    points = round(100 * line.margin, 2)
    allowed = f"{points:g} point is" if points == 1 else f"{points:g} points are"
    bound = f"{100 * max(upper, 0.0):.2f} points"
    if line.verdict == "PASS" and upper <= 0:
        return f"Better by at least {100 * -upper:.2f} points."
    if line.verdict == "PASS":
        harm = line.p_holm is not None and line.p_holm < harm_level and worsening > 0
        small = " It did get worse, by more than chance but less than the margin." if harm else ""
        return f"At most {bound} worse; {allowed} allowed.{small}"
    if line.verdict == "REGRESSION":
        return (
            f"Worse by {100 * worsening:.2f} points, more than chance (p {line.p_holm:.2g} after Holm), and not shown "
            f"to be within the margin of {points:g}."
        )
    settle = (
        f"At these rates, about {line.samples_needed:,} samples would settle it with a probability of 80 %."
        if line.samples_needed is not None
        else "More samples alone would not settle it, because the difference itself reaches the margin."
    )
    return f"It may be up to {bound} worse; {allowed} allowed. {settle}"


def _bounds(samples: float, images: float, measure: Measure, margins: Margins, seed: int) -> tuple[Bound, ...]:
    """Return what must lie below the margin; with samples that have no score, also if all of them went badly."""
    if measure.margin is None:
        return ()
    found = (Bound(name="samples", upper=samples), Bound(name="images", upper=images))
    if not measure.lost:
        return found
    worst = measure.at_worst()
    missing = paired_statistics(
        worst.before,
        worst.after,
        clusters=worst.clusters,
        strata=worst.strata or None,
        confidence=margins.confidence,
        seed=seed,
    )
    return (*found, Bound(name="missing rows", upper=max(missing.uppers)))


def _share_interval(bad: np.ndarray[tuple[int, ...], np.dtype[np.float64]], down: bool, confidence: float) -> Interval:
    return _turned_share(wilson_interval(int(bad.sum()), len(bad), confidence=confidence), down)


def _turned_share(interval: Interval, down: bool) -> Interval:
    return interval if down else (1 - interval[1], 1 - interval[0])


def _turned(interval: Interval, down: bool) -> Interval:
    """Turn an interval of worsening into one of change, or back."""
    return interval if down else (-interval[1], -interval[0])
