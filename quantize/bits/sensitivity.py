"""Which layers carry safety: what rounding each of them alone does to answers, refusals apart, and to the guard.

A unit is the attention or the MLP of one decoder layer. While the 16-bit layers stream by, one copy of the samples'
hidden states is kept for each unit and bit width, in which that unit alone is rounded; at the end each copy is
compared with the one in which nothing is.

Shapes: M answer tokens, D width of the language model, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calibration.streaming.batches import Batch
from calibration.streaming.sequential import Activations, LayerStream
from quantize.methods.grid import Scheme, dequantize, fit_grid, groups_of, round_to_grid
from quantize.streamed.drift import answer_states, divergence
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.errors import InputError

__all__ = ["PARTS", "Sensitivity", "choose_bits", "measure", "stored_bits"]

PARTS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
MOST_COPIES = 64
"""Above so many copies only one bit width is run, and the effect of others follows from their rounding errors."""
STEPS = 4000
"""Mixtures of bits that are followed at once, where no other one is better; with more, one in so many steps of cost."""
SIXTEEN = 16


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What rounding one unit to ``bits`` does, to the nearest, everything else in 16 bit.

    ``refusals`` and ``others`` are Kullback-Leibler divergences, in nats, of whole answers' tokens, the mean over
    samples; ``guard`` that of the guard's classes. ``weight_error`` is the mean squared error of its weights.
    """

    layer: int
    part: str
    weights: int
    bits: int
    weight_error: float
    refusals: float
    others: float
    guard: float
    measured: bool = True
    """``False``: another width's effect times the ratio of their weight errors."""

    def effect(self, safety_weight: float) -> float:
        """Return one number to choose by: refusals and the guard count ``safety_weight`` times."""
        return safety_weight * (self.refusals + self.guard) + self.others


def stored_bits(bits: int, group_size: int, columns: int) -> float:
    """Return the bits that a weight takes in the file, its share of scale (16 bit) and zero included."""
    if bits == SIXTEEN:
        return float(SIXTEEN)
    group = columns if group_size == -1 else group_size
    return bits + (SIXTEEN + bits) / group


