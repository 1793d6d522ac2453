"""W8A8 for streamed layers: 8-bit weights a channel, 8-bit activations a token, outliers moved into the weights first.

Moving is that of SmoothQuant (Xiao et al. 2023, https://arxiv.org/abs/2211.10438): inputs are divided by a factor a
channel, weights multiplied by it, and the division is folded into what stands before the linear: a norm, or the rows
of the linear whose output it reads. Its strength is searched for each group of linears, and none is among the choices;
from the factors of the best one a descent begins (``quantize.methods.smoothing``). What it finds is taken where the
whole layer is nearer to the 16-bit one with it, on rows that neither looked at.

Shapes: T tokens, R output rows, C input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantize.methods.gptq_method import linear_report
from quantize.methods.grid import Scheme
from quantize.methods.smoothing import SMALLEST, WEIGHT_SHARE, descend, migration
from quantize.methods.solver import SolveOptions, rows_together, solve
from quantize.methods.unseen import Unseen, surely_less
from quantize.streamed.layers import LINEARS, SHARED_INPUTS, Rounded, Stage, linear_names, stored_dtype
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.weights.quantized import round_inputs, round_tokens
from safevlm.errors import InputError

__all__ = ["OPTIONS", "STEPS", "STRENGTHS", "W8A8"]

STRENGTHS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Exponents of the activations' maxima that are tried; 0 stands for no migration."""
SCHEME = Scheme(bits=8, group_size=-1, symmetric=True, signed=False)
OPTIONS = SolveOptions(damp=0.05, sweeps=0)
MIDDLE = 128
SEARCH_TOKENS = 512
"""Tokens on which factors are compared."""
STEPS = 60
"""Steps of the descent from the best strength's factors."""
DESCENT_TOKENS = 2048
"""Tokens that the descent looks at."""


