"""A layer's codes are tuned on its output: with less error on rows that were not learnt from, or not at all."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.streaming.sequential import Activations, LayerStream
from quantize.methods import tuning
from quantize.methods.gptq_method import Gptq
from quantize.methods.grid import Grid, Scheme, fit_grid, groups_of, round_to_grid
from quantize.methods.solver import ActOrder, SolveOptions
from quantize.methods.tuning import Codes, Tuned, TuneOptions, Tuner, _Learnt
from quantize.streamed.layers import LINEARS, Rounded, round_layers
from quantize.streamed.unfinished import Unfinished
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from tests.quantize.streamed.test_layers import prefills
from tests.safevlm.checkpoint.random_checkpoints import QUESTIONS, SIZE, Written, write_checkpoint

STEPS = TuneOptions(steps=6)


@pytest.fixture(scope="module", params=[("llava", "original"), ("qwen2_5_vl", "old"), ("gemma3", "hf")], ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    family, layout = request.param
    return write_checkpoint(family, layout, tmp_path_factory.mktemp(family) / "checkpoint")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_checkpoint("llava", "original", tmp_path_factory.mktemp("llava") / "checkpoint")


def rounded(
    written: Written, scheme: Scheme, tuner: Tuner | None, *, on_disk: Path | None = None, **more: Any
) -> tuple[list[Rounded], list[torch.Tensor], list[torch.Tensor]]:
    """Return the layers, the last hidden states of the rounded model and those of the 16-bit one."""
    stream = LayerStream(
        open_checkpoint(str(written.folder), tap="language_model"),
        grid=SIZE[written.family],
        token_ids=lambda model: [token for question in QUESTIONS for token in model.prompt_ids(question)],
    )
    batches = prefills(stream.skeleton, written)
    found: list[Rounded] = []
    shapes: Any = [(*batch.inputs_embeds.shape,) for batch in batches]
    room = None if on_disk is None else 0
    with (
        Activations(shapes, torch.float32, room, on_disk) as hidden,
        Activations(shapes, torch.float32, room, on_disk) as target,
    ):
        for number, batch in enumerate(batches):
            hidden[number].copy_(batch.inputs_embeds)
            target[number].copy_(batch.inputs_embeds)
        method = Gptq(scheme_of=more.pop("scheme_of", lambda _: scheme), tuner=tuner, **more)
        round_layers(
            stream, batches, hidden, method, write=lambda _, layer: found.append(layer), target=target, last_states=True
        )
        count = range(len(batches))
        return found, [hidden[number].clone() for number in count], [target[number].clone() for number in count]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_learnt_from_is_nearer_to_the_16_bit_layer(
    written: Written, bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = tuning._split
    monkeypatch.setattr(tuning, "_split", lambda stage: (split(stage)[0],) * 2)
    found, _, _ = rounded(written, Scheme(bits=bits, group_size=32, symmetric=symmetric), Tuner(STEPS))
    for layer in found:
        told = layer.report[0]["tuning"]
        assert all(row["tuning"] == told for row in layer.report)
        assert told["steps"] == STEPS.steps
        assert told["kept"]
        assert told["loss_after"] < told["loss_before"]


def test_rows_held_out_are_not_learnt_from(llava: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """And decide what is kept."""
    split, seen = tuning._split, []
    monkeypatch.setattr(tuning, "_split", lambda stage: seen.append(split(stage)) or seen[-1])
    found, _, _ = rounded(llava, Scheme(bits=2, group_size=32), Tuner(STEPS))
    for learnt_from, held_out in seen:
        rows = [{(piece.batch, int(row)) for piece in part for row in piece.rows} for part in (learnt_from, held_out)]
        assert not rows[0] & rows[1]
        assert rows[0] | rows[1] == {(batch, row) for batch in range(2) for row in range(3)}
    assert seen[0][1][0].rows.tolist() == seen[1][1][0].rows.tolist()
    told = [layer.report[0]["tuning"] for layer in found]
    assert all(each["kept"] == (each["loss_after"] <= each["loss_before"]) for each in told)


def test_it_is_reproducible_and_files_change_nothing(written: Written, tmp_path: Path) -> None:
    scheme = Scheme(bits=3, group_size=32)
    first, states, _ = rounded(written, scheme, Tuner(STEPS))
    second, again, _ = rounded(written, scheme, Tuner(STEPS), on_disk=tmp_path)
    for one, other in zip(first, second, strict=True):
        assert one.report == other.report
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert all(torch.equal(one, other) for one, other in zip(states, again, strict=True))


def test_the_16_bit_model_is_left_alone(llava: Written) -> None:
    """Its states are those that it has without tuning: rounded weights do not leak into what is aimed at."""
    scheme = Scheme(bits=2, group_size=32)
    _, _, with_tuning = rounded(llava, scheme, Tuner(STEPS))
    _, _, without = rounded(llava, scheme, None)
    assert all(torch.equal(one, other) for one, other in zip(with_tuning, without, strict=True))


@pytest.mark.parametrize("act_order", ["group", "static", "none"])
def test_every_order_of_columns(llava: Written, act_order: ActOrder) -> None:
    found, _, _ = rounded(llava, Scheme(bits=2, group_size=32), Tuner(STEPS), options=SolveOptions(act_order=act_order))
    assert all(layer.report[0]["tuning"]["steps"] == STEPS.steps for layer in found)


def test_linears_in_16_bit_stay_as_they_are(llava: Written) -> None:
    scheme = Scheme(bits=2, group_size=32)
    plain = {"self_attn.q_proj", "mlp.gate_proj"}
    chosen: Any = {"scheme_of": lambda name: None if name.split(".", 4)[-1] in plain else scheme}
    tuned, _, _ = rounded(llava, scheme, Tuner(STEPS), **chosen)
    before, _, _ = rounded(llava, scheme, None, **chosen)
    for one, other in zip(tuned, before, strict=True):
        assert [row["linear"] for row in one.report if "tuning" not in row] == [
            name for name in LINEARS if name in plain
        ]
        assert all(torch.equal(one.tensors[f"{name}.weight"], other.tensors[f"{name}.weight"]) for name in plain)


def test_what_is_worse_is_not_kept(llava: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme(bits=3, group_size=32)
    monkeypatch.setattr(_Learnt, "step", lambda self, *_: self._place.fill_(0))
    found, states, _ = rounded(llava, scheme, Tuner(STEPS))
    before, untouched, _ = rounded(llava, scheme, None)
    assert not any(layer.report[0]["tuning"]["kept"] for layer in found)
    for one, other in zip(found, before, strict=True):
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(states, untouched, strict=True))


def codes_of(weight: torch.Tensor, scheme: Scheme) -> Codes:
    group_of = groups_of(weight.shape[1], 32)
    grid = fit_grid(weight, scheme, 32)
    ints = round_to_grid(weight, grid, scheme, group_of).to(torch.uint8)
    return Codes(ints=ints, grid=grid, group_of=group_of, bits=scheme.bits, moments=torch.eye(ints.shape[1]))


@pytest.mark.parametrize("sign", [1, -1])
def test_it_starts_at_the_codes_and_steps_against_the_gradient(sign: int) -> None:
    """With scales of either sign; integers that are not the nearest ones included."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    start = codes_of(weight, Scheme(bits=3, group_size=32, signed=False))
    start = replace(
        start, ints=(start.ints + 1).clamp(max=7), grid=Grid(scale=sign * start.grid.scale, zero=start.grid.zero)
    )
    learnt = _Learnt(weight, start)
    assert torch.equal(learnt.codes().ints, start.ints)
    assert torch.allclose(learnt.weight(), start.weight())
    wanted = torch.full_like(weight, 100.0)
    for _ in range(4):
        learnt.step(learnt.weight() - wanted, 0.5)
    assert ((learnt.weight() - wanted).abs() <= (start.weight() - wanted).abs() + 1e-6).all()
    assert bool((learnt.weight() > start.weight()).any())
    assert int(learnt.codes().ints.max()) <= 7
    assert bool((learnt.codes().grid.scale.sign() == sign).all())
    assert torch.equal(learnt.codes().grid.scale, learnt.codes().grid.scale.half().float())


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf])
def test_a_time_that_is_none_is_refused(minutes: float) -> None:
    with pytest.raises(InputError, match=r"--time .* is not allowed. Give a number of minutes above 0"):
        TuneOptions(minutes=minutes)


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_that_are_none_are_refused(steps: int) -> None:
    with pytest.raises(InputError, match=f"--tune-steps {steps} is not allowed. Give at least 1"):
        TuneOptions(steps=steps)


