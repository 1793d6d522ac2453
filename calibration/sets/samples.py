"""The samples of one run: where they come from, which are chosen, what they must keep clear of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from calibration.answers import Answer, own_answers, whole_model_bytes
from calibration.sets.beginnings import Beginnings
from calibration.sets.conversations import Conversations, Sample, built_in_conversations, read_conversations
from calibration.sets.leakage import Leakage, built_in_evaluation, find_leaks, read_evaluation
from calibration.sets.mix import Mix, choose
from calibration.streaming.batches import TokenWeights
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.hub import TINY_CHECKPOINTS
from safevlm.errors import InputError
from safevlm.files.storage import shown_bytes
from safevlm.network.device import gpu_room, torch_device

__all__ = ["Answers", "Calibration", "CalibrationOptions", "answers_of", "calibrate_on"]

ANSWERING = 1200 * 2**20
"""Bytes that answering takes beside weights and cache: interpreter, libraries, activations."""
ANSWERING_ON_GPU = 1536 * 2**20
"""The same of a GPU: activations of a batch, the libraries' workspaces, what the allocator cannot use."""
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
    beginnings: Beginnings = field(default_factory=Beginnings)
    grid: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The chosen samples, their source, and what the leakage check found."""

    source: Conversations
    samples: tuple[Sample, ...]
    leakage: Leakage


def calibrate_on(checkpoint: Checkpoint, options: CalibrationOptions, status: Callable[[str], None]) -> Calibration:
    """Choose samples and look for them in evaluation suites.

    Raises InputError for a bad file, too few samples, and a leak that is not allowed.
    """
    if options.file is not None:
        source = read_conversations(options.file, options.images)
    elif checkpoint.name in TINY_CHECKPOINTS:
        source = built_in_conversations()
    else:
        raise InputError(
            f"{checkpoint.name}: --calibration is missing. Give a JSONL file of conversations: unsafe pairs, safe "
            "pairs and plain text like those that the model will meet. docs/reference/file-formats.md shows the rows."
        )
    samples = choose(source, options.mix)
    status("searching the evaluation suites for the samples")
    suites = [built_in_evaluation(), *(read_evaluation(path) for path in options.keep_out)]
    leakage = find_leaks(samples, suites, report=status)
    if not leakage.clean and not options.allow_leakage:
        raise InputError(leakage.refusal())
    return Calibration(source=source, samples=samples, leakage=leakage)


def answers_of(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    options: CalibrationOptions,
    *,
    max_memory: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = lambda _: None,
    report: Callable[[str], None] = lambda _: None,
) -> list[Answer | None]:
    """Return one answer a sample, or ``None``: the model's own where it fits into memory, as asked for.

    Memory is ``max_memory`` bytes, or what is free on a GPU. ``say`` is called when the model does not fit. Raises
    InputError when its own answers are asked for and it does not fit.
    """
    device = torch_device(device)
    free = gpu_room(device)
    size, room = whole_model_bytes(checkpoint, dtype), max_memory if free is None else free
    fits = size + (ANSWERING if free is None else ANSWERING_ON_GPU) <= room
    if options.answers == "own" and not fits:
        where = "--max-memory" if free is None else "the free memory of the GPU"
        raise InputError(
            f"--answers own: the model takes {shown_bytes(size)} in {str(dtype).removeprefix('torch.')} and "
            f"exceeds {where} ({shown_bytes(room)}). Give more memory or --dtype bfloat16; or put answers "
            "into the file and give --answers given."
        )
    if options.answers == "own" or (options.answers == "auto" and fits):
        return list(
            own_answers(
                checkpoint,
                samples,
                grid=options.grid,
                max_new_tokens=options.max_new_tokens,
                dtype=dtype,
                device=device,
                report=report,
            )
        )
    given = [None if options.answers == "none" or each.answer is None else Answer(text=each.answer) for each in samples]
    if options.answers == "auto":
        say(
            f"the 16-bit model ({shown_bytes(size)}) does not fit into {shown_bytes(room)} of "
            f"{'memory' if free is None else 'free GPU memory'}, so it cannot answer the samples: "
            f"{sum(answer is not None for answer in given)} of {len(given)} have an answer in the file, and "
            "the others stay without one. To have them answered on a larger machine: python -m calibration.answers"
        )
    return given
