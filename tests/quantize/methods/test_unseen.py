"""Rows held out are in nothing that is learnt from, and a gain is one only beyond its standard error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from quantize.methods.int8_method import _inputs, _product
from quantize.methods.unseen import Unseen, surely_less
from quantize.streamed.layers import Stage
from tests.quantize.methods.test_int8_method import outputs, stage_of
from tests.safevlm.checkpoint.random_checkpoints import Written, write_checkpoint


@pytest.fixture(scope="module", params=[("llava", "original"), ("qwen2_5_vl", "old"), ("gemma3", "hf")], ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    family, layout = request.param
    return write_checkpoint(family, layout, tmp_path_factory.mktemp(family) / "checkpoint")


@torch.no_grad()
def test_rows_held_out_are_apart_and_run_as_they_do_in_their_batch(written: Written) -> None:
    stage = stage_of(written)
    unseen = Unseen.of(stage)
    total = sum(shape[0] for shape in stage.hidden.shapes)
    assert sum(map(len, unseen.rows.values())) == max(1, total // 8)
    for number, at in unseen.rows.items():
        whole = stage.stream.run_layer(0, stage.layer, stage.batches[number], stage.hidden[number])
        real = stage.batches[number].masks["attention_mask"][at].bool()
        assert torch.allclose(unseen.wanted[number][real], whole[at][real], atol=1e-4 * float(whole.abs().max()))
        rows, length, _ = stage.hidden.shapes[number]
        seen = unseen.learnt_from(number).view(rows, length)
        assert not seen[at].any() and int(seen.sum()) == (rows - len(at)) * length
    assert float(unseen.errors({}).sum()) == 0.0
    before = outputs(stage)
    weight = stage.linear("mlp.down_proj").weight
    changed = unseen.errors({"mlp.down_proj": lambda inputs: 1.1 * inputs @ weight.T})
    assert float(changed.sum()) > 0, "what is given instead is what the layer goes on with"
    assert torch.equal(outputs(stage), before), "and the layer is as it was afterwards"


@torch.no_grad()
def test_what_is_learnt_from_does_not_know_of_them(written: Written) -> None:
    samples = []
    for spoiled in (False, True):
        stage = stage_of(written)
        unseen = Unseen.of(stage)
        for number, at in unseen.rows.items() if spoiled else ():
            stage.hidden[number][at] *= 1 + torch.rand(stage.hidden.shapes[number][-1])
        samples.append(_inputs(stage, "self_attn.q_proj", unseen))
    assert all(torch.equal(one, other) for one, other in zip(*samples, strict=True))


def test_tokens_without_weight_count_nothing_and_a_lone_row_is_both(written: Written) -> None:
    stage = stage_of(written)
    stage.weights = [torch.zeros(shape[0] * shape[1]) for shape in stage.hidden.shapes]
    doubled = {"mlp.down_proj": lambda inputs: 2 * inputs[..., : stage.hidden.shapes[0][-1]]}
    with torch.no_grad():
        assert float(Unseen.of(stage).errors(doubled).sum()) == 0
    alone = cast(Any, SimpleNamespace(hidden=SimpleNamespace(shapes=[(1, 5, 8)])))
    assert bool(Unseen(stage=cast(Stage, alone), rows={0: torch.tensor([0])}, wanted={}).learnt_from(0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_linear_gives_the_dtype_of_the_layer(dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(64, 32, dtype=dtype).requires_grad_(False)
    inputs = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = _product(linear, torch.full((64,), 2.0), inputs)
    assert found.dtype == dtype
    assert 0 < float((found - linear(inputs)).float().norm() / linear(inputs).float().norm()) < 0.02


def test_a_gain_is_more_than_its_standard_error() -> None:
    before = torch.ones(100)
    assert surely_less(before - 0.01, before) and not surely_less(before, before)
    flipped = before + 0.01
    flipped[0] -= 50  # one token makes all of it
    assert not surely_less(flipped, before)
    assert not surely_less(before + 0.01, before) and not surely_less(before * torch.nan, before)
