"""The exact guard on llama.cpp, compared with the checkpoint's on torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from export.gguf.quantizing import PLAIN_TYPES
from quantize.streamed.drift import exact_probs
from runtimes.language.gguf_artifact import open_gguf
from runtimes.language.llamacpp_language import LlamaCppLanguageRunner
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.contract.manifest import Parity
from safevlm.errors import CheckpointError, ParityError

__all__ = ["check_finite", "guard_parity"]

PROBABILITY_TOLERANCE = {"f32": 0.02, "f16": 0.02, "bf16": 0.08}
"""By the coarser of the two files: bfloat16 has three bits less than float16, also for activations."""


def check_finite(numbers: npt.NDArray[np.float32], what: str, where: str, remedy: str) -> None:
    """Check what a runtime computed of finite weights.

    Raises:
        CheckpointError: for NaN and infinity: numbers on the way outgrew the runtime's number format.
    """
    if not np.isfinite(numbers).all():
        raise CheckpointError(
            f"{what} gives NaN or infinity on {where}, because the model's values exceed its number format. "
            f"To continue, {remedy}."
        )


def guard_parity(
    checkpoint: Checkpoint, folder: Path, rgb: npt.NDArray[np.uint8], max_memory: int, report: Callable[[str], None]
) -> Parity:
    """Ask the exact guard of the files and of the checkpoint about images, N × H × W × 3.

    Raises:
        ParityError: where they differ by more than a model of 16 bits and more may.
        CheckpointError: for numbers that are not finite.
    """
    artifact = open_gguf(folder, verify=False)
    size, kind = artifact.manifest.preprocessing, artifact.manifest.file("model").type
    tolerance = max(PROBABILITY_TOLERANCE.get(each, 0.0) for each in (kind, artifact.manifest.file("mmproj").type))
    grid = checkpoint.family.fixed_grid(size.height, size.width)
    wanted = exact_probs(checkpoint, torch.from_numpy(rgb), grid=grid, max_bytes=max_memory, report=report).numpy()
    check_finite(wanted, f"{checkpoint.name}: the exact guard", "torch", "use another checkpoint")
    rows = []
    with LlamaCppLanguageRunner(artifact, context=artifact.manifest.image_tokens + 512) as runner:
        for number, picture in enumerate(rgb):
            report(f"llama.cpp's guard, image {number + 1} of {len(rgb)}")
            row = runner.prefill(picture, "").exact_probs
            assert row is not None  # the exact head is in every folder
            rows.append(row)
    found = np.stack(rows)
    check_finite(found, f"{checkpoint.name}: the exact guard", "llama.cpp", f"use --type bf16 or f32, not {kind}")
    off = float(np.abs(found - wanted).max())
    flips = int((found.argmax(-1) != wanted.argmax(-1)).sum())
    if kind in PLAIN_TYPES and not off <= tolerance:
        raise ParityError(
            f"{checkpoint.name}: the exact guard's probabilities differ by {off:.3f} on llama.cpp at {kind}; "
            f"{tolerance} is allowed. This is a bug of the export or of this llama.cpp. Please report it."
        )
    return Parity(
        images=len(rgb), max_abs_prob_delta=off, label_flips=flips, reference=f"{checkpoint.name} on torch, float32"
    )
