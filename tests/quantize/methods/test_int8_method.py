"""Moving outliers into the weights changes no output; where it does not help, none are moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.streaming.sequential import Activations, LayerStream
from quantize.methods import int8_method
from quantize.methods.int8_method import STRENGTHS, W8A8, _Fold
from quantize.streamed.layers import LINEARS, SHARED_INPUTS, Rounded, Stage, round_layers
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.weights.quantized import dequantized, round_tokens
from tests.quantize.streamed.test_layers import prefills
from tests.safevlm.checkpoint.random_checkpoints import QUESTIONS, SIZE, Written, write_checkpoint

FAMILIES = (("llava", "original"), ("qwen2_5_vl", "old"), ("gemma3", "hf"))


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda pair: pair[0])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    family, layout = request.param
    return write_checkpoint(family, layout, tmp_path_factory.mktemp(family) / "checkpoint")


def stage_of(written: Written, outlier: float = 1.0) -> Stage:
    checkpoint = open_checkpoint(str(written.folder), tap="language_model")
    stream = LayerStream(
        checkpoint,
        grid=SIZE[written.family],
        token_ids=lambda model: [token for question in QUESTIONS for token in model.prompt_ids(question)],
    )
    batches = prefills(stream.skeleton, written)
    hidden = Activations([(*batch.inputs_embeds.shape,) for batch in batches], torch.float32, None)  # type: ignore[misc]
    for number, batch in enumerate(batches):
        hidden[number].copy_(batch.inputs_embeds)
    layer: Any = stream.load_layer(0)
    for norm in (layer.input_layernorm, getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)):
        norm.weight.data[3] = outlier * (1 + norm.weight.data[3])
    return Stage(
        index=0,
        layer=layer,
        stream=stream,
        batches=batches,
        hidden=hidden,
        weights=None,
        prefix="model.language_model.layers.0.",
    )


def outputs(stage: Stage) -> Tensor:
    found = [
        stage.stream.run_layer(0, stage.layer, batch, stage.hidden[number])
        for number, batch in enumerate(stage.batches)
    ]
    return torch.cat(
        [each[batch.masks["attention_mask"].bool()] for each, batch in zip(found, stage.batches, strict=True)]
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_division_that_is_folded_changes_no_output(written: Written, dtype: torch.dtype) -> None:
    stage = stage_of(written)
    before = outputs(stage)
    generator = torch.Generator().manual_seed(0)
    for names in SHARED_INPUTS:
        fold = _Fold.before(stage, names[0])
        width = stage.linear(names[0]).in_features
        wanted = fold.shared(torch.exp(torch.randn(width, generator=generator)))
        if fold.linear is not None and fold.linear.bias is not None:
            fold.linear.bias.data.zero_()  # rounded to 16 bit, which is not what is tested
            before = outputs(stage)
        factor = fold.apply(wanted, dtype)
        assert torch.allclose(factor, wanted, rtol=0.2, atol=0.02)
        for name in names:
            stage.linear(name).weight.data = stage.linear(name).weight.data * factor
        after = outputs(stage)
        assert (after - before).abs().max() <= 2e-5 * before.abs().max(), names


@torch.no_grad()
def test_outliers_are_moved_and_make_the_rounded_layer_better(written: Written) -> None:
    errors = {}
    for strengths in ((0.0,), STRENGTHS):
        stage = stage_of(written, outlier=60.0)
        before = outputs(stage)
        rounded = W8A8(strengths=strengths, steps=0).round_layer(stage)
        after = outputs(stage)
        errors[strengths] = float((after - before).norm() / before.norm())
        assert [row["linear"] for row in rounded.report] == list(LINEARS)
        for name in LINEARS:
            parts = {part: rounded.tensors[f"{name}.{part}"] for part in ("weight", "weight_scale")}
            assert parts["weight"].dtype == torch.int8
            assert torch.equal(dequantized(parts), stage.linear(name).weight.data), "what runs is what is stored"
        moved = {row["linear"]: row["smoothing"] for row in rounded.report}
        assert (moved["self_attn.q_proj"] > 0) == (moved["mlp.gate_proj"] > 0) == (strengths is STRENGTHS)
        assert all(row["smoothed_error"] <= 1 for row in rounded.report)
        assert not any(row["descent"] for row in rounded.report)
    assert errors[STRENGTHS] < 0.7 * errors[(0.0,)]


@torch.no_grad()
def test_the_descent_is_kept_where_the_layer_gets_better_and_is_off_with_smoothing(written: Written) -> None:
    reports = []
    for strengths, steps in ((STRENGTHS, 0), (STRENGTHS, 60), ((0.0,), 60)):
        reports.append(W8A8(strengths=strengths, steps=steps).round_layer(stage_of(written)).report)
    without, descended, off = reports
    if written.family != "gemma3":  # of which a row of 19 tokens is held out, too few to be sure
        assert any(row["descent"]["kept"] for row in descended)
    assert not any(row["descent"] for row in (*without, *off)) and not any(row["smoothing"] for row in off)
    for row, plain in zip(descended, without, strict=True):
        descent = row["descent"]
        assert descent["loss_after"] < descent["loss_before"] or not descent["kept"]
        if row["linear"].endswith("q_proj"):  # which reads the same in both
            assert row["smoothed_error"] <= plain["smoothed_error"]


@torch.no_grad()
@pytest.mark.parametrize("outlier", [1.0, 30.0, 60.0, 100.0])
def test_a_descent_does_not_lose_to_its_start_beside_outliers(written: Written, outlier: float) -> None:
    errors = []
    for steps in (0, 60):
        stage = stage_of(written, outlier)
        before = outputs(stage)
        W8A8(steps=steps).round_layer(stage)
        lost = (outputs(stage) - before).square().sum(dim=1) / before.square().sum(dim=1)
        errors.append(float(lost.mean().sqrt()))
    assert errors[1] <= 1.1 * errors[0], "0.1 is what tokens that attend to another place by chance make"


@torch.no_grad()
def test_factors_that_make_the_layer_worse_are_not_taken(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(factor: Tensor, *_: object, **__: object) -> Tensor:
        return factor * torch.logspace(-1.5, 1.5, len(factor))[torch.arange(len(factor)) // 64 * 64]

    tensors = []
    for descended in (None, worse):
        if descended is not None:
            monkeypatch.setattr(int8_method, "descend", descended)
        rounded = W8A8(steps=60 if descended else 0).round_layer(stage_of(written))
        tensors.append(rounded.tensors)
        assert not any(row["descent"] and row["descent"]["kept"] for row in rounded.report)
    # what was tried and left is nowhere in what is stored; without a descent the same rows are held out
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@torch.no_grad()
def test_a_restored_layer_gives_what_it_gave(written: Written) -> None:
    def run(finished: dict[int, Rounded]) -> tuple[list[Tensor], dict[int, Rounded]]:
        stage = stage_of(written)
        found: dict[int, Rounded] = {}
        round_layers(
            stage.stream,
            stage.batches,
            stage.hidden,
            W8A8(),
            finished=lambda index: finished[index].tensors if index in finished else None,
            write=lambda index, rounded: found.update({index: rounded}),
        )
        return [stage.hidden[number].clone() for number in range(len(stage.batches))], found

    states, found = run({})
    assert list(found) == [0, 1]
    again, rest = run({0: found[0]})
    assert list(rest) == [1] and all(torch.equal(one, other) for one, other in zip(states, again, strict=True))
    assert all(torch.equal(found[1].tensors[name], tensor) for name, tensor in rest[1].tensors.items())


def test_tokens_are_rounded_to_255_steps_of_their_own() -> None:
    inputs = torch.tensor([[1.0, -2.0, 0.5], [100.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    rounded = round_tokens(inputs)
    assert (rounded - inputs).abs().max(dim=1).values.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=0.4)
    assert torch.equal(rounded[2], inputs[2])
    steps = rounded[0] / (2.0 / 127.5)
    assert torch.allclose(steps, steps.round(), atol=1e-4) and bool((steps >= -128).all())
