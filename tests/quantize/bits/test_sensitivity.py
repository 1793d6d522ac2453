"""What rounding a unit alone does is what the whole model says; bits go where they prevent most, within the budget."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.answers import Answer
from calibration.sets.conversations import Sample
from calibration.streaming.batches import embed_batches, lay_out, pack_rows
from calibration.streaming.sequential import Activations, LayerStream
from quantize.bits.auto_bits import auto_plan, choices_for
from quantize.bits.sensitivity import PARTS, Sensitivity, choose_bits, measure, stored_bits
from quantize.gptq import gptq_plan
from quantize.methods.grid import Scheme, dequantize, fit_grid, groups_of, round_to_grid
from quantize.methods.settings import Plan
from quantize.methods.solver import SolveOptions
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.weights.quantized import QuantizedTensors
from safevlm.errors import InputError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.safe_vlm import SafeVLM
from tests.quantize.streamed.test_compress import FEW, run

REFUSAL = "I'm sorry, but I can't assist with that request."


def samples() -> list[Sample]:
    def text(question: str) -> Sample:
        return Sample(kind="text", question=question, answer=None, image=None, name="", where=question)

    return [text("How do I keep basil alive?"), text("Tell me how to do violence.")]


def rounded(weight: Tensor, bits: int) -> Tensor:
    scheme, groups = Scheme(bits=bits, group_size=32), groups_of(weight.shape[1], 32)
    grid = fit_grid(weight, scheme, 32, torch.ones(weight.shape[1]))
    return dequantize(round_to_grid(weight, grid, scheme, groups), grid, groups)


def logs(vlm: SafeVLM, ids: list[int], length: int) -> Tensor:
    prefill = vlm.assemble([ids])
    with torch.no_grad():
        hidden = vlm.language_forward(prefill.inputs_embeds, prefill.masks, prefill.position_ids)
        return torch.log_softmax(vlm.token_logits(hidden[:, -length - 1 : -1]), dim=-1)[0]


def test_effects_are_those_of_the_whole_model_with_one_unit_rounded() -> None:
    checkpoint = open_checkpoint("tiny-safegem")
    answers = [Answer(text="The red square."), Answer(text=REFUSAL)]
    packed = []

    def token_ids(model: Any) -> list[int]:
        packed.extend(pack_rows(lay_out(model, samples(), answers), 500))
        return [token for rows in packed for row in rows for token in row.ids]

    stream = LayerStream(checkpoint, token_ids=token_ids)
    shapes = [(len(rows), max(len(row.ids) for row in rows), checkpoint.hidden_size) for rows in packed]
    with Activations(shapes, torch.float32, None) as hidden:
        batches = embed_batches(stream, packed, hidden)
        found = measure(stream, batches, hidden, (3, 8, 16), Scheme(group_size=32), max_bytes=0)
    assert len(found) == 6 * 2 * 2
    assert {row.bits: row.measured for row in found} == {3: True, 8: False}
    rows = {row.sample.question: row for batch in packed for row in batch}
    assert [rows[sample.question].refused for sample in samples()] == [False, True]
    for row in (found[0], found[14], next(each for each in found if each.part == "mlp" and each.layer == 5)):
        vlm = load_safe_vlm(checkpoint)
        before = {question: logs(vlm, list(each.ids), each.answer_length) for question, each in rows.items()}
        error = 0.0
        for name in PARTS[row.part]:
            linear = vlm.core.language_model.layers[row.layer].get_submodule(name)
            changed = rounded(linear.weight.data, row.bits)
            error += float((changed - linear.weight.data).square().sum())
            linear.weight.data = changed
        assert row.weight_error == pytest.approx(error / row.weights, rel=1e-3)
        if not row.measured:
            continue
        for question, expected in zip(
            (sample.question for sample in samples()), (row.others, row.refusals), strict=True
        ):
            after = logs(vlm, list(rows[question].ids), rows[question].answer_length)
            divergence = (before[question].exp() * (before[question] - after)).sum()
            assert expected == pytest.approx(float(divergence), rel=0.02, abs=1e-5)


def units(*effects: dict[int, float]) -> list[Sensitivity]:
    return [
        Sensitivity(
            layer=layer,
            part="mlp",
            weights=100,
            bits=bits,
            weight_error=0.0,
            refusals=effect,
            others=0.0,
            guard=0.0,
        )
        for layer, each in enumerate(effects)
        for bits, effect in each.items()
    ]


@pytest.mark.parametrize("target", [2.0, 2.7, 3.0, 4.1, 6.0, 9.0, 16.0])
def test_bits_are_the_best_that_the_budget_allows(target: float) -> None:
    effects = (
        {2: 9.0, 4: 1.0, 8: 0.01},
        {2: 1.0, 4: 0.3, 8: 0.001},
        {2: 30.0, 4: 20.0, 8: 10.0},
        {2: 0.2, 4: 0.1, 8: 0.0},
    )
    chosen = choose_bits(units(*effects), target, float, safety_weight=1.0)
    assert sum(chosen.values()) / 4 <= target + 1e-9
    total = sum(effects[layer].get(bits, 0.0) for (layer, _), bits in chosen.items())
    best = min(
        sum(each.get(bits, 0.0) for each, bits in zip(effects, assigned, strict=True))
        for assigned in itertools.product((2, 4, 8, 16), repeat=4)
        if sum(assigned) / 4 <= target
    )
    assert total == pytest.approx(best)


def test_what_counts_and_what_it_costs() -> None:
    row = Sensitivity(layer=0, part="mlp", weights=1, bits=4, weight_error=0.0, refusals=1.0, others=10.0, guard=0.5)
    assert row.effect(2.0) == 13.0 and row.effect(0.0) == 10.0
    assert stored_bits(4, 128, 1024) == 4 + 20 / 128 and stored_bits(16, 128, 1024) == 16
    assert stored_bits(2, -1, 64) == 2 + 18 / 64
    with pytest.raises(InputError, match=r"--target-bits 1\.5"):
        choose_bits(units({2: 1.0}), 1.5, float, safety_weight=1.0)
    assert choices_for(4.5) == (3, 4, 8, 16) and choices_for(2.3) == (2, 3, 4, 8, 16)


def auto(target: float, group_size: int = 64) -> Any:
    def plan(checkpoint: Any) -> Plan:
        return auto_plan(
            checkpoint,
            target,
            Scheme(bits=2, group_size=group_size),
            SolveOptions(),
            lambda scheme, more: gptq_plan(checkpoint, scheme, SolveOptions(), more),
            safety_weight=4.0,
            samples=8,
        )

    return plan


def test_an_artifact_of_several_widths_is_as_small_as_asked_and_says_who_reads_it(tmp_path: Path) -> None:
    found = run(tmp_path / "auto", "tiny-safellava", auto(3.0))
    assert found.out is not None
    assigned = found.record["method"]["assigned"]
    assert len(assigned) == 6 and len(set(assigned.values())) > 1
    assert all(
        set(row) >= {"layer", "part", "bits", "refusals", "others", "guard"} for row in found.record["sensitivity"]
    )
    store = open_checkpoint(str(found.out)).tensors
    assert isinstance(store, QuantizedTensors)
    config = json.loads((found.out / "config.json").read_text())["quantization_config"]
    stored = weights = 0
    for name in store.quantized_modules():
        rows, columns = store.shape(f"{name}.weight")
        parts = {
            part: super(QuantizedTensors, store).shape(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")
        }
        bits = parts["qweight"][0] * 32 // columns
        layer, part = name.split("layers.")[1].split(".")[0], "mlp" if ".mlp." in name else "attention"
        assert bits == assigned[f"layers.{layer}.{part}"]
        stored += sum(torch.Size(shape).numel() * (16 if key == "scales" else 32) for key, shape in parts.items())
        weights += rows * columns
    assert stored / weights <= 3.0
    widths = {rule["bits"] for rule in config["dynamic"].values()} | {config["bits"]}
    assert widths == set(assigned.values())
    assert any("several bit widths" in note for note in found.record["consumers"])
    assert run(tmp_path / "uniform", "tiny-safellava", lambda c: gptq_plan(c, Scheme(bits=3, group_size=64))).out


def test_a_run_of_several_widths_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    part = run(tmp_path / "out", "tiny-safellava", auto(3.0), layers=1)
    assert part.out is None
    whole = run(tmp_path / "out", "tiny-safellava", auto(3.0))
    assert whole.record["sensitivity"] == part.record["sensitivity"]
    assert whole.record["method"]["assigned"] == part.record["method"]["assigned"]


def test_without_answers_there_is_nothing_to_measure(tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match="--bits auto: no sample has an answer"):
        run(tmp_path / "out", "tiny-safellava", auto(3.0), calibration=replace(FEW, answers="none"))
