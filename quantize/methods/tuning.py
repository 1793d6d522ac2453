"""Tuning: a decoder layer's integers and scales learnt together, by gradient on what the whole layer gives.

GPTQ fits each linear to its own weight. Here the layer's output is held against what the 16-bit layer makes of the
16-bit model's own hidden states, so errors of the layers before are made up for as well. As in AutoRound (Cheng et al.
2023, https://arxiv.org/abs/2309.05516), but from GPTQ's integers instead of the nearest ones, and by Adam.

Shapes: B rows, L positions, D width; a linear has R outputs and C inputs in G groups of K columns.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from calibration.streaming.sequential import Activations
from quantize.methods.grid import LARGEST, SMALLEST, Grid, dequantize
from quantize.streamed.layers import LINEARS, Stage, stored_dtype
from quantize.streamed.unfinished import TUNING, Unfinished
from safevlm.errors import InputError
from safevlm.network.safe_vlm import Prefill

__all__ = ["Codes", "TuneOptions", "Tuned", "Tuner"]

PIECE_TOKENS = 512
"""Rows of a batch that run together, padding included; a longer row is a piece by itself."""
STEP_TOKENS = 1024
"""Tokens whose gradients a step adds up, about."""
HELD_OUT = 8
"""One piece in so many is not learnt from: it tells whether the layer got better."""
EDGE = 0.25
"""How far from its integer a weight may start; at 0.5 the next one begins. Those that GPTQ did not round to the nearest
would all start at the border: the first steps then undo GPTQ at once, with many times its error."""
BEYOND = 0.48
"""How far past the grid's ends a weight may be moved."""
CHECKS = 4
"""How often the rows held out are looked at while learning; the best codes seen are taken."""
SCALE_SHARE = 0.2
"""How far a scale may move, as a share of itself; a weight moves by half a step at most."""
LONGEST_STEP = 1 / 25
"""Of the way from one integer to the next, in one step: more at once, and the linears no longer know of each other."""
MEMORY, SQUARE_MEMORY = 0.9, 0.95
"""Of a gradient's mean and of its square's, from step to step."""
ANCHOR = 1.0
"""What the linears' own errors, by GPTQ's damped second moments, count beside the layer's, each relative to its start.
Without it a layer is fitted to the few rows at hand: text that begins otherwise is lost (RESULTS.md)."""
TIMED_STEPS = 3
SMALLEST_FACTOR, LARGEST_FACTOR = 0.5, 1.5


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """How long to learn: so many ``steps`` a layer, or as many as fit into ``minutes`` for all layers."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise InputError("--time and --tune-steps exclude each other. Give one of them.")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"--tune-steps {self.steps} is not allowed. Give at least 1; 100 is usual.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InputError(f"--time {self.minutes:g} is not allowed. Give a number of minutes above 0.")

    def recipe(self) -> dict[str, Any]:
        """Return what compression.json keeps; a run with another one is another run."""
        return {"steps": self.steps, "minutes": self.minutes}


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """A rounded linear: integers R × C (uint8) of so many ``bits``, their grid, and each column's group.

    ``moments`` C × C, damped, are those of its inputs. ``wanted`` R × C is what was rounded, where that is not the
    checkpoint's weight.
    """

    ints: Tensor
    grid: Grid
    group_of: Tensor
    bits: int
    moments: Tensor
    wanted: Tensor | None = None

    def weight(self) -> Tensor:
        """Return the weights that are stored, R × C."""
        return dequantize(self.ints, self.grid, self.group_of)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuned:
    """What was learnt: codes by linear, as they were where they are not ``kept``; losses are of rows held out."""

    codes: Mapping[str, Codes]
    steps: int
    before: float
    after: float
    kept: bool

    def report(self) -> dict[str, Any]:
        """Return what compression.json keeps of a layer."""
        losses = {"loss_before": self.before, "loss_after": self.after}
        finite = {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}
        return {"steps": self.steps, **finite, "kept": self.kept}


class Tuner:
    """Tunes layers as they come. ``steps`` are those of every layer, once they are known."""

    def __init__(self, options: TuneOptions) -> None:
        self.options = options
        self.steps = options.steps
        self._decided: Callable[[int], None] = lambda _: None

    def begin(self, hidden: Activations, unfinished: Unfinished, room: int) -> Activations:
        """Return a copy of the embeddings, for the 16-bit model, in memory up to ``room`` bytes.

        A run that goes on takes the number of steps that it had decided on.
        """
        if self.options.steps is None:
            self.steps = (unfinished.kept(TUNING) or {}).get("steps")
            self._decided = lambda steps: unfinished.keep(TUNING, {"steps": steps})
        return hidden.copy(room, unfinished.folder)

    def tune(self, stage: Stage, starts: Mapping[str, Codes]) -> Tuned:
        """Learn a layer's codes from ``starts``, by linear; the layer then has the weights that they stand for.

        Linears of the layer that are not among them stay as they are. What the layer read so far is not what it
        reads now: its outputs are to be found anew. Raises InputError for a layer without 16-bit outputs.
        """
        if stage.target is None:
            raise InputError(f"{stage.prefix}: tuning needs what the 16-bit layer gives.")
        stage.moved = True
        stage.layer.requires_grad_(False)
        originals = _originals(stage, starts)
        _put(stage, {name: each.weight() for name, each in starts.items()})
        learnt_from, held_out = _split(stage)
        lesson = _Lesson(stage, stage.target)
        before = lesson.loss(held_out)
        if not starts or not math.isfinite(before):
            return Tuned(codes=starts, steps=0, before=before, after=before, kept=False)

        def learn(steps: int) -> tuple[float, Mapping[str, Codes]]:
            learnt = {name: _Learnt(originals[name], start) for name, start in starts.items()}
            best, codes = math.inf, starts
            for _ in _learn(stage, learnt, lesson, learnt_from, steps, ANCHOR * before):
                found = {name: each.codes() for name, each in learnt.items()}
                _put(stage, {name: each.weight() for name, each in found.items()})
                loss = lesson.loss(held_out)
                if loss < best:
                    best, codes = loss, found
            return best, codes

        steps = self.steps or self._timed(learn, len(stage.stream))
        after, found = learn(steps)
        kept = after <= before
        codes = found if kept else starts
        _put(stage, {name: each.weight() for name, each in codes.items()})
        return Tuned(codes=codes, steps=steps, before=before, after=after, kept=kept)

    def _timed(self, learn: Callable[[int], Any], layers: int) -> int:
        """Return how many steps fit into a layer's share of the time, and let them be kept."""
        learn(1)  # the first one also fills caches
        began = time.monotonic()
        learn(TIMED_STEPS)
        each = (time.monotonic() - began) / TIMED_STEPS
        return self._decide(max(1, int(60 * cast(float, self.options.minutes) / layers / each)))

    def _decide(self, steps: int) -> int:
        self.steps = steps
        self._decided(steps)
        return steps


