"""The exact guard's verdicts on images, its language model streamed: what a distilled head learns from.

Shapes: N images, T image tokens, D width of the language model, P pooled features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.streaming.sequential import Activations, LayerStream
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.errors import InputError
from safevlm.machine import memory_advice
from safevlm.network.device import torch_device
from safevlm.network.pooling import POOLINGS, Pooling, pool
from safevlm.network.prompt_tokens import IMAGE
from safevlm.network.safe_vlm import Prefill, SafeVLM

__all__ = ["Lesson", "check_tap", "teach", "without_embeddings"]

ADVICE = "Free it, or use --dtype bfloat16; --device cpu needs no GPU."


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """What one pass of the teacher gives: its probabilities, and what a student may look at."""

    probs: Tensor
    """N × C, float32."""
    pooled: dict[Pooling, Tensor]
    """Projector output pooled in each way, N × P, float32."""


def guard_prefix(model: SafeVLM) -> list[int]:
    """Return the prompt's token ids up to the last image token: no later token is seen by the guard."""
    ids = model.prompt_ids("")
    return ids[: len(ids) - ids[::-1].index(IMAGE)]


def check_tap(checkpoint: Checkpoint) -> None:
    """Raise InputError for a guard that taps the projector: it needs no teacher."""
    if checkpoint.tap.source != "language_model":
        raise InputError(
            f"{checkpoint.name}: its guard taps the projector ({checkpoint.tap.learned}), so it is split off exactly "
            f"and needs no distilling. Run python -m export.onnx --model {checkpoint.name} --out DIR."
        )


@torch.no_grad()
def teach(
    checkpoint: Checkpoint,
    images: Sequence[Tensor],
    *,
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    max_bytes: int | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Lesson:
    """Run the exact guard over batches of images (each uint8 B × H × W × 3 at the contract's size).

    The vision path runs once a batch, then every decoder layer once, over all batches. ``max_bytes`` bounds
    the memory of hidden states; above it they are in a temporary file.

    Raises InputError for a guard that taps the projector, which needs no teacher, and for memory that is full;
    CheckpointError.
    """
    check_tap(checkpoint)
    with memory_advice(ADVICE):
        return _teach(checkpoint, images, grid, dtype, torch_device(device), max_bytes, report)


def _teach(
    checkpoint: Checkpoint,
    images: Sequence[Tensor],
    grid: tuple[int, int] | None,
    dtype: torch.dtype,
    device: torch.device,
    max_bytes: int | None,
    report: Callable[[str], None],
) -> Lesson:
    stream = LayerStream(checkpoint, grid=grid, dtype=dtype, device=device, token_ids=guard_prefix)
    prefix = guard_prefix(stream.skeleton)
    shapes = [(len(batch), len(prefix), checkpoint.hidden_size) for batch in images]
    pooled: dict[Pooling, list[Tensor]] = {pooling: [] for pooling in POOLINGS}
    with Activations(shapes, dtype, max_bytes) as hidden:
        batches = []
        for number, batch in enumerate(images):
            report(f"vision tower, from image {sum(shape[0] for shape in shapes[:number])}")
            features = stream.skeleton.image_features(batch.to(stream.device))
            for pooling, parts in pooled.items():
                parts.append(pool(features, pooling).cpu())
            prefill = stream.skeleton.assemble([prefix] * len(batch), features, (batch.shape[1], batch.shape[2]))
            hidden[number].copy_(prefill.inputs_embeds)
            batches.append(without_embeddings(prefill))
        stream.run(batches, hidden, report=lambda layer: report(f"language model, layer {layer + 1} of {len(stream)}"))
        probs = []
        for number, prefill in enumerate(batches):
            # the features only tell how many tokens there are
            states = hidden[number].to(stream.device)
            probs.append(torch.softmax(stream.skeleton.guard_logits(prefill, states), dim=-1).cpu())
    return Lesson(probs=torch.cat(probs), pooled={pooling: torch.cat(parts) for pooling, parts in pooled.items()})


def without_embeddings(prefill: Prefill) -> Prefill:
    """Return positions and masks alone: embeddings and features are on ``meta``, their shapes remain."""
    return Prefill(
        inputs_embeds=prefill.inputs_embeds.to("meta"),
        position_ids=prefill.position_ids,
        masks=prefill.masks,
        image_mask=prefill.image_mask,
        features=prefill.features.to("meta"),
    )
