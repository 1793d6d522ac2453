"""Linears fitted to the 16-bit model's own outputs: nearer to it, the same bytes however often the run ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from calibration.streaming.batches import TokenWeights
from calibration.streaming.sequential import Activations, LayerStream
from quantize.bits.auto_bits import auto_plan
from quantize.gptq import gptq_plan, main
from quantize.methods.gptq_method import Gptq
from quantize.methods.grid import Scheme
from quantize.methods.settings import Plan, Progress
from quantize.methods.solver import SolveOptions
from quantize.methods.tuning import Codes, Tuned, TuneOptions, Tuner
from quantize.streamed.compress import Compressed
from quantize.streamed.estimate import estimate
from quantize.streamed.layers import LINEARS, SHARED_INPUTS, Rounded, Stage, round_layers
from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.checkpoint.weights.quantized import GPTQ_PARTS, dequantized
from safevlm.errors import InputError
from safevlm.network.loading import load_safe_vlm
from tests.quantize.streamed.test_compress import FEW, content, run
from tests.quantize.streamed.test_estimate import rows
from tests.quantize.streamed.test_layers import prefills
from tests.safevlm.checkpoint.random_checkpoints import QUESTIONS, SIZE, Written, write_checkpoint

MODEL = "tiny-safellava"
SCHEME = Scheme(bits=2, group_size=32)


@pytest.fixture(scope="module", params=[("llava", "original"), ("qwen2_5_vl", "old"), ("gemma3", "hf")], ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    family, layout = request.param
    return write_checkpoint(family, layout, tmp_path_factory.mktemp(family) / "checkpoint")


def rounded(
    written: Written, share: float, scheme: Scheme = SCHEME, *, on_disk: Path | None = None, **more: Any
) -> tuple[list[Rounded], float]:
    """Return the layers, and how far the last hidden states are from the 16-bit model's, relative to them."""
    stream = LayerStream(
        open_checkpoint(str(written.folder), tap="language_model"),
        grid=SIZE[written.family],
        token_ids=lambda model: [token for question in QUESTIONS for token in model.prompt_ids(question)],
    )
    batches = prefills(stream.skeleton, written)
    found: list[Rounded] = []
    shapes: Any = [(*batch.inputs_embeds.shape,) for batch in batches]
    with Activations(shapes, torch.float32, None if on_disk is None else 0, on_disk) as hidden:
        for number, batch in enumerate(batches):
            hidden[number].copy_(batch.inputs_embeds)
        with hidden.copy(None if on_disk is None else 0, on_disk) as target:
            method = Gptq(
                scheme_of=more.pop("scheme_of", lambda _: scheme), options=SolveOptions(mismatch=share), **more
            )
            round_layers(
                stream,
                batches,
                hidden,
                method,
                weights=[TokenWeights().of(batch) for batch in batches],
                write=lambda _, layer: found.append(layer),
                target=target,
                original_inputs=share > 0,
            )
            stream.norm(target)
            real = [batch.masks["attention_mask"].bool() for batch in batches]
            ours, theirs = (
                torch.cat([states[number][rows] for number, rows in enumerate(real)]) for states in (hidden, target)
            )
        return found, float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("bits", [2, 3])
def test_the_model_is_nearer_to_the_16_bit_one(written: Written, bits: int) -> None:
    scheme = Scheme(bits=bits, group_size=32)
    (before, without), (after, whole) = (rounded(written, share, scheme) for share in (0.0, 1.0))
    assert whole < without
    assert all("moved" not in row for layer in before for row in layer.report)
    first, *others = [row["moved"] for layer in after for row in layer.report]
    assert first < 1e-3, "the first layer reads what it reads in 16 bit, but for norms that are stored in 16 bit"
    assert all(1e-3 < moved < 1 for moved in others[2:])


