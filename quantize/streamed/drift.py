"""What compression did to the guard and to the answers: the figures that compression.json ends with.

Shapes: N pictures, C classes, M answer tokens, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calibration.distilling.teacher import teach
from calibration.streaming.batches import Batch
from calibration.streaming.sequential import Activations
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.family import OUTPUT_PREFIX
from safevlm.contract.class_names import safe_index
from safevlm.network.device import torch_device
from safevlm.network.reference import build_reference_guard

__all__ = ["answer_drift", "exact_probs", "guard_drift", "token_choices"]

VOCABULARY = 4096
"""Words of the vocabulary whose logits are in memory together."""
BATCH = 8


def exact_probs(
    checkpoint: Checkpoint,
    pictures: Tensor,
    *,
    grid: tuple[int, int] | None,
    max_bytes: int | None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    report: Callable[[str], None] = lambda _: None,
) -> Tensor:
    """Return the exact guard's probabilities, N × C, of uint8 pictures; a language model is streamed."""
    batches = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    if checkpoint.tap.source == "language_model":
        return teach(
            checkpoint, batches, grid=grid, dtype=dtype, device=device, max_bytes=max_bytes, report=report
        ).probs
    device = torch_device(device)
    guard = build_reference_guard(checkpoint, grid=grid, dtype=dtype).to(device)
    with torch.no_grad():
        return torch.cat([guard(batch.to(device))[0].cpu() for batch in batches])


def guard_drift(before: Tensor, after: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Return how far the exact guard's verdicts on N pictures moved."""
    safe = safe_index(classes)
    was, now = before.argmax(dim=1), after.argmax(dim=1)
    difference = (before - after).abs()
    return {
        "n": len(before),
        "max_probability_difference": float(difference.max()),
        "mean_probability_difference": float(difference.amax(dim=1).mean()),
        "label_flips": int((was != now).sum()),
        "unsafe_to_safe": int(((was != safe) & (now == safe)).sum()),
        "safe_to_unsafe": int(((was == safe) & (now != safe)).sum()),
    }


@torch.no_grad()
def answer_drift(checkpoint: Checkpoint, batches: Sequence[Batch], hidden: Activations) -> dict[str, Any]:
    """Compare answers with what the last hidden states would say at each of their places, refusals apart.

    Looked at are rows with the family's usual prompt: behind other ones the answer need not be the 16-bit model's own.
    ``same_token`` is the share of tokens that the rounded model would choose, too; ``nll`` their mean negative log
    likelihood; ``None`` where there is no token.
    """
    states: list[Tensor] = []
    truth: list[int] = []
    refused: list[bool] = []
    for number, batch in enumerate(batches):
        for place, row in enumerate(batch.rows):
            if row.answer_length and row.beginning == "usual":
                states.append(hidden[number][place, -row.answer_length - 1 : -1].clone())
                truth += row.ids[-row.answer_length :]
                refused += [row.refused] * row.answer_length
    if not truth:
        return {kind: {"tokens": 0, "same_token": None, "nll": None} for kind in ("refusals", "others")}
    wanted = torch.tensor(truth)
    chosen, nll = token_choices(checkpoint, torch.cat(states).float(), wanted)
    found: dict[str, Any] = {}
    for kind, flags in (("refusals", torch.tensor(refused)), ("others", ~torch.tensor(refused))):
        count = int(flags.sum())
        found[kind] = {
            "tokens": count,
            "same_token": float((chosen == wanted)[flags].float().mean()) if count else None,
            "nll": float(nll[flags].mean()) if count else None,
        }
    return found


def token_choices(checkpoint: Checkpoint, states_MD: Tensor, wanted_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest token and the negative log likelihood of the wanted one, of M last hidden states.

    The output matrix is read once, and a part of the vocabulary at a time.
    """
    name = f"{OUTPUT_PREFIX}weight"
    if name not in checkpoint.tensors:
        name = f"{checkpoint.family.language_prefix}embed_tokens.weight"  # tied
    output = checkpoint.tensors.read(name, own=True)
    best = torch.full((len(states_MD),), -torch.inf)
    chosen, total, own = torch.zeros_like(wanted_M), best.clone(), best.clone()
    for start in range(0, len(output), VOCABULARY):
        logits = states_MD @ output[start : start + VOCABULARY].float().T
        high, at = logits.max(dim=1)
        chosen, best = torch.where(high > best, at + start, chosen), torch.maximum(high, best)
        total = torch.logaddexp(total, logits.logsumexp(dim=1))
        inside = (wanted_M >= start) & (wanted_M < start + logits.shape[1])
        rows = inside.nonzero().squeeze(1)
        own[rows] = logits[rows, wanted_M[rows] - start]
    return chosen, total - own