def _originals(stage: Stage, starts: Mapping[str, Codes]) -> dict[str, Tensor]:
    """Return what the linears to tune were rounded from, and give the layer all others' weights as they are stored."""
    fresh = stage.stream.load_layer(stage.index)
    weights = {name: cast(Tensor, fresh.get_submodule(name).weight.data) for name in LINEARS}
    dtype = stored_dtype(stage.stream.checkpoint)
    _put(stage, {name: weights.pop(name).to(dtype) for name in LINEARS if name not in starts})
    return {name: weight if (wanted := starts[name].wanted) is None else wanted for name, weight in weights.items()}


def _put(stage: Stage, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        stage.linear(name).weight = nn.Parameter(weight.to(stage.stream.dtype), requires_grad=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """Some rows of a batch."""

    batch: int
    rows: Tensor
    tokens: int


def _split(stage: Stage) -> tuple[list[_Piece], list[_Piece]]:
    """Return the pieces to learn from and those held out, the same for every layer; a lone piece is both."""
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for number, (rows, length, _) in enumerate(stage.hidden.shapes):
        together = max(1, PIECE_TOKENS // length)
        order = torch.randperm(rows, generator=generator)
        for start in range(0, rows, together):
            chosen = order[start : start + together]
            pieces.append(_Piece(batch=number, rows=chosen, tokens=len(chosen) * length))
    drawn = [pieces[place] for place in torch.randperm(len(pieces), generator=generator).tolist()]
    aside = max(1, len(pieces) // HELD_OUT)
    return drawn[aside:] or drawn, drawn[:aside]


class _Lesson:
    """What a layer is to give: rows of the rounded model's hidden states, and what 16 bit makes of its own."""

    def __init__(self, stage: Stage, target: Activations) -> None:
        self._stage, self._target = stage, target

    def errors(self, piece: _Piece) -> tuple[Tensor, float]:
        """Return the weighted sum of the tokens' squared errors, and the sum of their weights.

        A token's is relative to what it is to be: the first ones of a text can be a thousand times as large as all
        others, and a layer that is fitted to those of a few rows fails where a text begins otherwise.
        """
        stage, rows = self._stage, piece.rows
        states = stage.hidden[piece.batch][rows]
        wanted = self._target[piece.batch][rows].to(stage.stream.device).float()
        found = stage.stream.run_layer(stage.index, stage.layer, _some(stage.batches[piece.batch], rows), states)
        weights, size = self._weights(piece), wanted.square().mean(dim=-1).clamp(min=1e-12)
        return ((found.float() - wanted).square().mean(dim=-1) / size * weights).sum(), float(weights.sum())

    def _weights(self, piece: _Piece) -> Tensor:
        stage = self._stage
        if stage.weights is None:
            return stage.batches[piece.batch].masks["attention_mask"][piece.rows].to(stage.stream.device).float()
        return (
            stage.weights[piece.batch].reshape(stage.hidden.shapes[piece.batch][:2])[piece.rows].to(stage.stream.device)
        )

    @torch.no_grad()
    def loss(self, pieces: Sequence[_Piece]) -> float:
        """Return the weighted mean of the pieces' relative squared errors, in the dtype that the layer will run in."""
        found = [self.errors(piece) for piece in pieces]
        return float(sum(error for error, _ in found)) / max(sum(weight for _, weight in found), 1e-12)


def _some(batch: Prefill, rows: Tensor) -> Prefill:
    """Return positions and masks of some rows, which is all that a layer is told of a batch."""
    masks = {name: mask[rows] for name, mask in batch.masks.items()}
    return replace(batch, masks=masks, position_ids=batch.position_ids[..., rows, :])


def _learn(
    stage: Stage,
    learnt: Mapping[str, _Learnt],
    lesson: _Lesson,
    pieces: Sequence[_Piece],
    steps: int,
    anchor: float,
) -> Iterator[int]:
    """Take so many steps, each as long as there are steps left, and yield now and then, at the end for sure.

    ``anchor`` is what the linears' own errors count together as they start, in the loss of a token. The layer's own
    weights are lost.
    """
    mean = sum(piece.tokens for piece in pieces) / len(pieces)
    together = min(len(pieces), math.ceil(STEP_TOKENS / mean))
    first = min(1 / steps, LONGEST_STEP)
    drawn = _drawn(pieces, torch.Generator().manual_seed(stage.index))
    for step in range(steps):
        with torch.enable_grad():
            for name, each in learnt.items():
                stage.linear(name).weight = nn.Parameter(each.weight().to(stage.stream.products))
            tokens = 0.0
            for piece in itertools.islice(drawn, together):
                error, weight = lesson.errors(piece)
                error.backward()  # type: ignore[no-untyped-call]
                tokens += weight
        for name, each in learnt.items():
            own = each.own_gradient(stage.stream.products).mul_(anchor * tokens / len(learnt))
            each.step(own.add_(stage.linear(name).weight.grad), (1 - step / steps) * first)
        if step == steps - 1 or (step + 1) % math.ceil(steps / CHECKS) == 0:
            yield step


def _drawn(pieces: Sequence[_Piece], generator: torch.Generator) -> Iterator[_Piece]:
    """Yield all pieces in random order, again and again."""
    while True:
        for place in torch.randperm(len(pieces), generator=generator).tolist():
            yield pieces[place]


class _Adam:
    """Running means of a gradient and of its square (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980)."""

    def __init__(self, like: Tensor) -> None:
        self._mean, self._square, self._steps = torch.zeros_like(like), torch.zeros_like(like), 0

    def direction(self, gradient: Tensor) -> Tensor:
        """Return where to go: as long as 1 where the gradient stays as it is."""
        self._steps += 1
        self._mean.lerp_(gradient, 1 - MEMORY)
        self._square.mul_(SQUARE_MEMORY).addcmul_(gradient, gradient, value=1 - SQUARE_MEMORY)
        size = (self._square / (1 - SQUARE_MEMORY**self._steps)).sqrt_().add_(1e-12)
        return (self._mean / (1 - MEMORY**self._steps)).div_(size)


class _Learnt:
    """A linear's codes as real numbers: where a weight lies among the integers, and what each scale is times by.

    Columns lie group by group. A weight starts where it is within its integer's cell, so one that GPTQ rounded the
    other way starts next to the border.
    """

    def __init__(self, weight_RC: Tensor, start: Codes) -> None:
        self._start = start
        order = torch.argsort(start.group_of, stable=True)
        self._order = None if torch.equal(order, torch.arange(len(order), device=order.device)) else order
        self._scale = start.grid.scale.float().unsqueeze(-1)
        self._zero = start.grid.zero.float().unsqueeze(-1)
        self._factor = torch.ones_like(self._scale)
        ints = self._grouped(start.ints).float()
        place = self._grouped(weight_RC).float().div(self._scale).add_(self._zero)
        self._place = torch.minimum(torch.maximum(place, ints - EDGE), ints + EDGE)
        self._of_place, self._of_factor = _Adam(self._place), _Adam(self._factor)
        self._original = weight_RC
        self._cost = float(self._error_moments(torch.float32).mul_(self._error()).sum())

    def _error(self) -> Tensor:
        return self.weight().sub_(self._original)

    def _error_moments(self, products: torch.dtype) -> Tensor:
        return (self._error().to(products) @ self._start.moments.to(products)).float()

    def own_gradient(self, products: torch.dtype) -> Tensor:
        """Return the gradient of the linear's own error, tr((W - Q) H (W - Q)ᵀ), over what it was at first, R × C."""
        return self._error_moments(products).mul_(2 / max(self._cost, 1e-30))

    def _grouped(self, values_RC: Tensor) -> Tensor:
        ordered = values_RC if self._order is None else values_RC[:, self._order]
        return ordered.reshape(*self._scale.shape[:2], -1)

    def scale(self) -> Tensor:
        """Return the scales as float16 holds them, R × G × 1."""
        found = self._scale * self._factor
        return (found.abs().clamp(SMALLEST, LARGEST) * self._scale.sign()).half().float()

    def weight(self) -> Tensor:
        """Return the weights that the codes stand for, R × C."""
        found = self._place.round().sub_(self._zero).mul_(self.scale()).flatten(1)
        return found if self._order is None else found[:, torch.argsort(self._order)]

    def step(self, gradient_RC: Tensor, rate: float) -> None:
        """Move against the gradient by about ``rate``, less where its sign keeps changing (Adam)."""
        gradient = self._grouped(gradient_RC).float()
        of_scale = (self._place.round().sub_(self._zero).mul_(gradient)).sum(dim=-1, keepdim=True) * self._scale
        self._factor.sub_(self._of_factor.direction(of_scale), alpha=SCALE_SHARE * rate)
        self._factor.clamp_(SMALLEST_FACTOR, LARGEST_FACTOR)
        self._place.sub_(self._of_place.direction(gradient * self._scale), alpha=rate)
        self._place.clamp_(-BEYOND, 2**self._start.bits - 1 + BEYOND)  # off the grid there is nothing to round to

    def codes(self) -> Codes:
        """Return the codes that stand now."""
        ints = self._place.round().flatten(1).to(torch.uint8)
        if self._order is not None:
            ints = ints[:, torch.argsort(self._order)]
        like = self._start.grid
        grid = Grid(scale=self.scale().squeeze(-1).to(like.scale.dtype), zero=like.zero)
        return replace(self._start, ints=ints.contiguous(), grid=grid)
