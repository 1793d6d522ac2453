"""GPTQ over a language model whose decoder layers stream by, each read, rounded, run and dropped.

Within a layer, linears are rounded in the order in which data flows through them, and inputs of the later ones are
those that the rounded earlier ones give. Shapes: B samples a batch, L positions, T = B · L tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibration.sequential import Activations, LayerStream
from models.errors import InputError
from models.safe_vlm import Prefill
from quantize.grid import Scheme
from quantize.hessian import Hessian
from quantize.solver import Solved, SolveOptions, solve

__all__ = ["SHARED_INPUTS", "Write", "quantize_layers", "token_weights"]

SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""A decoder layer's linears in the order of data, those that read the same input together; all three families."""

Write = Callable[[str, Solved], None]
"""Told a linear's canonical name (without ``.weight``) and what became of it, as soon as it is known."""


class _Enough(Exception):  # noqa: N818  # control flow, not an error
    """The inputs that were wanted have been seen: the rest of the layer need not run."""


@dataclass
class _Catch:
    """Adds a linear's inputs to its second moments, then ends the run."""

    hessian: Hessian
    weights: Tensor | None = None

    def __call__(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        self.hessian.add(given[0].reshape(-1, given[0].shape[-1]), self.weights)
        raise _Enough


def token_weights(prefill: Prefill, image_share: float = 0.5) -> Tensor:
    """Return what each token of a batch counts in the second moments: float32 T, 0 at padding, 1 at text.

    A picture's many tokens share a weight that makes them at most ``image_share`` of their sample, so that 576 of
    them do not drown a short question; they never count more than text.

    Errors: InputError for a share outside (0, 1).
    """
    if not 0 < image_share < 1:
        raise InputError(f"--image-share {image_share}: a share above 0 and below 1 is allowed; 0.5 is usual.")
    real = prefill.masks["attention_mask"].bool()
    image = prefill.image_mask & real
    text_B, images_B = (real & ~image).sum(dim=1), image.sum(dim=1)
    fitting = text_B * image_share / (1 - image_share) / images_B.clamp(min=1)
    weights = real.float()
    return torch.where(image, fitting.clamp(max=1).unsqueeze(1).to(weights), weights).flatten()


@torch.no_grad()
def quantize_layers(
    stream: LayerStream,
    batches: Sequence[Prefill],
    hidden: Activations,
    scheme: Scheme,
    options: SolveOptions = SolveOptions(),
    *,
    weights: Sequence[Tensor] | None = None,
    write: Write,
    report: Callable[[int], None] = lambda _: None,
) -> None:
    """Round every linear of every decoder layer; ``hidden`` goes from embeddings to last hidden states.

    Those are the states of the rounded model. ``weights`` are the tokens' (T each) of every batch; ``write`` gets
    each linear once and nothing is kept.

    Errors: InputError for a group size that does not divide a width (before anything is read), and for activations
    that are not finite, with the layer's and the linear's name.
    """
    prefix = stream.checkpoint.family.language_prefix
    _check_widths(stream, scheme, prefix)

    def visit(index: int, layer: nn.Module, _: object) -> None:
        for names in SHARED_INPUTS:
            linears: list[Any] = [layer.get_submodule(name) for name in names]
            where = f"{prefix}layers.{index}."
            moments = _moments(stream, index, layer, linears[0], batches, hidden, weights, where + names[0])
            solved = solve([linear.weight for linear in linears], moments, scheme, options, name=where + names[0])
            for name, linear, each in zip(names, linears, solved, strict=True):
                linear.weight.data = each.weight().to(linear.weight)
                write(where + name, each)

    stream.run(batches, hidden, visit=visit, report=report)


def _check_widths(stream: LayerStream, scheme: Scheme, prefix: str) -> None:
    for index in range(len(stream)):
        for name in (name for names in SHARED_INPUTS for name in names):
            full = f"{prefix}layers.{index}.{name}"
            scheme.columns(stream.checkpoint.tensors.shape(f"{full}.weight")[1], full)


def _moments(
    stream: LayerStream,
    index: int,
    layer: nn.Module,
    linear: Any,
    batches: Sequence[Prefill],
    hidden: Activations,
    weights: Sequence[Tensor] | None,
    name: str,
) -> Tensor:
    """Return the second moments of a linear's inputs; the layer runs as far as this linear."""
    catch = _Catch(Hessian(linear.in_features, stream.device))
    hook = linear.register_forward_pre_hook(catch)
    try:
        for number, batch in enumerate(batches):
            catch.weights = None if weights is None else weights[number].to(stream.device)
            with contextlib.suppress(_Enough):
                stream.run_layer(index, layer, batch, hidden[number])
        return catch.hessian.mean()
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    finally:
        hook.remove()
