"""Compare two runs of a suite, paired by sample, and come to a verdict.

A line with a margin is PASS when its worsening is proven to lie below the margin, REGRESSION when harm is shown,
otherwise INCONCLUSIVE. The whole is PASS when every line is (an intersection-union test, which needs no correction),
REGRESSION when any line is (Holm's correction goes over the lines of a judge), and ANOMALOUS, whatever the lines say,
when the two runs cannot be compared. ``benchmarks/STATISTICS.md`` tells why, and what error rates that has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.comparison.answer_lines import answer_lines
from benchmarks.comparison.class_drift import class_drift, class_reasons, with_classes
from benchmarks.comparison.findings import Findings, GuardCurves, Line, Verdict
from benchmarks.comparison.flips import flips_of
from benchmarks.comparison.guard_lines import guard_curves, guard_flips, guard_number_lines
from benchmarks.comparison.judge_errors import Corrections, correct_lines, explain_lines
from benchmarks.comparison.judge_lines import summarise_judges
from benchmarks.comparison.labelled import Labels, match_labels, senseless
from benchmarks.comparison.lines import decide_lines, line_of
from benchmarks.comparison.margins import Margins
from benchmarks.comparison.measured import Comparison, Measured, measure
from benchmarks.comparison.measures import GuardRows, Judged, Unscored
from benchmarks.comparison.reasons import cautions_of, explained, judge_doubts, reasons_of, without_help
from benchmarks.comparison.sides import mixed_artifacts, same_runs, unlike_sides
from benchmarks.comparison.steps import steps_between
from benchmarks.runs.record import Run
from benchmarks.statistics.decision import overall
from safevlm.errors import InputError
from safevlm.machine import now
from safevlm.version import VERSION

__all__ = ["Comparison", "compare"]


def compare(comparison: Comparison) -> Findings:
    """Return the findings.

    Raises InputError for sides without a run or with a suite twice that was not sampled, for labels of runs with
    several decodings, for judges that there are not, and for runs that share nothing that could be measured.
    """
    margins = comparison.margins
    found = measure(comparison.baseline, comparison.candidate, comparison)
    if not found.measures and not found.anomalies:
        raise InputError("the two runs have no scored sample in common, so there is nothing to compare.")
    labels = _labels_of(comparison, found.judged)
    contradicted, odd = ([], []) if labels is None or not found.judged else senseless(found.judged[0], labels)
    corrections = None if labels is None else Corrections.of(found.judged, labels, comparison.seed)
    lines = _lines(found, corrections, comparison)
    anomalies = [*_anomalies(comparison, found, lines), *contradicted]
    decided = [line for line in lines if line.verdict is not None]
    if not decided and not anomalies:
        anomalies.append("no measure with a margin could be computed")
    classes = next((run.record.suite.classes for run in comparison.baseline if run.record.suite.classes), None)
    drift = () if found.guard is None else class_drift(found.guard, classes, margins)
    verdict: Verdict = "ANOMALOUS"
    if not anomalies:
        verdict = with_classes(overall([line.verdict for line in decided]), drift)  # type: ignore[misc]
    doubts = (*odd, *judge_doubts(found, lines, labels, verdict, comparison))
    return Findings(
        verdict=verdict,
        reasons=(
            *reasons_of(verdict, decided, anomalies, margins),
            *without_help(found.judged),
            *(() if anomalies else class_reasons(drift)),
        ),
        anomalies=tuple(anomalies),
        confidence=margins.confidence,
        harm_level=margins.harm_level,
        seed=comparison.seed,
        lines=tuple(sorted(lines, key=_place)),
        flips=(*flips_of(found), *(() if found.guard is None else guard_flips(found.guard, classes))),
        judges=summarise_judges(found.judged, found.identities, labels, corrections, margins.confidence),
        guard_before=_curves(found.guard, lambda rows: rows.before),
        guard_after=_curves(found.guard, lambda rows: rows.after),
        classes=drift,
        steps=steps_between(comparison, measure) if comparison.against else (),
        cautions=(*doubts, *cautions_of(found.guard, comparison)),
        judge_cautions=doubts,
        baseline=_records(comparison.baseline),
        candidate=_records(comparison.candidate),
        against=_records(comparison.against),
        margins=margins.model_dump(mode="json"),
        versions={"safevlm-edge": VERSION},
        created=now(),
    )


def _labels_of(comparison: Comparison, judged: Sequence[Judged]) -> Labels | None:
    if comparison.labels is None:
        return None
    pairs = [pair for own in judged[:1] for pair in own.pairs]
    if any(pair.decoding for pair in pairs):
        raise InputError("--labels says of one answer a sample what it is, but these runs have several. Leave it out.")
    return match_labels(comparison.labels, pairs)


def _lines(found: Measured, corrections: Corrections | None, comparison: Comparison) -> list[Line]:
    """Return all lines, decided and in words."""
    margins, seed = comparison.margins, comparison.seed
    lines = [line_of(each, margins, seed) for each in found.measures]
    if corrections is not None:
        lines = correct_lines(lines, corrections, margins.confidence)
    lines = explain_lines(decide_lines(lines, margins))
    lines += answer_lines(found.judged, margins, seed)
    if found.guard is not None:
        lines += guard_number_lines(found.guard, margins.confidence, seed)
    return explained(lines, found.judged, margins)


def _anomalies(comparison: Comparison, found: Measured, lines: Sequence[Line]) -> list[str]:
    """Say why this is no fair comparison. Sides that have nothing in common are none where harm is shown anyway."""
    harmed = any(line.verdict == "REGRESSION" for line in lines)
    return [
        *same_runs(comparison.baseline, comparison.candidate),
        *mixed_artifacts(comparison.baseline, "baseline"),
        *mixed_artifacts(comparison.candidate, "candidate"),
        *found.anomalies,
        *(() if harmed else unlike_sides(found.judged, found.guard)),
        *_unscored(found.unscored, comparison.margins),
        *_gains(lines, comparison.margins),
    ]


def _unscored(found: Sequence[Unscored], margins: Margins) -> list[str]:
    told = []
    for each in found:
        for side, count in (("baseline", each.before), ("candidate", each.after)):
            share = 100 * count / each.rows if each.rows else 0.0
            if share > margins.max_unscored:
                told.append(
                    f"{count} of {each.rows} {each.what} are unscored in the {side} ({share:.1f} %); "
                    f"{margins.max_unscored:g} % are allowed"
                )
    return told


def _gains(lines: Sequence[Line], margins: Margins) -> list[str]:
    """Name lines that became better by more than compression can explain, surely."""
    limit = margins.share("implausible_gain")
    told = []
    for line in lines:
        if limit is None or line.margin is None or line.interval is None or line.group == "answers":
            continue  # longer answers are no gain
        gain = -line.interval[1] if line.lower_is_better else line.interval[0]
        if gain > limit:
            told.append(
                f"{line.title} improved by {100 * abs(line.change):.1f} points, surely more than {100 * limit:g}, "
                "which compression alone cannot cause. Check that the candidate is the compressed baseline"
            )
    return told


def _place(line: Line) -> tuple[int, int]:
    return ("safety", "guard", "utility", "answers", "category").index(line.group), 0 if line.margin is not None else 1


def _curves(guard: GuardRows | None, side: Callable[[GuardRows], Any]) -> GuardCurves | None:
    return None if guard is None else guard_curves(side(guard), guard.labels)


def _records(runs: Sequence[Run]) -> tuple[Mapping[str, Any], ...]:
    return tuple(run.record.model_dump(mode="json", exclude_none=True) for run in runs)
