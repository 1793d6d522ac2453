"""GPTQ as a method for streamed layers: linears in true sequential order, each on what the rounded ones before give.

Each linear may have a grid of its own, or stay in 16 bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantize.methods.grid import Scheme
from quantize.methods.mismatch import moved_weights
from quantize.methods.moments import Moments
from quantize.methods.packing import check_packable, pack_linear
from quantize.methods.solver import Solved, SolveOptions, solve
from quantize.methods.tuning import Codes, Tuner
from quantize.streamed.layers import LINEARS, SHARED_INPUTS, Rounded, Stage, linear_names, stored_dtype
from safevlm.checkpoint.checkpoint import Checkpoint

__all__ = ["Gptq", "linear_report"]


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """``scheme_of`` tells each linear's grid by its canonical name; ``None`` leaves it in 16 bit.

    With ``nearest`` activations are not looked at: every weight is rounded to the nearest, which is what GPTQ does
    where all inputs count the same. Losses are then those of the weights.
    """

    scheme_of: Callable[[str], Scheme | None]
    options: SolveOptions = field(default_factory=SolveOptions)
    nearest: bool = False
    tuner: Tuner | None = None
    """Set: a layer's codes are tuned once its linears are solved."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises InputError for a group size that does not divide a width, or a width that cannot be packed."""
        for _, _, name in linear_names(checkpoint):
            scheme = self.scheme_of(name)
            if scheme is not None:
                rows, columns = checkpoint.tensors.shape(f"{name}.weight")
                scheme.columns(columns, name)
                check_packable(name, rows, columns)

    def round_layer(self, stage: Stage) -> Rounded:
        """Round a layer's linears group by group; InputError names the linear."""
        tensors: dict[str, Tensor] = {}
        report: list[dict[str, Any]] = []
        codes: dict[str, Codes] = {}
        for names in SHARED_INPUTS:
            schemes = {name: self.scheme_of(stage.prefix + name) for name in names}
            wanted = dict.fromkeys(each for each in schemes.values() if each is not None)
            if wanted and report and not self.nearest:
                stage.gather(names[0])
            moments = self._moments(stage, names[0]) if wanted else None
            cross = stage.mismatch(names[0]) if wanted and self.options.mismatch else None
            for number, scheme in enumerate(wanted, 1):
                assert moments is not None
                chosen = [name for name in names if schemes[name] == scheme]
                linears = [stage.linear(name) for name in chosen]
                with stage.named(chosen[0]):
                    weights, moved = [linear.weight for linear in linears], None
                    if cross is not None:
                        moved = moved_weights(weights, moments, cross, self.options.mismatch, self.options.damp)
                        weights = [each.weight for each in moved]
                    if number == len(wanted):
                        cross = None  # done with before the solver takes memory
                    solved = solve(weights, moments, scheme, self.options, products=stage.moment_dtype)
                damped = None if self.tuner is None else _damped(moments, solved[0].damp)
                if number == len(wanted):
                    moments = None  # done with before the packing takes memory
                for place, (name, linear, each) in enumerate(zip(chosen, linears, solved, strict=True)):
                    packed = pack_linear(name, each.ints, each.grid, each.group_of, scheme.bits)
                    tensors |= {key: tensor.cpu() for key, tensor in packed.items()}
                    linear.weight.data = linear.weight.data.new_empty(0)  # before its successor is there
                    linear.weight.data = each.weight().to(linear.weight)
                    if damped is not None:
                        codes[name] = Codes(
                            ints=each.ints,
                            grid=each.grid,
                            group_of=each.group_of,
                            bits=scheme.bits,
                            moments=damped,
                            wanted=None if moved is None else moved[place].weight.to(linear.weight.dtype),
                        )
                    told = linear_report(name, scheme.bits, each, self.options)
                    if moved is not None:
                        told["moved"] = moved[place].distance
                    report.append(told | {"kept": "nearest"} if self.nearest else told)
            for name in names:
                if schemes[name] is None:
                    weight = stage.linear(name).weight
                    stored = weight.data.to(stored_dtype(stage.stream.checkpoint))
                    tensors[f"{name}.weight"] = stored.cpu()
                    weight.data = stored.to(weight.dtype)
                    report.append({"linear": name, "bits": 16, "kept": "16 bit"})
        if self.tuner is not None:
            tuned = self.tuner.tune(stage, codes)
            for name, found in tuned.codes.items():
                packed = pack_linear(name, found.ints, found.grid, found.group_of, found.bits)
                tensors |= {key: tensor.cpu() for key, tensor in packed.items()}
            report = [row | {"tuning": tuned.report()} if row["linear"] in codes else row for row in report]
        order = {name: place for place, name in enumerate(LINEARS)}
        return Rounded(tensors=tensors, report=sorted(report, key=lambda row: order[row["linear"]]))

    def _moments(self, stage: Stage, name: str) -> Tensor:
        if self.nearest:
            return torch.eye(stage.linear(name).in_features, device=stage.stream.device)
        return stage.moments(name)

    def attach(self, layer: nn.Module) -> None:
        """Weights alone make a rounded layer."""


def _damped(moments_CC: Tensor, damp: float) -> Tensor:
    """Return a copy of second moments with the solver's damping."""
    found = Moments(moments_CC.clone())
    found.damp = damp
    found.damp_diagonal()
    return found.matrix


def linear_report(name: str, bits: int, solved: Solved, options: SolveOptions) -> dict[str, Any]:
    """Return what compression.json keeps of a linear."""
    return {
        "linear": name,
        "bits": bits,
        "relative_error": solved.relative_error,
        "loss": solved.loss,
        "rtn_loss": solved.rtn_loss,
        "kept": solved.kept,
        "damp": solved.damp,
        "damped_more": solved.damp > options.damp,
        "dead_columns": solved.dead_columns,
    }
