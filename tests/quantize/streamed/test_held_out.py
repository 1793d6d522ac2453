"""Held-out KL is that between the two whole models, on rows that were not calibrated on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from calibration.sets.mix import Mix
from calibration.sets.samples import CalibrationOptions, calibrate_on
from calibration.streaming.batches import Row
from quantize.methods.settings import RunOptions
from quantize.streamed.compress import compress
from quantize.streamed.held_out import HeldOut, held_out_samples
from quantize.streamed.options import describe
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.network.loading import load_safe_vlm
from safevlm.network.prompt_tokens import IMAGE
from safevlm.network.safe_vlm import SafeVLM
from tests.quantize.streamed.test_compress import Plans, four_bits, w8a8

FEW = CalibrationOptions(mix=Mix(samples=8), answers="none")


def hidden_states(model: SafeVLM, rows: Sequence[Row]) -> Tensor:
    """Return the last hidden states of rows that run together, padded on the left, B × L × D."""
    pictures = [row.sample.picture() for row in rows if row.shows_image]
    sequences = [row.ids for row in rows]
    if not pictures:
        prefill = model.assemble(sequences)
    else:
        rgb = torch.from_numpy(np.stack([model.preprocessing.apply(each) for each in pictures if each is not None]))
        size = (model.preprocessing.height, model.preprocessing.width)
        prefill = model.assemble(sequences, model.image_features(rgb), size)
    return model.language_forward(prefill.inputs_embeds, prefill.masks, prefill.position_ids)


def divergence(before: SafeVLM, after: SafeVLM, rows: Sequence[Row], at: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the KL of what follows the tokens at some places of rows, counted from the row's end, in float64.

    Over the words of the one before: the other may know ``<image>`` as well.
    """
    words = len(before.token_logits(hidden_states(before, rows[:1])[0, :1])[0])
    was, now = (
        [
            model.token_logits(states[back])[:, :words].double().log_softmax(dim=-1)
            for states, back in zip(found, at, strict=True)
        ]
        for model, found in ((before, hidden_states(before, rows)), (after, hidden_states(after, rows)))
    )
    return [(one.exp() * (one - other)).sum(dim=1) for one, other in zip(was, now, strict=True)]


def places(row: Row, other: Row) -> list[int]:
    """Return which tokens are compared of two rows of a sample, as negative places."""
    common = 0
    while common < min(len(row.ids), len(other.ids)) and row.ids[-1 - common] == other.ids[-1 - common]:
        common += 1
    return [place for place in range(-common, -1) if row.ids[place] != IMAGE][:64]


@pytest.mark.parametrize(
    ("name", "plan"), [("tiny-safellava", four_bits), ("tiny-safeqwen", four_bits), ("tiny-safegem", w8a8)]
)
@torch.no_grad()
def test_it_is_that_of_the_whole_models(name: str, plan: Plans, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(name)
    chosen = calibrate_on(checkpoint, FEW, lambda _: None)
    options = RunOptions(guard_images=0)
    assert options.dtype_name == "float32", "in which the whole models run"
    found = compress(checkpoint, tmp_path / "out", plan(checkpoint), FEW, options, chosen=chosen)
    kl = found.record["held_out_kl"]
    samples, unseen = held_out_samples(chosen, FEW.mix.seed)
    assert unseen and not {sample.where for sample in samples} & {sample.where for sample in chosen.samples}
    held = HeldOut(samples, [None] * len(samples), unseen=True, seed=FEW.mix.seed, batch_tokens=options.batch_tokens)
    before, after = load_safe_vlm(checkpoint), load_safe_vlm(open_checkpoint(str(found.out)))
    held.lay_out(before, None)
    rows = [row for batch in held.packed for row in batch]
    usual = {row.sample.where: row for row in rows if row.beginning == "usual"}
    sums: dict[str, list[Tensor]] = defaultdict(list)
    # inputs at the border of two of 256 steps fall with the last bit of a sum, which is that of the product's shape
    together = held.packed if plan is w8a8 else [(row,) for row in rows]
    for batch in together:
        others = [next(each for each in rows if each.sample == row.sample and each is not row) for row in batch]
        at = [places(row, other) for row, other in zip(batch, others, strict=True)]
        for row, found_M in zip(batch, divergence(before, after, batch, at), strict=True):
            sums["usual" if row.beginning == "usual" else "other"].append(found_M)
    assert len(usual) == len(rows) // 2 == kl["samples"] == 2
    assert kl["tokens"] == len(torch.cat(sums["usual"])) == len(torch.cat(sums["other"]))
    assert kl["as_calibrated"] == pytest.approx(float(torch.cat(sums["usual"]).mean()), rel=1e-3, abs=3e-7)
    assert kl["other_beginnings"] == pytest.approx(float(torch.cat(sums["other"]).mean()), rel=1e-3, abs=3e-7)
    assert set(kl["by_beginning"]) == {row.beginning for row in rows} - {"usual"}
    (line,) = [line for line in describe(found, "next") if line.startswith("KL to the 16-bit model")]
    assert f"{kl['as_calibrated']:.4f} as calibrated, {kl['other_beginnings']:.4f} with other" in line
    assert "held-out" in line


def test_a_source_without_others_says_so_and_a_long_sample_is_left_out() -> None:
    chosen = calibrate_on(open_checkpoint("tiny-safegem"), FEW, lambda _: None)
    alone = replace(chosen, source=replace(chosen.source, samples=chosen.samples))
    samples, unseen = held_out_samples(alone, 0)
    assert not unseen and set(samples) <= set(chosen.samples)
    assert len(held_out_samples(chosen, 0)[0]) == 2
    assert held_out_samples(chosen, 0) == held_out_samples(chosen, 0) != held_out_samples(chosen, 1)
    many = replace(chosen, samples=chosen.source.samples[:320])
    assert len(held_out_samples(many, 0)[0]) == 8
    held = HeldOut(samples, [None] * len(samples), unseen=False, seed=0, batch_tokens=100)
    held.lay_out(load_safe_vlm(open_checkpoint("tiny-safegem")), 5)
    assert held.packed == []