@torch.no_grad()
def measure(
    stream: LayerStream,
    batches: Sequence[Batch],
    hidden: Activations,
    choices: Sequence[int],
    scheme: Scheme,
    *,
    max_bytes: int | None,
    folder: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> list[Sensitivity]:
    """Return every unit's effect at every width below 16; ``hidden`` goes from embeddings to last hidden states.

    ``scheme`` gives all but the bits.

    Raises InputError when no sample has an answer to look at.
    """
    if not any(row.answer_length for batch in batches for row in batch.rows):
        raise InputError(
            "--bits auto: no sample has an answer, so there is nothing that rounding could change. Let the model "
            "answer (--answers own), or give answers in the file."
        )
    widths = [bits for bits in choices if bits < SIXTEEN]
    run = [bits for bits in widths if bits < 8] or widths
    if len(stream) * len(PARTS) * len(run) > MOST_COPIES:
        run = run[-1:]
    copies: dict[tuple[int, str, int], Activations] = {}
    errors: dict[tuple[int, str, int], float] = {}
    sizes: dict[tuple[int, str], int] = {}
    left = max_bytes

    def round_in_turn(index: int, layer: nn.Module) -> None:
        nonlocal left
        report(f"sensitivity, layer {index + 1} of {len(stream)}: {len(copies)} copies")
        for copy in copies.values():
            _advance(stream, index, layer, batches, copy, copy)
        for part, names in PARTS.items():
            linears: list[Any] = [layer.get_submodule(name) for name in names]
            sizes[index, part] = sum(linear.weight.numel() for linear in linears)
            for bits in widths:
                with _rounded(linears, replace(scheme, bits=bits)) as error:
                    errors[index, part, bits] = error / sizes[index, part]
                    if bits in run:
                        copy = Activations(hidden.shapes, hidden.dtype, left, folder)
                        left = None if left is None else max(0, left - (0 if copy.on_disk else copy.nbytes))
                        copies[index, part, bits] = copy
                        _advance(stream, index, layer, batches, hidden, copy)

    try:
        prefills = [batch.prefill for batch in batches]
        for index, module in stream.layers():
            round_in_turn(index, module)
            stream.advance(index, module, prefills, hidden)
        stream.norm(hidden)
        outcome = _Outcome.of(stream, batches, hidden)
        found = {}
        for number, (key, copy) in enumerate(copies.items(), 1):
            report(f"sensitivity, comparing copy {number} of {len(copies)}")
            stream.norm(copy)
            found[key] = outcome.against(_Outcome.of(stream, batches, copy), stream.checkpoint)
    finally:
        for copy in copies.values():
            copy.__exit__(None, None, None)
    rows = []
    for (layer, part, bits), error in errors.items():
        nearest = min(run, key=lambda width: abs(width - bits))
        ratio = error / errors[layer, part, nearest] if nearest != bits else 1.0
        refusals, others, guard = (effect * ratio for effect in found[layer, part, nearest])
        rows.append(
            Sensitivity(
                layer=layer,
                part=part,
                weights=sizes[layer, part],
                bits=bits,
                weight_error=error,
                refusals=refusals,
                others=others,
                guard=guard,
                measured=nearest == bits,
            )
        )
    return rows


def choose_bits(
    found: Sequence[Sensitivity], target: float, cost: Callable[[int], float], *, safety_weight: float
) -> dict[tuple[int, str], int]:
    """Return each unit's bits: the least total effect whose mean cost is at most ``target`` bits a weight.

    ``cost`` tells the stored bits a weight of a width; 16 bits have no effect. All mixtures that no other one beats are
    followed, unit by unit.

    Raises InputError when even the fewest bits are more than the target.
    """
    units = list(dict.fromkeys((row.layer, row.part) for row in found))
    weights = {(row.layer, row.part): row.weights for row in found}
    total = sum(weights.values())
    fewest = min(row.bits for row in found)
    if cost(fewest) > target:
        raise InputError(
            f"--target-bits {target:g}: {fewest} bits take {cost(fewest):.2f} bits per weight with their scales. Give "
            "more, or a larger --group-size."
        )
    effects = {(row.layer, row.part, row.bits): row.effect(safety_weight) for row in found}
    choices = [*sorted({row.bits for row in found}), SIXTEEN]
    budget = target * total * (1 + 1e-12)
    least_left = sum(weights.values()) * cost(fewest)
    # every mixture that no other one beats in both cost and effect, with the one that it grew from
    front: list[_Mixture] = [_Mixture(0.0, 0.0, None, 0)]
    for unit in units:
        least_left -= weights[unit] * cost(fewest)
        grown = [
            _Mixture(
                mixture.cost + weights[unit] * cost(bits),
                mixture.effect + effects.get((*unit, bits), 0.0),
                mixture,
                bits,
            )
            for mixture in front
            for bits in choices
            if mixture.cost + weights[unit] * cost(bits) + least_left <= budget
        ]
        front = _unbeaten(grown, budget / STEPS)
    best: _Mixture | None = min(front, key=lambda mixture: (mixture.effect, mixture.cost))
    result = []
    while best is not None and best.before is not None:
        result.append(best.bits)
        best = best.before
    return dict(zip(units, reversed(result), strict=True))


class _Mixture(NamedTuple):
    cost: float
    effect: float
    before: Any
    bits: int


def _unbeaten(mixtures: list[_Mixture], step: float) -> list[_Mixture]:
    """Return mixtures with less effect than all cheaper ones; of very many, one a ``step`` of cost."""
    kept: list[_Mixture] = []
    for mixture in sorted(mixtures, key=lambda each: (each.cost, each.effect)):
        if not kept or mixture.effect < kept[-1].effect:
            kept.append(mixture)
    if len(kept) <= STEPS:
        return kept
    thinned = {int(mixture.cost / step): mixture for mixture in reversed(kept)}
    return sorted(thinned.values(), key=lambda each: each.cost)


def record(found: Sequence[Sensitivity]) -> list[dict[str, Any]]:
    """Return what compression.json shows."""
    return [asdict(row) for row in found]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Outcome:
    """Last hidden states before each answer token, M × D, and the guard's log probabilities, S × C."""

    states: Tensor
    sample: Tensor
    refused: Tensor
    guard: Tensor | None

    @classmethod
    def of(cls, stream: LayerStream, batches: Sequence[Batch], hidden: Activations) -> _Outcome:
        sample: list[int] = []
        refused: list[bool] = []
        guard: list[Tensor] = []
        taps_language = stream.checkpoint.tap.source == "language_model"
        for number, batch in enumerate(batches):
            if taps_language and batch.prefill.features.shape[1]:
                logits = stream.skeleton.guard_logits(batch.prefill, hidden[number].to(stream.device))
                guard.append(torch.log_softmax(logits.float(), dim=-1).cpu())
            for row in batch.rows:
                if row.answer_length:
                    sample += [len(refused)] * row.answer_length
                    refused.append(row.refused)
        return cls(
            states=answer_states(batches, hidden),
            sample=torch.tensor(sample),
            refused=torch.tensor(refused),
            guard=torch.cat(guard) if guard else None,
        )

    def against(self, other: _Outcome, checkpoint: Checkpoint) -> tuple[float, float, float]:
        """Return divergences of refusals, other answers and guard, from this outcome to another one."""
        tokens = divergence(checkpoint, self.states, other.states)
        answers = torch.zeros(len(self.refused)).index_add_(0, self.sample, tokens)
        refusals, others = answers[self.refused], answers[~self.refused]
        guard = 0.0
        if self.guard is not None and other.guard is not None:
            guard = float((self.guard.exp() * (self.guard - other.guard)).sum(dim=-1).mean())
        return (
            float(refusals.mean()) if len(refusals) else 0.0,
            float(others.mean()) if len(others) else 0.0,
            max(guard, 0.0),
        )


def _advance(
    stream: LayerStream, index: int, layer: nn.Module, batches: Sequence[Batch], source: Activations, to: Activations
) -> None:
    for number, batch in enumerate(batches):
        to[number].copy_(stream.run_layer(index, layer, batch.prefill, source[number]))


@contextmanager
def _rounded(linears: Sequence[Any], scheme: Scheme) -> Iterator[float]:
    """Round linears to the nearest for a while; yield the sum of squared errors."""
    kept = [linear.weight.data for linear in linears]
    error = 0.0
    for linear, weight in zip(linears, kept, strict=True):
        columns = scheme.columns(weight.shape[1], "a linear")
        groups = groups_of(weight.shape[1], columns, weight.device)
        whole = weight.float()
        grid = fit_grid(whole, scheme, columns, torch.ones(weight.shape[1], device=weight.device))
        rounded = dequantize(round_to_grid(whole, grid, scheme, groups), grid, groups)
        error += float((rounded - whole).square().sum())
        linear.weight.data = rounded.to(weight)
    try:
        yield error
    finally:
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = weight
