"""Answers to samples, kept for a run that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from calibration.answers import Answer
from calibration.sets.conversations import Sample
from calibration.sets.samples import CalibrationOptions, answers_of
from quantize.methods.settings import Progress, RunOptions
from quantize.streamed.unfinished import ANSWERS, Unfinished
from safevlm.checkpoint.checkpoint import Checkpoint

__all__ = ["kept_answers", "whose"]


def kept_answers(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    calibration: CalibrationOptions,
    options: RunOptions,
    max_memory: int,
    unfinished: Unfinished,
    progress: Progress,
) -> list[Answer | None]:
    """Return one answer a sample, or ``None``; found once, however often a run ends and goes on."""
    kept = unfinished.kept(ANSWERS)
    if kept is not None:
        return [None if each is None else Answer(text=each["text"], ids=_ids(each["ids"])) for each in kept]
    answers = answers_of(
        checkpoint,
        samples,
        calibration,
        max_memory=max_memory,
        dtype=options.dtype,
        device=options.device,
        say=progress.say,
        report=progress.status,
    )
    unfinished.keep(ANSWERS, [None if answer is None else asdict(answer) for answer in answers])
    return answers


def whose(answers: Sequence[Answer | None]) -> str:
    """Return whose answers they are, in words."""
    return "the 16-bit model's own" if any(each is not None and each.ids for each in answers) else "given"


def _ids(stored: list[int] | None) -> tuple[int, ...] | None:
    return None if stored is None else tuple(stored)
