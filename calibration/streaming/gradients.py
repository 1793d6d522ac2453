"""What each token counts by the answer's loss: one backward pass through the 16-bit layers, streamed.

A token at which the loss reacts to a block's error counts more in the second moments of that block. It is the squared
norm of the loss's gradient there (Fisher), of the block's input and its output, as VLMQ (arXiv 2508.03351) and TLQ
(arXiv 2602.07899) weigh tokens.

Shapes: B rows a batch, L positions, T = B · L tokens, D width of the language model, M tokens that the loss is of, V
words of the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from calibration.streaming.batches import Batch
from calibration.streaming.sequential import Activations, LayerStream
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.family import OUTPUT_PREFIX
from safevlm.errors import InputError
from safevlm.network.prompt_tokens import IMAGE

__all__ = ["gradient_weights", "loss_gradient"]

VOCABULARY = 4096
"""Words of the vocabulary whose logits are in memory together."""
UNIFORM = 0.1
"""Of a token's weight, that is the same for all."""


def gradient_weights(
    stream: LayerStream,
    batches: Sequence[Batch],
    embeddings: Activations,
    fixed: Sequence[Tensor],
    *,
    max_bytes: int,
    folder: Path,
    report: Callable[[str], None] = lambda _: None,
) -> list[list[Tensor]]:
    """Return each layer's weights of each batch's tokens, T float32: the ``fixed`` ones, shifted within each row.

    Within a row, its text and its image keep the sums that they have in ``fixed``; the first token keeps its weight.
    The 16-bit hidden states of all layers are kept for it, in memory up to ``max_bytes``, else in files in ``folder``.

    Raises InputError for a gradient that is not finite, with the layer.
    """
    with contextlib.ExitStack() as stack:
        states = list(_all_states(stream, batches, embeddings, max_bytes, folder, stack, report))
        gradients = states[-1]  # in place of the last states, which are not needed any more
        for number, batch in enumerate(batches):
            gradients[number].copy_(_at_the_end(stream, batch, gradients[number]))
        found: list[list[Tensor]] = []
        for index in reversed(range(len(stream))):
            report(f"token weights by gradient, layer {index + 1} of {len(stream)}")
            layer = stream.load_layer(index).requires_grad_(False)
            weights = []
            for number, batch in enumerate(batches):
                inputs = states[index][number].detach().to(stream.device).requires_grad_()
                with torch.enable_grad():
                    outputs = stream.run_layer(index, layer, batch.prefill, inputs)
                after = gradients[number].to(outputs)
                (gradient,) = torch.autograd.grad(outputs, inputs, after)
                if not bool(torch.isfinite(gradient.sum())):
                    raise InputError(
                        f"layer {index}: the gradient of the answers' loss holds NaN or infinity. Use --token-weights "
                        "fixed."
                    )
                fisher = [each.float().square().sum(dim=-1) for each in (after, gradient)]
                weights.append(_shifted(batch, fixed[number], fisher))
                gradients[number].copy_(gradient)
            found.append(weights)
            del layer
        return found[::-1]


def _all_states(
    stream: LayerStream,
    batches: Sequence[Batch],
    embeddings: Activations,
    max_bytes: int,
    folder: Path,
    stack: contextlib.ExitStack,
    report: Callable[[str], None],
) -> Iterator[Activations]:
    """Yield what every layer reads, and last what the last one gives."""
    before = embeddings
    yield before
    for index, layer in stream.layers():
        report(f"16-bit hidden states, layer {index + 1} of {len(stream)}")
        after = stack.enter_context(Activations(before.shapes, before.dtype, max(0, max_bytes), folder))
        max_bytes -= 0 if after.on_disk else after.nbytes
        for number, batch in enumerate(batches):
            with torch.no_grad():
                after[number].copy_(stream.run_layer(index, layer, batch.prefill, before[number]))
        yield after
        before = after


def _at_the_end(stream: LayerStream, batch: Batch, states_BLD: Tensor) -> Tensor:
    """Return the gradient of the rows' losses by what the last layer gives, B × L × D."""
    states = states_BLD.detach().to(stream.device).requires_grad_()
    with torch.enable_grad():
        normed = stream.normed(states)
    places, wanted = _places(batch)
    gradient = torch.zeros_like(normed)
    rows, columns = places.T
    gradient[rows, columns] = loss_gradient(stream.checkpoint, normed.detach()[rows, columns], wanted).to(gradient)
    (found,) = torch.autograd.grad(normed, states, gradient)
    return found


def _places(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return where the loss is looked at, M × 2, and the tokens that follow: an answer's, in rows without one all."""
    length = batch.prefill.image_mask.shape[1]
    places, wanted = [], []
    for number, row in enumerate(batch.rows):
        looked_at = row.answer_length or len(row.ids) - 1
        for back in range(looked_at, 0, -1):
            if row.ids[-back] != IMAGE:
                places.append((number, length - back - 1))
                wanted.append(row.ids[-back])
    return torch.tensor(places), torch.tensor(wanted)


@torch.no_grad()
def loss_gradient(checkpoint: Checkpoint, states_MD: Tensor, wanted_M: Tensor) -> Tensor:
    """Return the gradient of the negative log likelihood of ``wanted_M`` by last hidden states, M × D.

    A part of the vocabulary at a time: no table of M × V.
    """
    name = f"{OUTPUT_PREFIX}weight"
    if name not in checkpoint.tensors:
        name = f"{checkpoint.family.language_prefix}embed_tokens.weight"  # tied
    output_VD = checkpoint.tensors.read(name, own=True)
    states = states_MD.float().cpu()
    total_M = torch.full((len(states),), -torch.inf)
    for start in range(0, len(output_VD), VOCABULARY):
        words = output_VD[start : start + VOCABULARY].float()
        total_M = torch.logaddexp(total_M, (states @ words.T).logsumexp(dim=1))
    found = -output_VD[wanted_M].float()
    for start in range(0, len(output_VD), VOCABULARY):
        words = output_VD[start : start + VOCABULARY].float()
        found += (states @ words.T - total_M.unsqueeze(1)).exp() @ words
    return found


def _shifted(batch: Batch, fixed_T: Tensor, fisher: Sequence[Tensor]) -> Tensor:
    """Return the weights, shifted between the tokens of a row's text, and of its image, by the Fishers B × L."""
    image = batch.prefill.image_mask
    fixed = fixed_T.view(image.shape)
    real = batch.prefill.masks["attention_mask"].bool()
    others = real & (real.cumsum(dim=1) > 1)
    found = fixed.clone()
    for group in (others & image, others & ~image):
        sum_B1 = (fixed * group).sum(dim=1, keepdim=True)
        shifted = torch.zeros_like(fixed)
        for each in fisher:
            weighted = fixed * group * each.to(fixed)
            total = weighted.sum(dim=1, keepdim=True)
            shares = torch.where(total > 0, weighted / total.clamp(min=torch.finfo(total.dtype).tiny), fixed * group)
            even = torch.where(total > 0, sum_B1, torch.ones_like(sum_B1))
            shifted += shares * even / len(fisher)
        found = torch.where(group, UNIFORM * fixed + (1 - UNIFORM) * shifted, found)
    return found.flatten()