def test_moments_are_those_of_both_models_whole(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 16-bit model and of the rounded one, each run as a whole."""
    found: dict[str, Tensor] = {}
    mismatch = Stage.mismatch

    def seen(stage: Stage, name: str) -> Tensor:
        return found.setdefault(stage.prefix + name, mismatch(stage, name)).clone()

    monkeypatch.setattr(Stage, "mismatch", seen)
    layers, _ = rounded(written, 0.5)
    vlm = load_safe_vlm(open_checkpoint(str(written.folder), tap="language_model"), grid=SIZE[written.family])
    batches = prefills(vlm, written)
    counts = torch.cat([TokenWeights().of(batch) for batch in batches]).unsqueeze(1)
    original = _read(vlm, batches, found)
    prefix = next(iter(found)).split("0.")[0]
    modules = dict(vlm.core.language_model.named_modules())
    for number, layer in enumerate(layers):
        for name in LINEARS:
            parts = {part: layer.tensors[f"{name}.{part}"] for part in GPTQ_PARTS}
            modules[f"layers.{number}.{name}"].weight.data = dequantized(parts)
        for name, parameter in modules[f"layers.{number}"].named_parameters():
            if name in layer.tensors:
                parameter.data = layer.tensors[name].float()
    ours = _read(vlm, batches, found)
    assert list(found) == [f"{prefix}{index}.{names[0]}" for index in range(len(layers)) for names in SHARED_INPUTS]
    for name, moments in found.items():
        expected = (counts * (original[name] - ours[name])).T @ ours[name] / counts.sum()
        size = (original[name].square().mean() * ours[name].square().mean()).sqrt()
        assert (moments - expected).abs().max() <= 1e-3 * size, name


def _read(vlm: Any, batches: Any, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what linears read, T × C, by canonical name."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = dict(vlm.core.language_model.named_modules())
    handles = [
        modules[f"layers.{name.split('layers.')[1]}"].register_forward_pre_hook(
            lambda _, given, name=name: seen[name].append(given[0].flatten(0, 1))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            vlm.language_forward(batch.inputs_embeds, batch.masks, batch.position_ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_files_change_nothing(written: Written, tmp_path: Path) -> None:
    (one, _), (other, _) = (rounded(written, 0.5, on_disk=folder) for folder in (None, tmp_path))
    for first, second in zip(one, other, strict=True):
        assert first.report == second.report
        assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_linears_in_16_bit_stay_as_they_are(written: Written) -> None:
    plain = {"self_attn.q_proj", "mlp.gate_proj"}
    scheme_of = lambda name: None if name.split("layers.")[1].split(".", 1)[1] in plain else SCHEME  # noqa: E731
    moved, _ = rounded(written, 1.0, scheme_of=scheme_of)
    before, _ = rounded(written, 0.0, scheme_of=scheme_of)
    for one, other in zip(moved, before, strict=True):
        assert [row["linear"] for row in one.report if "moved" not in row] == [
            name for name in LINEARS if name in plain
        ]
        assert all(torch.equal(one.tensors[f"{name}.weight"], other.tensors[f"{name}.weight"]) for name in plain)


def test_what_was_not_kept_is_said(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.streamed.layers.OriginalInputs", lambda *_: None)
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj: what it reads in the 16-bit model was not kept"):
        rounded(written, 0.5)


def test_tuning_starts_from_what_was_rounded_and_16_bit_layers_run_once(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both settings look at one stream of hidden states."""
    starts: list[Mapping[str, Codes]] = []
    advanced: list[int] = []
    tune, advance = Tuner.tune, LayerStream.advance

    def seen(tuner: Tuner, stage: Stage, codes: Mapping[str, Codes]) -> Tuned:
        starts.append(codes)
        return tune(tuner, stage, codes)

    def counted(stream: LayerStream, index: int, layer: Any, batches: Any, hidden: Any, output: Any = None) -> None:
        advanced.append(index)
        advance(stream, index, layer, batches, hidden, output)

    monkeypatch.setattr(Tuner, "tune", seen)
    monkeypatch.setattr(LayerStream, "advance", counted)
    found, _ = rounded(written, 1.0, tuner=Tuner(TuneOptions(steps=2)))
    assert advanced == [0, 0, 1, 1], "each layer in 16 bit, and rounded"
    own = open_checkpoint(str(written.folder), tap="language_model")
    for index, (codes, layer) in enumerate(zip(starts, found, strict=True)):
        told = {row["linear"]: row for row in layer.report}
        for name, each in codes.items():
            weight = own.tensors.read(f"{own.family.language_prefix}layers.{index}.{name}.weight").float()
            assert each.wanted is not None and "tuning" in told[name]
            change = float((each.wanted - weight).norm() / weight.norm())
            assert change > 0.01 or told[name]["moved"] < 1e-3, name


# -- a whole run ------------------------------------------------------------------------------------------


def moved(checkpoint: Checkpoint, share: float = 0.5, tuning: TuneOptions | None = None) -> Plan:
    return gptq_plan(checkpoint, SCHEME, SolveOptions(mismatch=share), tuning=tuning, rotate="values")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    return run(tmp_path_factory.mktemp("whole") / "out", MODEL, moved)


def test_the_record_says_how_far_weights_were_moved(whole: Compressed) -> None:
    assert whole.record["method"]["mismatch"] == 0.5
    assert all(0 <= row["moved"] < 1 for layer in whole.record["layers"] for row in layer["linears"])
    assert whole.record["layers"][1]["linears"][0]["moved"] > 0


def test_a_run_that_ends_anywhere_goes_on_and_ends_with_the_same_bytes(whole: Compressed, tmp_path: Path) -> None:
    class Stopped(Exception):  # noqa: N818
        pass

    seen: list[int] = []

    def once(index: int, *_: Any) -> None:
        seen.append(index)
        if seen.count(index) == 1:
            raise Stopped

    for number in range(len(whole.record["layers"])):
        with pytest.raises(Stopped):
            run(tmp_path / "out", MODEL, moved, progress=Progress(layer=once))
        with pytest.raises(InputError, match=r"unfinished run with other settings \(method; "):
            run(tmp_path / "out", MODEL, partial(moved, share=0.25 * (number % 2)))
    again = run(tmp_path / "out", MODEL, moved)
    assert whole.out is not None
    assert content(tmp_path / "out") == content(whole.out)
    assert again.record["layers"] == whole.record["layers"]


@pytest.mark.parametrize("tuning", [None, TuneOptions(steps=2)])
def test_in_the_memory_that_is_said_to_be_enough(tuning: TuneOptions | None, tmp_path: Path) -> None:
    """With all hidden states and inputs in files."""
    given, plan = replace(FEW, answers="given"), partial(moved, tuning=tuning)
    first = run(tmp_path / "first", MODEL, plan, calibration=given)
    needed = first.estimate.memory
    again = run(tmp_path / "again", MODEL, plan, calibration=given, max_memory=needed + 1000)
    assert again.out is not None and first.out is not None
    assert content(again.out) == content(first.out)
    with pytest.raises(InputError, match=r"--max-memory .* are needed"):
        run(tmp_path / "less", MODEL, plan, calibration=given, max_memory=needed - 1000)


def test_estimates_count_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "vision_names", lambda _: ())  # seeing takes more than rounding in a tiny model
    checkpoint, given = open_checkpoint(MODEL), [rows(1, 8)]
    known: Any = {"dtype": torch.float32, "device": torch.device("cpu"), "speed": 1e9}
    off = estimate(checkpoint, given, **known)
    on = estimate(checkpoint, given, original_inputs=True, **known)
    half = estimate(checkpoint, given, original_inputs=True, products=torch.bfloat16, **known)
    prefix = f"{checkpoint.family.language_prefix}layers.0."
    shapes = [[checkpoint.tensors.shape(f"{prefix}{name}.weight") for name in names] for names in SHARED_INPUTS]
    width = sum(linears[0][1] for linears in shapes)
    assert on.activations == 2 * off.activations + 8 * width * 4
    assert half.activations == 2 * off.activations + 8 * width * 2
    weights = max(sum(outputs * inputs for outputs, inputs in linears) for linears in shapes)
    assert on.memory - off.memory == (max(linears[0][1] for linears in shapes) ** 2 + weights) * 4
    assert on.seconds_per_layer > off.seconds_per_layer
    tuning = TuneOptions(steps=1)
    both = estimate(checkpoint, given, original_inputs=True, tuning=tuning, **known)
    assert both.activations == on.activations, "one stream of hidden states"
    assert both.memory > estimate(checkpoint, given, tuning=tuning, **known).memory


def test_bits_by_sensitivity_have_it_too() -> None:
    checkpoint, options = open_checkpoint(MODEL), SolveOptions(mismatch=0.5)
    plan = auto_plan(
        checkpoint,
        4.5,
        SCHEME,
        options,
        lambda scheme, more: gptq_plan(checkpoint, scheme, options, more),
        safety_weight=4.0,
        samples=4,
    )
    assert plan.original_inputs and plan.recipe["mismatch"] == 0.5
    assert not gptq_plan(checkpoint, SCHEME).original_inputs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mismatch", "-0.1"], "--mismatch -0.1 is not allowed. Give a share from 0 (off) to 1."),
        (["--mismatch", "1.5"], "--mismatch 1.5 is not allowed."),
        (["--mismatch", "nan"], "--mismatch nan is not allowed."),
        (["--nearest", "--mismatch", "1"], "--nearest rounds each weight by itself; it does not work with --mismatch."),
    ],
)
def test_bad_input_is_said_before_anything_is_read(given: list[str], message: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["--model", "no-such-model", "--out", str(tmp_path / "out"), *given])
    assert isinstance(found.exception, InputError)
    assert message in str(found.exception)
