"""How far rounding moves text that was not calibrated on: rows that run through the 16-bit layers and the rounded ones.

Each sample is there as the family's usual prompt begins it and with another beginning, and the tokens that both have in
common are compared. Shapes: B rows a batch, L positions, D width of the language model, M tokens compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration.answers import Answer
from calibration.sets.beginnings import OTHER, Writer, system_texts
from calibration.sets.conversations import Sample
from calibration.sets.samples import Calibration
from calibration.streaming.batches import Batch, Row, embed_batches, pack_rows, row_limit, row_of
from calibration.streaming.sequential import Activations, LayerStream
from quantize.streamed.drift import divergence
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.network.prompt_tokens import IMAGE
from safevlm.network.safe_vlm import SafeVLM

__all__ = ["HeldOut", "held_out_samples"]

EACH = 16
"""Samples that are calibrated on for each one held out, so that it takes a few percent of the time."""
FEWEST, MOST = 2, 8
TOKENS = 64
"""Tokens of a row that are compared: the first that it shares with the sample's other row."""


def held_out_samples(chosen: Calibration, seed: int) -> tuple[tuple[Sample, ...], bool]:
    """Return samples to compare on, and whether they are not calibrated on: the source may have no others."""
    used = {sample.where for sample in chosen.samples}
    others = [sample for sample in chosen.source.samples if sample.where not in used]
    source = others or list(chosen.samples)
    wanted = min(MOST, max(FEWEST, len(chosen.samples) // EACH))
    places = np.random.default_rng(seed).permutation(len(source))[:wanted]
    return tuple(source[place] for place in sorted(places.tolist())), bool(others)


class HeldOut:
    """Held-out rows and their hidden states, which go from layer to layer beside those that are calibrated on."""

    def __init__(
        self, samples: Sequence[Sample], answers: Sequence[Answer | None], *, unseen: bool, seed: int, batch_tokens: int
    ) -> None:
        self._samples, self._answers, self._seed, self._batch_tokens = samples, answers, seed, batch_tokens
        self._unseen = unseen
        self._compared: dict[int, tuple[int, ...]] = {}
        self.packed: list[tuple[Row, ...]] = []

    def lay_out(self, model: SafeVLM, max_length: int | None) -> None:
        """Write the rows; samples that are longer than a row may be are left out."""
        writer = Writer(model, self._samples, self._answers, row_limit(model, max_length))
        rng = np.random.default_rng(self._seed)
        rows = []
        for place in range(len(self._samples)):
            kinds = dict.fromkeys(OTHER[place % len(OTHER) :] + OTHER)
            usual = writer.usual(place)
            tried = (writer.otherwise(place, kind, system_texts("held_out"), rng) for kind in kinds)
            other = next((begun for begun in tried if begun is not None), None)
            if other is None or len(usual.ids) > writer.limit:
                continue
            places = _compared(usual.ids, other.ids)
            for begun in (usual, other):
                row = row_of(model, begun, self._answers[place])
                self._compared[id(row)] = places
                rows.append(row)
        self.packed = pack_rows(rows, self._batch_tokens)

    @contextlib.contextmanager
    def open(
        self, stream: LayerStream, max_bytes: int, folder: Path, report: Callable[[str], None]
    ) -> Iterator[HeldOut]:
        """Hold hidden states, in memory up to ``max_bytes``, else in a file in ``folder``; the vision path runs."""
        self._stream = stream
        shapes = [(len(rows), max(len(row.ids) for row in rows), stream.checkpoint.hidden_size) for rows in self.packed]
        with (
            Activations(shapes, stream.dtype, max_bytes // 2, folder) as before,
            Activations(shapes, stream.dtype, max_bytes // 2, folder) as after,
        ):
            self._before, self._after = before, after
            self._batches: list[Batch] = embed_batches(stream, self.packed, before, report)
            for number in range(len(before)):
                after[number].copy_(before[number])
            yield self

    @property
    def nbytes(self) -> int:
        """Bytes that hidden states take in memory."""
        return sum(states.nbytes for states in (self._before, self._after) if not states.on_disk)

    def unrounded(self, index: int, layer: nn.Module) -> None:
        """Run a 16-bit layer over the rows."""
        self._stream.advance(index, layer, [batch.prefill for batch in self._batches], self._before)

    def rounded(self, index: int, layer: nn.Module) -> None:
        """Run the layer that became of it over the rows as the rounded model has them."""
        self._stream.advance(index, layer, [batch.prefill for batch in self._batches], self._after)

    def record(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the mean Kullback-Leibler divergence from the 16-bit model's next token, in nats, once layers ended.

        ``as_calibrated`` are rows with the family's usual prompt, ``other_beginnings`` the same tokens in others.
        """
        for states in (self._before, self._after):
            self._stream.norm(states)
        rows = [(number, place, row) for number, rows in enumerate(self.packed) for place, row in enumerate(rows)]
        before, after = (
            [self._states(states[number][place], row) for number, place, row in rows]
            for states in (self._before, self._after)
        )
        kinds = [row.beginning for (_, _, row), states in zip(rows, before, strict=True) for _ in range(len(states))]
        kl_M = divergence(checkpoint, torch.cat(before), torch.cat(after)) if kinds else torch.empty(0)
        usual_M = torch.tensor([kind == "usual" for kind in kinds], dtype=torch.bool)
        return {
            "unseen": self._unseen,
            "samples": len(rows) // 2,
            "tokens": int(usual_M.sum()),
            "as_calibrated": _mean(kl_M[usual_M]),
            "other_beginnings": _mean(kl_M[~usual_M]),
            "by_beginning": {
                kind: _mean(kl_M[torch.tensor([each == kind for each in kinds])])
                for kind in dict.fromkeys(OTHER)
                if kind in kinds
            },
        }

    def _states(self, states_LD: Tensor, row: Row) -> Tensor:
        return states_LD[[len(states_LD) - back for back in self._compared[id(row)]]].float()


def _compared(usual: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """Return the first places that two rows' ends have in common, counted from the end; images and the last not."""
    common = 0
    while common < min(len(usual), len(other)) and usual[-1 - common] == other[-1 - common]:
        common += 1
    return tuple(back for back in range(common, 1, -1) if usual[-back] != IMAGE)[:TOKENS]


def _mean(kl: Tensor) -> float | None:
    return float(kl.mean()) if len(kl) else None
