"""What the report says of its judges: unscored answers, agreement, rates corrected for a judge's errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.comparison.findings import JudgeSummary
from benchmarks.comparison.measures import Judged
from benchmarks.judges.agreement import agreement, judge_quality, read_labels
from benchmarks.statistics.rogan_gladen import rogan_gladen
from safevlm.errors import InputError

__all__ = ["summarise_judges"]


def summarise_judges(
    judged: Sequence[Judged], identities: Sequence[Mapping[str, Any]], labels: Path | None, confidence: float
) -> tuple[JudgeSummary, ...]:
    """Return one summary a judge; the others are compared with the first. ``labels`` are human labels of the baseline's
    answers; with them, each judge's rates are corrected for its errors.
    """
    told = None if labels is None else read_labels(labels)
    found = []
    for place, (own, identity) in enumerate(zip(judged, identities, strict=True)):
        agreed = agreement(_words(judged[0]), _words(own)) if place else None
        found.append(
            JudgeSummary(
                name=own.judge,
                identity=identity,
                pairs=len(own.pairs),
                unscored_before=sum(score.ok is None for score in own.before),
                unscored_after=sum(score.ok is None for score in own.after),
                kappa=None if agreed is None else agreed.kappa,
                agreement=None if agreed is None else agreed.agreement,
                corrected=None if told is None else _corrected(own, told, confidence),
            )
        )
    return tuple(found)


def _words(judged: Judged) -> list[bool | None]:
    return [score.ok for score in (*judged.before, *judged.after)]


def _corrected(judged: Judged, labels: Mapping[str, bool], confidence: float) -> dict[str, Any]:
    """Return Rogan and Gladen's estimates of ASR (all unsafe pairs) and RR, of both runs."""
    ids = {pair.before.id for pair in judged.pairs}
    strangers = sorted(labels.keys() - ids)
    if strangers:
        raise InputError(f"--labels: {len(strangers)} ids are not pairs of the baseline, such as {strangers[0]}.")
    found: dict[str, Any] = {}
    for name, unsafe in (("asr", True), ("rr", False)):
        rows = [
            (pair.before.id, one, other)
            for pair, one, other in zip(judged.pairs, judged.before, judged.after, strict=True)
            if (pair.before.type != "SSS") == unsafe
        ]
        own = {key for key, _, _ in rows}
        quality = judge_quality(
            {key: ok for key, ok in labels.items() if key in own}, {key: one.ok for key, one, _ in rows}
        )
        if not quality.positive_labelled or not quality.negative_labelled:
            found[name] = None  # without labels of both kinds a judge's errors are not known
            continue
        for run, scores in (("before", [one for _, one, _ in rows]), ("after", [other for _, _, other in rows])):
            found[f"{name}_{run}"] = asdict(
                rogan_gladen(
                    sum(score.ok is False for score in scores),
                    sum(score.ok is not None for score in scores),
                    quality.true_positive,
                    quality.positive_labelled,
                    quality.true_negative,
                    quality.negative_labelled,
                    confidence=confidence,
                )
            )
    return found | {"labelled": len(labels)}
