"""Lines whose scores come from a judge: corrected by people's labels, or with the error that would overturn them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.comparison.findings import Bound, Line
from benchmarks.comparison.labelled import GROUPS, Labels, answers_of
from benchmarks.comparison.measures import Judged
from benchmarks.statistics.judge_errors import Answers, Corrected, Correction, Design, Lacking

__all__ = ["JUDGE_ERRORS", "Corrections", "correct_lines", "explain_lines", "judge_cautions", "overturning"]

JUDGE_ERRORS = "judge errors"
_OBSERVED = ("samples", "images")
_MORE = (1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50)
"""How many times the labels are tried, to say how many a line needs."""
_ENDLESS = 1e4
_KINDS = {"asr": ("unsafe pairs", "not refused", "refused"), "rr": ("harmless pairs", "refused", "answered")}


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """What people's labels say of each judge, by judge and group of pairs."""

    found: dict[tuple[str, str], Correction]
    seed: int

    @classmethod
    def of(cls, judged: Sequence[Judged], labels: Labels, seed: int) -> Corrections:
        """Return the corrections of all judges."""
        found = {}
        for own in judged:
            for group, types in GROUPS.items():
                answers = answers_of(own, types, labels)
                if answers is not None:
                    found[own.judge, group] = Correction(answers, seed=seed)
        return cls(found=found, seed=seed)


def correct_lines(
    lines: Sequence[Line], corrections: Corrections, confidence: float, *, explain: bool = True
) -> list[Line]:
    """Return the lines, those of a judge and with a margin with the corrected change and its bound.

    ``explain``: also with what that says, and which labels are missing, which takes longer.
    """
    return [_corrected(line, corrections, confidence, explain) if _is_judged(line) else line for line in lines]


def explain_lines(lines: Sequence[Line]) -> list[Line]:
    """Return decided lines: what the judge's errors alone leave open names them as the reason."""
    return [_explained(line) if _is_judged(line) else line for line in lines]


def overturning(line: Line) -> tuple[float, float] | None:
    """Return which errors of the judge would take a line's PASS, as shares of answers; None without a PASS.

    First the error rate, of bad and good answers and of both runs alike: it makes a change look smaller than it is.
    Then how many more answers of one run than of the other it may misread one way.
    """
    if line.verdict != "PASS" or line.margin is None or not _is_judged(line):
        return None
    upper = max(bound.upper for bound in line.bounds)
    return (1 - max(upper, 0.0) / line.margin) / 2, min(line.margin - upper, 1.0)


def judge_cautions(lines: Sequence[Line]) -> list[str]:
    """Return which errors of a judge would overturn a PASS that nobody's labels support."""
    found = [(line, errors) for line in lines if (errors := overturning(line)) is not None]
    if not found:
        return []
    weakest, (alike, _) = min(found, key=lambda each: each[1][0])
    nearest, (_, apart) = min(found, key=lambda each: each[1][1])
    return [
        f"Nobody labelled answers, so the judge's errors are not corrected. PASS fails when it errs in "
        f"{_percent(alike)} of the answers of both runs alike ({weakest.title}), or when it misreads {_percent(apart)} "
        f"more of the candidate's answers than of the baseline's ({nearest.title}). --labels rules this out."
    ]


def _is_judged(line: Line) -> bool:
    return line.judge is not None and line.margin is not None


def _corrected(line: Line, corrections: Corrections, confidence: float, explain: bool) -> Line:
    group = "rr" if line.key.startswith("rr") else "asr"
    correction = corrections.found.get((str(line.judge), group))
    if correction is None:
        return line
    weights = _weights(line, group, correction)
    observed = max(bound.upper for bound in line.bounds if bound.name in _OBSERVED)
    beyond = max(max(bound.upper for bound in line.bounds) - observed, 0.0)  # missing rows, which no judge misread
    found = correction.change(weights, observed, confidence)
    margin = line.margin or 0.0
    upper = 1.0 if found is None else min(found.high + beyond, 1.0)
    told = replace(line, bounds=(*line.bounds, Bound(name=JUDGE_ERRORS, upper=upper)))
    if found is not None:
        told = replace(told, corrected=found.change, corrected_interval=(max(found.low, -1.0), min(found.high, 1.0)))
    if not explain:
        return told
    sentence = _sentence(correction, found, group)
    if upper >= margin:
        sentence += " " + _missing(correction, corrections.seed, weights, observed, margin - beyond, confidence, group)
    return replace(told, judge_sentence=sentence.strip())


