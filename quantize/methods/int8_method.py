"""W8A8 for streamed layers: 8-bit weights a channel, 8-bit activations a token, outliers moved into the weights first.

Moving is that of SmoothQuant (Xiao et al. 2023, https://arxiv.org/abs/2211.10438): inputs are divided by a factor a
channel, weights multiplied by it, and the division is folded into what stands before the linear: a norm, or the rows
of the linear whose output it reads. Its strength is searched for each group of linears, and none is among the choices.

Shapes: T tokens, R output rows, C input columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantize.methods.gptq_method import linear_report
from quantize.methods.grid import Scheme
from quantize.methods.solver import SolveOptions, rows_together, solve
from quantize.streamed.layers import LINEARS, SHARED_INPUTS, Rounded, Stage, linear_names, stored_dtype
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.weights.quantized import round_inputs, round_tokens
from safevlm.errors import InputError

__all__ = ["OPTIONS", "STRENGTHS", "W8A8", "migration"]

STRENGTHS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Exponents of the activations' maxima that are tried; 0 stands for no migration."""
SCHEME = Scheme(bits=8, group_size=-1, symmetric=True, signed=False)
OPTIONS = SolveOptions(damp=0.05, sweeps=0)
MIDDLE = 128
SEARCH_TOKENS = 512
"""Tokens on which strengths are compared."""
SMALLEST = 1e-5


@dataclass(frozen=True, kw_only=True)
class W8A8:
    """Weights are rounded by GPTQ on the moved inputs' second moments, so they make up for each other's errors."""

    strengths: tuple[float, ...] = STRENGTHS
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
        for names in SHARED_INPUTS:
            linears = [stage.linear(name) for name in names]
            moments = stage.moments(names[0])
            largest_C, sample_TC = _inputs(stage, names[0])
            fold = _Fold.before(stage, names[0])
            factor_C, strength, gain = self._search(linears, largest_C, sample_TC, fold)
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
                found = {"smoothing": strength, "smoothed_error": gain}
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
        self, linears: list[Any], largest_C: Tensor, sample_TC: Tensor, fold: _Fold
    ) -> tuple[Tensor, float, float]:
        """Return the factors, their strength, and the squared error of the outputs over that without migration."""
        parts = [
            part
            for linear in linears
            for part in linear.weight.data.split(rows_together(linear.in_features, linear.weight.device))
        ]
        widest_C = torch.stack([part.float().abs().amax(dim=0) for part in parts]).amax(dim=0).clamp(min=SMALLEST)
        best, least, plain = (torch.ones_like(largest_C), 0.0), None, None
        for strength in self.strengths:
            factor = fold.shared(migration(largest_C, widest_C, strength))
            tokens_TC = round_tokens(sample_TC / factor)
            error = sum(_moved_error(part.float(), factor, sample_TC, tokens_TC) for part in parts)
            plain = error if strength == 0 else plain
            if least is None or error < least:
                best, least = (factor, strength), error
        return best[0], best[1], float(least or 0.0) / plain if plain else 1.0


def _moved_error(weight_RC: Tensor, factor_C: Tensor, sample_TC: Tensor, tokens_TC: Tensor) -> float:
    """Return the squared error of outputs where weights times ``factor_C`` and their inputs, divided, are rounded."""
    moved = weight_RC * factor_C
    scale = moved.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST) / (MIDDLE - 0.5)
    rounded = moved.div_(scale).round_().clamp_(-MIDDLE, MIDDLE - 1).mul_(scale)
    return float((tokens_TC @ rounded.T - sample_TC @ weight_RC.T).square().sum())


def migration(largest_C: Tensor, widest_C: Tensor, strength: float) -> Tensor:
    """Return SmoothQuant's factors, C: max|x|^strength / max|w|^(1 - strength), their geometric mean 1."""
    if strength == 0:
        return torch.ones_like(largest_C)
    factor = largest_C.clamp(min=SMALLEST) ** strength / widest_C ** (1 - strength)
    factor = torch.where(largest_C > 0, factor, torch.ones_like(factor)).clamp(min=SMALLEST)
    return factor / factor.log().mean().exp()


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


def _inputs(stage: Stage, name: str) -> tuple[Tensor, Tensor]:
    """Return each channel's largest magnitude, C, and some tokens' inputs, spread over the batches, T × C."""
    largest, sample = None, []
    each = -(-SEARCH_TOKENS // len(stage.batches))
    for number, inputs in enumerate(stage.inputs(name)):
        if stage.weights is not None:
            inputs = inputs[stage.weights[number].to(inputs.device) > 0]
        high = inputs.abs().amax(dim=0).float()
        largest = high if largest is None else torch.maximum(largest, high)
        sample.append(inputs[:: max(1, len(inputs) // each)][:each].float())
    return cast(Tensor, largest), torch.cat(sample)[:SEARCH_TOKENS]


def _row_ratio(now_RC: Tensor, stored_RC: Tensor) -> Tensor:
    """Return by what each row was multiplied since it was stored, R × 1."""
    at = stored_RC.abs().argmax(dim=1, keepdim=True)
    before = stored_RC.gather(1, at)
    return torch.where(
        before != 0, now_RC.gather(1, at) / torch.where(before != 0, before, torch.ones_like(before)), 1.0
    )