@dataclass(frozen=True, kw_only=True)
class W8A8:
    """Weights are rounded by GPTQ on the moved inputs' second moments, so they make up for each other's errors."""

    strengths: tuple[float, ...] = STRENGTHS
    steps: int = STEPS
    options: SolveOptions = OPTIONS

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises InputError for a language model without the linears that are known."""
        for _, _, name in linear_names(checkpoint):
            if f"{name}.weight" not in checkpoint.tensors:
                raise InputError(f"{checkpoint.name}: no tensor '{name}.weight', so its layers are unknown.")

    def round_layer(self, stage: Stage) -> Rounded:
        """Round a layer's linears group by group; InputError names the linear."""
        tensors: dict[str, Tensor] = {}
        report: list[dict[str, Any]] = []
        dtype = stored_dtype(stage.stream.checkpoint)
        unseen = Unseen.of(stage)
        for names in SHARED_INPUTS:
            linears = [stage.linear(name) for name in names]
            moments = stage.moments(names[0])
            largest_C, sample_TC = _inputs(stage, names[0], unseen)
            fold = _Fold.before(stage, names[0])
            factor_C, found = self._search(linears, largest_C, sample_TC, fold, partial(_errors, unseen, names))
            factor_C = fold.apply(factor_C, dtype)
            stage.rescale(names[0], factor_C)
            for linear in linears:
                linear.weight.data = linear.weight.data * factor_C
            moments.div_(factor_C).div_(factor_C.unsqueeze(1))
            with stage.named(names[0]):
                solved = solve([linear.weight for linear in linears], moments, SCHEME, self.options)
            for name, linear, each in zip(names, linears, solved, strict=True):
                linear.weight.data = each.weight().to(linear.weight)
                tensors[f"{name}.weight"] = (each.ints.to(torch.int16) - MIDDLE).to(torch.int8).cpu()
                tensors[f"{name}.weight_scale"] = each.grid.scale.float().cpu()
                report.append(linear_report(name, 8, each, self.options) | found)
            round_inputs(stage.layer, names)
        for name in LINEARS:  # a linear's rows may have been divided for the next one after it was rounded
            linear, scale = stage.linear(name), tensors[f"{name}.weight_scale"]
            ratio = _row_ratio(linear.weight.data.cpu(), tensors[f"{name}.weight"].float() * scale)
            tensors[f"{name}.weight_scale"] = scale * ratio
            linear.weight.data = (tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]).to(linear.weight)
        return Rounded(tensors=tensors, report=report)

    def attach(self, layer: nn.Module) -> None:
        """Let a restored layer's linears round their inputs."""
        round_inputs(layer, LINEARS)

    def _search(
        self,
        linears: list[Any],
        largest_C: Tensor,
        sample_TC: Tensor,
        fold: _Fold,
        errors: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the factors, and for the report where they come from and their error over that without migration.

        ``errors`` gives those of tokens that are not in the sample, by factors.
        """
        parts = [
            part
            for linear in linears
            for part in linear.weight.data.split(rows_together(linear.in_features, linear.weight.device))
        ]
        few_TC = sample_TC[:: max(1, len(sample_TC) // SEARCH_TOKENS)][:SEARCH_TOKENS]
        widest_C = torch.stack([part.float().abs().amax(dim=0) for part in parts]).amax(dim=0).clamp(min=SMALLEST)
        best, at = torch.ones_like(largest_C), 0.0
        plain = least = _rounding_error(parts, best, few_TC)
        for strength in (each for each in self.strengths if each):
            factor = fold.shared(migration(largest_C, widest_C, strength))
            error = _rounding_error(parts, factor, few_TC)
            if error < least:
                best, least, at = factor, error, strength
        descent = None
        if self.steps and any(self.strengths):
            factor = descend(best, sample_TC, parts, fold.places(best), steps=self.steps)
            before_T, after_T = errors(best), errors(factor)
            kept = surely_less(after_T, before_T)
            descent = {"loss_before": float(before_T.sum()), "loss_after": float(after_T.sum()), "kept": kept}
            if kept:
                best, least = factor, _rounding_error(parts, factor, few_TC)
        return best, {"smoothing": at, "descent": descent, "smoothed_error": least / plain if plain else 1.0}


def _errors(unseen: Unseen, names: Sequence[str], factor_C: Tensor) -> Tensor:
    """Return the layer's errors on tokens held out, its named linears rounded after division by these factors."""
    return unseen.errors({name: partial(_product, unseen.stage.linear(name), factor_C) for name in names})


def _product(linear: Any, factor_C: Tensor, inputs: Tensor) -> Tensor:
    """Return what a linear gives when inputs are divided and rounded, and weights lose what GPTQ leaves."""
    divided = round_tokens(inputs.float() / factor_C)
    parts = linear.weight.data.split(rows_together(linear.in_features, linear.weight.device))
    found = torch.cat([divided @ _moved(part.float(), factor_C)[1].T for part in parts], dim=-1)
    return (found if linear.bias is None else found + linear.bias).to(inputs.dtype)


def _moved(weight_RC: Tensor, factor_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return a multiplied weight, and what becomes of it: of its rounding's squared error ``WEIGHT_SHARE`` is left."""
    moved = weight_RC * factor_C
    scale = moved.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST) / (MIDDLE - 0.5)
    rounded = (moved / scale).round_().clamp_(-MIDDLE, MIDDLE - 1).mul_(scale)
    return moved, moved.lerp(rounded, WEIGHT_SHARE**0.5)


def _rounding_error(parts: Sequence[Tensor], factor_C: Tensor, sample_TC: Tensor) -> float:
    """Return the squared error of outputs by inputs that are divided and rounded, and what GPTQ leaves of weights'."""
    divided_TC = sample_TC / factor_C
    lost_TC = (round_tokens(divided_TC) - divided_TC) * factor_C
    return sum(_part_error(part.float(), factor_C, divided_TC, lost_TC) for part in parts)


def _part_error(weight_RC: Tensor, factor_C: Tensor, divided_TC: Tensor, lost_TC: Tensor) -> float:
    moved, left = _moved(weight_RC, factor_C)
    inputs = float((lost_TC @ weight_RC.T).square().sum())
    return inputs + float((divided_TC @ left.sub_(moved).T).square().sum())


@dataclass(frozen=True, kw_only=True)
class _Fold:
    """Where the division of a linear's inputs goes: a norm's weight, or another linear's rows.

    ``offset`` is what is added to a norm's weight before it multiplies. ``repeats`` is how many heads
    read the same rows, each ``head`` wide.
    """

    norm: Any = None
    linear: Any = None
    offset: float = 0.0
    repeats: int = 1
    head: int = 1

    @classmethod
    def before(cls, stage: Stage, name: str) -> _Fold:
        """Return what stands before a linear of a decoder layer."""
        layer = cast(Any, stage.layer)
        family = stage.stream.checkpoint.family
        if name.endswith("q_proj"):
            return cls(norm=layer.input_layernorm, offset=family.norm_offset)
        if name.endswith("gate_proj"):
            return cls(norm=getattr(layer, family.mlp_norm), offset=family.norm_offset)
        if name.endswith("o_proj"):
            repeats = layer.self_attn.o_proj.in_features // layer.self_attn.v_proj.out_features
            return cls(linear=layer.self_attn.v_proj, repeats=repeats, head=layer.self_attn.head_dim)
        return cls(linear=layer.mlp.up_proj)

    def shared(self, factor_C: Tensor) -> Tensor:
        """Return factors that are equal where several heads read the same rows."""
        if self.repeats == 1:
            return factor_C
        heads = factor_C.view(-1, self.repeats, self.head)
        return heads.log().mean(dim=1, keepdim=True).exp().expand_as(heads).reshape(-1)

    def places(self, factor_C: Tensor) -> Tensor:
        """Return which channels have the same factor, as whole numbers from 0, C."""
        place_C = torch.arange(len(factor_C), device=factor_C.device)
        return place_C // (self.repeats * self.head) * self.head + place_C % self.head

    def apply(self, factor_C: Tensor, dtype: torch.dtype) -> Tensor:
        """Divide there, and return the factors that the division stored in 16 bit really has."""
        if self.norm is not None:
            scale = self.norm.weight.data + self.offset
            stored = (scale / factor_C - self.offset).to(dtype).to(scale.dtype)
            divided = stored + self.offset
            held = (divided != 0) & (scale != 0)
            self.norm.weight.data = torch.where(held, stored, self.norm.weight.data)
            return torch.where(held, scale / torch.where(held, divided, torch.ones_like(divided)), 1.0)
        rows = factor_C.view(-1, self.repeats, self.head)[:, 0].reshape(-1) if self.repeats > 1 else factor_C
        self.linear.weight.data = self.linear.weight.data / rows.unsqueeze(1)
        if self.linear.bias is not None:
            # the bias is stored in 16 bit; what rounding it there loses is the 16-bit model's own error
            self.linear.bias.data = (self.linear.bias.data / rows).to(dtype).to(self.linear.bias.dtype)
        return factor_C


def _inputs(stage: Stage, name: str, unseen: Unseen) -> tuple[Tensor, Tensor]:
    """Return each channel's largest magnitude, C, and some tokens' inputs, spread over the batches, T × C.

    Rows held out are in neither.
    """
    largest, sample = None, []
    each = -(-DESCENT_TOKENS // len(stage.batches))
    for number, inputs in enumerate(stage.inputs(name)):
        seen = unseen.learnt_from(number)
        if stage.weights is not None:
            seen &= stage.weights[number].cpu() > 0
        if not seen.any():
            continue
        inputs = inputs[seen.to(inputs.device)]
        high = inputs.abs().amax(dim=0).float()
        largest = high if largest is None else torch.maximum(largest, high)
        sample.append(inputs[:: max(1, len(inputs) // each)][:each].float())
    return cast(Tensor, largest), torch.cat(sample)[:DESCENT_TOKENS]


def _row_ratio(now_RC: Tensor, stored_RC: Tensor) -> Tensor:
    """Return by what each row was multiplied since it was stored, R × 1."""
    at = stored_RC.abs().argmax(dim=1, keepdim=True)
    before = stored_RC.gather(1, at)
    return torch.where(
        before != 0, now_RC.gather(1, at) / torch.where(before != 0, before, torch.ones_like(before)), 1.0
    )
