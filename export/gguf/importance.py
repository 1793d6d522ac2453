"""The importance matrix: how much each input column of a decoder linear carries, over calibration samples.

It is the weighted mean square of the column, which llama.cpp weighs rounding errors by; decoder layers stream by, so
that a model larger than memory can be measured. Image tokens and refusals count as they do for GPTQ.

Shapes: T tokens, C input columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from calibration.sets.mix import samples_sha256
from calibration.sets.samples import CalibrationOptions, answers_of, calibrate_on
from calibration.streaming.batches import Row, embed_batches, lay_out, pack_rows
from calibration.streaming.sequential import Activations, LayerStream
from quantize.streamed.layers import SHARED_INPUTS
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.contract.gguf_manifest import Importance

__all__ = ["Measured", "measure_importance"]

BATCH_TOKENS = 2048
PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""llama.cpp's names, the same in all three families."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Mean squares by tensor name in the file, C each, and what they were measured on."""

    matrix: dict[str, npt.NDArray[np.float32]]
    record: Importance


@torch.no_grad()
def measure_importance(
    checkpoint: Checkpoint,
    options: CalibrationOptions,
    *,
    max_memory: int,
    report: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Measure every decoder linear's inputs. ``max_memory`` bounds what activations take in memory, in bytes.

    Raises InputError for a bad or leaking calibration set; CheckpointError.
    """
    chosen = calibrate_on(checkpoint, options, report)
    answers = answers_of(checkpoint, chosen.samples, options, max_memory=max_memory, say=report, report=report)
    packed: list[tuple[Row, ...]] = []

    def token_ids(model: Any) -> list[int]:
        rows = lay_out(
            model,
            chosen.samples,
            answers,
            max_length=options.max_length,
            beginnings=options.beginnings,
            seed=options.mix.seed,
        )
        packed.extend(pack_rows(rows, BATCH_TOKENS))
        return [token for rows in packed for row in rows for token in row.ids]

    stream = LayerStream(checkpoint, grid=options.grid, token_ids=token_ids)
    shapes = [(len(rows), max(len(row.ids) for row in rows), checkpoint.hidden_size) for rows in packed]
    matrix: dict[str, npt.NDArray[np.float32]] = {}
    with Activations(shapes, torch.float32, max_memory) as hidden:
        batches = embed_batches(stream, packed, hidden, report)
        stream.forget_vision()
        weights = [options.weights.of_batch(batch) for batch in batches]
        watched = _Watched(weights)
        prefills = [batch.prefill for batch in batches]
        for index, layer in stream.layers():
            report(f"importance, layer {index + 1} of {len(stream)}")
            watched.begin(layer)
            stream.advance(index, layer, prefills, hidden)
            matrix |= {f"blk.{index}.{PLACES[name]}.weight": values for name, values in watched.end().items()}
    record = Importance(
        samples=len(chosen.samples),
        samples_sha256=samples_sha256(chosen.samples, [None] * len(chosen.samples)),
        source_sha256=chosen.source.sha256,
        tokens=int(sum(int((weight > 0).sum()) for weight in weights)),
        leaked=not chosen.leakage.clean,
    )
    return Measured(matrix=matrix, record=record)


class _Watched:
    """Adds up squares of what a layer's linears read while it runs over the batches in order."""

    def __init__(self, weights: list[Tensor]) -> None:
        self._weights = weights
        self._sums: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def begin(self, layer: nn.Module) -> None:
        """Watch a layer; linears that share their input are looked at once."""
        self._sums = {}
        for names in SHARED_INPUTS:
            counter = iter(self._weights)

            def add(_: nn.Module, given: tuple[Tensor, ...], name: str = names[0], counter: Any = counter) -> None:
                squares = given[0].float().flatten(0, 1).square()
                total = next(counter) @ squares
                self._sums[name] = self._sums[name] + total if name in self._sums else total

            self._hooks.append(layer.get_submodule(names[0]).register_forward_pre_hook(add))

    def end(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the weighted mean squares of every linear's inputs."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        total = float(sum(float(weight.sum()) for weight in self._weights))
        return {
            name: (self._sums[names[0]] / total).numpy().astype(np.float32) for names in SHARED_INPUTS for name in names
        }
