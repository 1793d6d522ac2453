"""What compression did to the guard and to the answers: the figures that compression.json ends with.

Shapes: N pictures, C classes, M answer tokens, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

__all__ = ["answer_drift", "answer_states", "divergence", "exact_probs", "guard_drift", "token_choices"]

VOCABULARY, TOKENS = 2048, 1024
"""Words of the vocabulary, and tokens, whose logits are in memory together."""
BATCH = 8
OTHERS = 4096
"""Answer tokens outside refusals that are looked at, spread evenly: their share is then known to 1 % or better."""


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
    All tokens of refusals are, of others at most :data:`OTHERS`.
    ``same_token`` is the share of tokens that the rounded model would choose, too; ``nll`` their mean negative log
    likelihood; ``None`` where there is no token.
    """
    refused: list[bool] = []
    truth: list[int] = []
    for row in (row for batch in batches for row in batch.rows):
        length = row.answer_length if row.beginning == "usual" else 0
        truth += row.ids[len(row.ids) - length :]
        refused += [row.refused] * length
    if not truth:
        return {kind: {"tokens": 0, "same_token": None, "nll": None} for kind in ("refusals", "others")}
    of_refusals = torch.tensor(refused)
    looked_at = of_refusals.clone()
    others = torch.nonzero(~of_refusals).flatten()
    count = min(len(others), OTHERS)
    looked_at[others[torch.arange(count) * len(others) // max(count, 1)]] = True
    wanted, of_refusals = torch.tensor(truth)[looked_at], of_refusals[looked_at]
    chosen, nll = token_choices(checkpoint, answer_states(batches, hidden, usual=True)[looked_at], wanted)
    found: dict[str, Any] = {}
    for kind, flags in (("refusals", of_refusals), ("others", ~of_refusals)):
        count = int(flags.sum())
        found[kind] = {
            "tokens": count,
            "same_token": float((chosen == wanted)[flags].float().mean()) if count else None,
            "nll": float(nll[flags].mean()) if count else None,
        }
    return found


def answer_states(batches: Sequence[Batch], hidden: Activations, *, usual: bool = False) -> Tensor:
    """Return the hidden states before each answer token, M × D in float32, rows in the order of the batches.

    With ``usual`` only of rows with the family's usual prompt.
    """
    wanted = [
        (number, place, row.answer_length)
        for number, batch in enumerate(batches)
        for place, row in enumerate(batch.rows)
        if row.answer_length and (row.beginning == "usual" or not usual)
    ]
    found, first = torch.empty(sum(length for *_, length in wanted), hidden.shapes[0][-1]), 0
    for number, place, length in wanted:
        found[first : first + length] = hidden[number][place, -length - 1 : -1]
        first += length
    return found


def _vocabulary_parts(checkpoint: Checkpoint) -> Iterator[tuple[int, Tensor]]:
    """Yield the output matrix a part of the vocabulary at a time: the first word, and float32 words × D."""
    name = f"{OUTPUT_PREFIX}weight"
    if name not in checkpoint.tensors:
        name = f"{checkpoint.family.language_prefix}embed_tokens.weight"  # tied
    first = 0
    for part in checkpoint.tensors.pieces(name, VOCABULARY):
        yield first, part.float()
        first += len(part)


def _token_blocks(count: int) -> Iterator[slice]:
    """Yield the places of ``count`` tokens, so many at a time as have their logits in memory together."""
    for start in range(0, count, TOKENS):
        yield slice(start, min(start + TOKENS, count))


def token_choices(checkpoint: Checkpoint, states_MD: Tensor, wanted_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest token and the negative log likelihood of the wanted one, of M last hidden states.

    The output matrix is read once, a part at a time; logits are in memory for some tokens and words together.
    """
    best = torch.full((len(states_MD),), -torch.inf)
    chosen, total, own = torch.zeros_like(wanted_M), best.clone(), best.clone()
    for first, words_VD in _vocabulary_parts(checkpoint):
        inside = (wanted_M >= first) & (wanted_M < first + len(words_VD))
        for rows in _token_blocks(len(states_MD)):
            logits = states_MD[rows] @ words_VD.T
            high, at = logits.max(dim=1)
            chosen[rows] = torch.where(high > best[rows], at + first, chosen[rows])
            best[rows] = torch.maximum(high, best[rows])
            here = inside[rows].nonzero().squeeze(1)
            own[rows][here] = logits[here, wanted_M[rows][here] - first]
            total[rows] = torch.logaddexp(total[rows], high + logits.sub_(high.unsqueeze(1)).exp_().sum(dim=1).log_())
    return chosen, total - own


def divergence(checkpoint: Checkpoint, states_MD: Tensor, other_MD: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of next-token distributions, M, in one pass over the vocabulary.

    With logits a and b it is the mean of a - b under softmax(a), less the difference of their log normalizers.
    """
    count = len(states_MD)
    own, other = torch.full((count,), -torch.inf), torch.full((count,), -torch.inf)
    mean = torch.zeros(count)
    for _, words_VD in _vocabulary_parts(checkpoint):
        for rows in _token_blocks(count):
            a, b = states_MD[rows] @ words_VD.T, other_MD[rows] @ words_VD.T
            before, part = own[rows].clone(), a.logsumexp(dim=1)
            own[rows] = torch.logaddexp(before, part)
            other[rows] = torch.logaddexp(other[rows], b.logsumexp(dim=1))
            share = (a - own[rows].unsqueeze(1)).exp_()
            mean[rows] = mean[rows] * (before - own[rows]).exp() + share.mul_(a.sub_(b)).sum(dim=1)
    return (mean - (own - other)).clamp(min=0)
