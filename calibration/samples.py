"""The samples of one run: where they come from, which are chosen, what they must keep clear of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from calibration.batches import TokenWeights
from calibration.conversations import Conversations, Sample, built_in_conversations, read_conversations
from calibration.leakage import Leakage, built_in_evaluation, find_leaks, read_evaluation
from calibration.mix import Mix, choose
from models.checkpoint import Checkpoint
from models.errors import InputError
from models.hub import TINY_CHECKPOINTS

__all__ = ["Answers", "Calibration", "CalibrationOptions", "calibrate_on"]

Answers = Literal["auto", "own", "given", "none"]


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What is calibrated on, and what it must keep clear of.

    ``file`` ``None`` is the built-in set, for the tiny checkpoints. ``keep_out`` are evaluation suites beside the
    built-in one. ``answers`` ``auto`` lets the 16-bit model answer where it fits into memory, and takes the answers
    that are given where not. ``grid`` is the input's height and width in pixels (Qwen2.5-VL).
    """

    file: Path | None = None
    images: Path | None = None
    mix: Mix = field(default_factory=Mix)
    keep_out: tuple[Path, ...] = ()
    allow_leakage: bool = False
    answers: Answers = "auto"
    max_new_tokens: int = 64
    max_length: int | None = None
    weights: TokenWeights = field(default_factory=TokenWeights)
    grid: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The chosen samples, their source, and what the leakage check found."""

    source: Conversations
    samples: tuple[Sample, ...]
    leakage: Leakage


def calibrate_on(checkpoint: Checkpoint, options: CalibrationOptions, status: Callable[[str], None]) -> Calibration:
    """Choose samples and look for them in evaluation suites.

    Errors: InputError for a bad file, too few samples, and a leak that is not allowed.
    """
    if options.file is not None:
        source = read_conversations(options.file, options.images)
    elif checkpoint.name in TINY_CHECKPOINTS:
        source = built_in_conversations()
    else:
        raise InputError(
            f"{checkpoint.name}: which samples? Give --calibration a JSONL file of conversations with images: unsafe "
            "pairs, safe pairs and plain text like those the model will meet. README.md shows a row."
        )
    samples = choose(source, options.mix)
    status("looking for the samples in evaluation suites")
    suites = [built_in_evaluation(), *(read_evaluation(path) for path in options.keep_out)]
    leakage = find_leaks(samples, suites, report=status)
    if not leakage.clean and not options.allow_leakage:
        raise InputError(leakage.refusal())
    return Calibration(source=source, samples=samples, leakage=leakage)