def test_time_and_steps_exclude_each_other() -> None:
    with pytest.raises(InputError, match="--time and --tune-steps exclude each other"):
        TuneOptions(steps=1, minutes=1)


def test_time_decides_on_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is looked at in the first layer; a run that goes on takes what was found then."""
    ticks = iter([0.0, 6.0])
    monkeypatch.setattr("quantize.methods.tuning.time.monotonic", lambda: next(ticks))
    taken: list[int] = []
    with Unfinished(tmp_path / "out", {}) as unfinished, Activations([(1, 2, 4)], torch.float32, None) as hidden:
        hidden[0].fill_(3)
        tuner = Tuner(TuneOptions(minutes=4))
        with tuner.begin(hidden, unfinished, 0) as target:
            assert target.on_disk
            assert torch.equal(target[0], hidden[0])
        assert tuner.steps is None
        assert tuner._timed(taken.append, 30) == 4  # 8 seconds a layer, 2 a step
        assert len(taken) == 2
        again = Tuner(TuneOptions(minutes=4))
        with again.begin(hidden, unfinished, 10**6) as target:
            assert not target.on_disk
        assert again.steps == 4


def test_a_layer_without_a_target_is_refused() -> None:
    stage: Any = type("Bare", (), {"target": None, "prefix": "layers.0."})()
    with pytest.raises(InputError, match="tuning needs what the 16-bit layer gives"):
        Tuner(STEPS).tune(stage, {})


def test_report_says_what_happened() -> None:
    tuned = Tuned(codes={}, steps=3, before=2.0, after=1.0, kept=True)
    assert tuned.report() == {"steps": 3, "loss_before": 2.0, "loss_after": 1.0, "kept": True}
