"""The importance matrix is the weighted mean square of what each linear reads."""

from __future__ import annotations

import numpy as np
import torch

from calibration.sets.mix import Mix
from calibration.sets.samples import CalibrationOptions, answers_of, calibrate_on
from calibration.streaming.batches import TokenWeights
from export.gguf.importance import PLACES, measure_importance
from quantize.streamed.layers import LINEARS
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.network.loading import load_safe_vlm

PLENTY = 2**33


def test_it_is_what_the_whole_model_reads() -> None:
    checkpoint = open_checkpoint("tiny-safeqwen")
    options = CalibrationOptions(mix=Mix(samples=6), weights=TokenWeights(refusal_weight=2.0))
    found = measure_importance(checkpoint, options, max_memory=PLENTY)
    vlm = load_safe_vlm(checkpoint)
    chosen = calibrate_on(checkpoint, options, lambda _: None)
    answers = answers_of(checkpoint, chosen.samples, options, max_memory=PLENTY)
    from calibration.streaming.batches import embed_batches, lay_out, pack_rows  # the batches that were measured
    from calibration.streaming.sequential import Activations, LayerStream

    packed: list[tuple[object, ...]] = []

    def token_ids(model: object) -> list[int]:
        rows = lay_out(model, chosen.samples, answers, beginnings=options.beginnings)  # type: ignore[arg-type]
        packed.extend(pack_rows(rows, 2048))
        return [token for rows in packed for row in rows for token in row.ids]  # type: ignore[attr-defined]

    stream = LayerStream(checkpoint, token_ids=token_ids)
    shapes = [(len(rows), max(len(row.ids) for row in rows), checkpoint.hidden_size) for rows in packed]  # type: ignore[attr-defined]
    sums, total = 0.0, 0.0
    seen: list[torch.Tensor] = []
    layer = vlm.core.language_model.layers[1]
    hook = layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with Activations(shapes, torch.float32, None) as hidden, torch.no_grad():
        for number, batch in enumerate(embed_batches(stream, packed, hidden)):  # type: ignore[arg-type]
            weights = options.weights.of(batch.prefill, batch.refused())
            vlm.language_forward(hidden[number], batch.prefill.masks, batch.prefill.position_ids)
            sums = sums + weights @ seen.pop().flatten(0, 1).square()
            total += float(weights.sum())
    hook.remove()
    np.testing.assert_allclose(found.matrix["blk.1.ffn_down.weight"], np.asarray(sums) / total, rtol=1e-4, atol=1e-8)
    assert set(found.matrix) == {f"blk.{index}.{PLACES[name]}.weight" for index in range(3) for name in LINEARS}
    assert found.record.samples == 6 and not found.record.leaked and found.record.tokens > 100