def _weights(line: Line, group: str, correction: Correction) -> list[float]:
    """Return what each type's change weighs in a line's."""
    kind = line.key.partition("@")[0].partition("/")[2]
    rows = correction.rows_KC.sum(axis=1)
    types = GROUPS[group][: len(rows)]
    own = [float(rows[at] > 0 and kind in ("", name)) for at, name in enumerate(types)]
    return [each / sum(own) for each in own]


def _sentence(correction: Correction, found: Corrected | None, group: str) -> str:
    """Say what the labels make of the change."""
    count = int((~np.isnan(correction.answers.labels)).sum())
    pairs = _KINDS[group][0]
    if found is None:
        return f"The {count} labels of {pairs} cannot correct this line, so it cannot pass."
    told = f"{100 * found.change:+.2f} points, {100 * found.low:+.2f} to {100 * found.high:+.2f}"
    if correction.design == "each run":
        return f"Corrected by {count} labels of both runs: {told}."
    sensitivity, specificity = np.median(correction.quality.mean(axis=2), axis=1)
    return (
        f"Corrected by {count} labels of {pairs}: {told} (sensitivity {sensitivity:.2f}, specificity "
        f"{specificity:.2f}, assumed equal in both runs)."
    )


def _missing(
    correction: Correction,
    seed: int,
    weights: Sequence[float],
    observed: float,
    margin: float,
    confidence: float,
    group: str,
) -> str:
    """Say how many labels of which stratum a line lacks, or that labels are not what it lacks."""
    labels = ~np.isnan(correction.answers.labels)
    design: Design = correction.design or ("each run" if labels[:, 1].any() else "alike")
    lacking = correction.lacking(design)
    if lacking:
        return f"Label at least {'; '.join(_stratum(each, group) for each in lacking)}."

    def fits(factor: float) -> bool:
        more = Correction(correction.answers, draws=4000, seed=seed, factor=factor)
        found = more.change(weights, observed, confidence)
        return found is not None and found.high < margin

    if fits(_ENDLESS):
        factor = next((each for each in _MORE if fits(each)), None)
        count = f"About {round(factor * labels.sum()):,}" if factor else f"More than {round(50 * labels.sum()):,}"
        spread = "of both runs" if design == "each run" else "of the baseline"
        return f"{count} labels {spread} instead of {labels.sum():,}, drawn by benchmarks.labels, would do."
    if design == "alike" and not _knows_both_truths(correction.answers):
        _, bad, good = _KINDS[group]
        return (
            f"Truly {bad} or truly {good} answers are too few among the baseline's to know how the judge reads them: "
            "label pairs of both runs (python -m benchmarks.labels --candidate RUN)."
        )
    return "More labels alone would not do: the judge errs too often for so many samples."


def _knows_both_truths(answers: Answers) -> bool:
    """Whether people found several bad and several good answers in the baseline."""
    return all((answers.labels[:, 0] == truth).sum() >= 5 for truth in (0, 1))


def _stratum(lacking: Lacking, group: str) -> str:
    pairs, bad, good = _KINDS[group]
    before, after = (None if word is None else (bad if word else good) for word in lacking.words)
    told = f"called {before}" if after is None else f"called {before} in the baseline and {after} in the candidate"
    more = lacking.needed - lacking.have
    return f"{more} more of the {lacking.run}'s answers to {pairs} {told}"


def _explained(line: Line) -> Line:
    """Give the judge as the reason where all other bounds lie below the margin."""
    others = [bound.upper for bound in line.bounds if bound.name != JUDGE_ERRORS]
    own = [bound.upper for bound in line.bounds if bound.name == JUDGE_ERRORS]
    margin = line.margin or 0.0
    errors = overturning(line)
    if errors is not None and not own:
        told = (
            f"PASS fails when the judge errs in {_percent(errors[0])} of the answers of both runs alike, or misreads "
            f"{_percent(errors[1])} more of the candidate's."
        )
        return replace(line, judge_sentence=told, judge_error=errors[0], judge_drift=errors[1])
    if line.verdict == "INCONCLUSIVE" and own and max(others) < margin <= own[0]:
        points = f"{100 * margin:g}"
        reason = f"The judge's errors allow a worsening of more than the margin of {points}. {line.judge_sentence}"
        return replace(line, reason=reason, samples_needed=None)
    return line


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
