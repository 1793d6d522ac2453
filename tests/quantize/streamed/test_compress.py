"""From a checkpoint to a compressed one: what is written, how a killed run ends, what bad input is told."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.sets.mix import Mix
from calibration.sets.samples import Calibration, CalibrationOptions, calibrate_on
from calibration.streaming.batches import TokenWeights
from quantize.gptq import gptq_plan
from quantize.int8 import int8_plan
from quantize.methods.grid import Scheme
from quantize.methods.settings import Plan, Progress, RunOptions
from quantize.streamed import unfinished as unfinished_module
from quantize.streamed.compress import Compressed, compress
from quantize.streamed.layers import linear_names
from quantize.streamed.options import describe
from safevlm.checkpoint.checkpoint import RANDOM_KEY, Checkpoint, open_checkpoint
from safevlm.checkpoint.family import HEAD_PREFIX
from safevlm.checkpoint.hub import TINY_FOLDER
from safevlm.checkpoint.weights.quantized import QuantizedTensors
from safevlm.checkpoint.weights.shards import GUARD_FILE
from safevlm.errors import CheckpointError, InputError, PrecisionError
from safevlm.network.loading import load_safe_vlm
from tests.killing import Warm
from tests.safevlm.checkpoint.random_checkpoints import stand_in

ROOT = Path(__file__).parents[3]
FEW = CalibrationOptions(mix=Mix(samples=12), max_new_tokens=8)
QUICK = RunOptions(guard_images=4)
Plans = Callable[[Checkpoint], Plan]


def four_bits(checkpoint: Checkpoint) -> Plan:
    return gptq_plan(checkpoint, Scheme(bits=4, group_size=32))


def w8a8(checkpoint: Checkpoint) -> Plan:
    return int8_plan()


def run(out: Path, model: str = "tiny-safegem", plan: Plans = four_bits, **changed: Any) -> Compressed:
    checkpoint = open_checkpoint(model)
    options = replace(QUICK, **{key: value for key, value in changed.items() if hasattr(QUICK, key)})
    progress, calibration = changed.get("progress", Progress()), changed.get("calibration", FEW)
    chosen = built_in(model) if calibration.file is None else None
    return compress(checkpoint, out, plan(checkpoint), calibration, options, progress, chosen)


@cache
def built_in(model: str) -> Calibration:
    return calibrate_on(open_checkpoint(model), FEW, lambda _: None)


def content(folder: Path) -> dict[str, str]:
    """Return the hash of every file but compression.json, which states times."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "compression.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module", params=["tiny-safellava", "tiny-safeqwen", "tiny-safegem"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("plan", [four_bits, w8a8])
def test_an_artifact_is_a_whole_safe_vlm(model: str, plan: Plans, tmp_path: Path) -> None:
    found = run(tmp_path / "out", model, plan)
    assert found.out == tmp_path / "out" and sorted(tmp_path.iterdir()) == [found.out], "nothing else is left"
    source, artifact = open_checkpoint(model), open_checkpoint(str(found.out))
    assert artifact.quantization is not None and artifact.tap.source == source.tap.source
    assert artifact.tap.learned == "declared"
    assert artifact.classes == source.classes and artifact.family == source.family
    for name in (*source.head_names(), *source.vision_names()):
        assert torch.equal(source.tensors.read(name), artifact.tensors.read(name)), f"{name} stays in 16 bit"
    head = load_file(tmp_path / "out" / GUARD_FILE)
    assert set(head) == set(source.head_names())
    assert {tensor.dtype for tensor in head.values()} <= {torch.float16, torch.bfloat16}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(HEAD_PREFIX in name for name in stored), "who serves the model alone has no module for the head"
    assert set(artifact.tensors.names()) >= {f"{full}.weight" for _, _, full in linear_names(source)}
    assert len(artifact.tensors.quantized_modules()) == len(linear_names(source))  # type: ignore[attr-defined]
    record = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert record == json.loads(json.dumps(found.record))
    assert record["leakage"]["clean"] and not record["anomalous"]
    assert record["calibration"]["answers"] == {"own": 12, "given": 0, "none": 0}
    assert record["summary"]["bits_per_weight"] == (4 if plan is four_bits else 8)
    assert record["guard"]["n"] == 4 and record["guard"]["held_out"]
    assert record["answers"]["refusals"]["tokens"] and record["answers"]["others"]["tokens"]
    begun = record["calibration"]["beginnings"]
    assert begun["share"] == 0.3 and sum(begun["rows"].values()) == 12 and begun["rows"]["usual"] == 8
    assert record["held_out_kl"]["unseen"] and 0 < record["held_out_kl"]["as_calibrated"] < 0.5
    worst = max(row["relative_error"] for layer in record["layers"] for row in layer["linears"])
    assert worst < (0.08 if plan is four_bits else 0.01)
    assert all(row["loss"] <= row["rtn_loss"] for layer in record["layers"] for row in layer["linears"])
    # the answers are those that the artifact itself gives
    vlm, before = load_safe_vlm(artifact), load_safe_vlm(source)
    prefill, wanted = vlm.embed_text(["Why?"]), before.embed_text(["Why?"])
    with torch.no_grad():
        hidden = vlm.language_forward(prefill.inputs_embeds, prefill.masks, prefill.position_ids)
        expected = before.language_forward(wanted.inputs_embeds, wanted.masks, wanted.position_ids)
    assert 1e-5 < float((hidden - expected).norm() / expected.norm()) < 0.25


def test_a_run_that_ends_anywhere_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    assert whole.out is not None
    rounded: list[int] = []

    class Stopped(Exception):  # noqa: N818
        pass

    def stop(index: int, *_: Any) -> None:
        rounded.append(index)
        if rounded.count(index) == 1:
            raise Stopped

    out = tmp_path / "out"
    for _ in range(6):
        with pytest.raises(Stopped):
            run(out, progress=Progress(layer=stop))
        assert not out.exists()
    again = run(out, progress=Progress(layer=stop))
    assert content(out) == content(whole.out)
    for key in ("layers", "answers", "held_out_kl", "guard", "calibration", "summary", "leakage"):
        assert again.record[key] == whole.record[key]


def test_token_weights_by_gradient_are_found_again_by_a_run_that_goes_on(tmp_path: Path) -> None:
    by_gradient = replace(FEW, answers="given", weights=TokenWeights(by="gradient"))
    whole = run(tmp_path / "whole", calibration=by_gradient)
    fixed = run(tmp_path / "fixed", calibration=replace(FEW, answers="given"))
    assert whole.out is not None and fixed.out is not None
    assert whole.record["calibration"]["token_weights"]["by"] == "gradient"
    assert whole.estimate.memory > fixed.estimate.memory
    layers, more = whole.estimate.layers, whole.estimate.activations - fixed.estimate.activations
    assert more % layers == 0 and 0 < more // layers < fixed.estimate.activations, "the samples' own, of every layer"
    assert content(whole.out)["model.safetensors"] != content(fixed.out)["model.safetensors"]
    assert run(tmp_path / "out", calibration=by_gradient, layers=2).out is None
    with pytest.raises(InputError, match=r"other settings \(calibration"):
        run(tmp_path / "out", calibration=replace(FEW, answers="given"))
    again = run(tmp_path / "out", calibration=by_gradient)
    assert content(tmp_path / "out") == content(whole.out)
    assert again.record["held_out_kl"] == whole.record["held_out_kl"]


def test_a_part_of_the_layers_can_be_tried_first(tmp_path: Path) -> None:
    part = run(tmp_path / "out", layers=2)
    assert part.out is None and part.seconds_per_layer is not None and part.estimate.layers == 6
    assert [layer["layer"] for layer in part.record["layers"]] == [0, 1]
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"other settings \(method; method was"):
        run(tmp_path / "out", plan=w8a8)
    assert run(tmp_path / "out").out is not None


def test_hidden_states_in_a_file_and_several_shards_change_nothing(tmp_path: Path) -> None:
    given = replace(FEW, answers="given")
    first = run(tmp_path / "first", calibration=given)
    needed = first.estimate.memory
    second = run(tmp_path / "second", calibration=given, max_memory=needed + 1000, shard_bytes=2**20)
    assert second.out is not None and first.out is not None
    one, two = open_checkpoint(str(first.out)), open_checkpoint(str(second.out))
    assert len(list(second.out.glob("model-*.safetensors"))) > 2
    assert one.tensors.names() == two.tensors.names()
    assert all(torch.equal(one.tensors.read(name), two.tensors.read(name)) for name in one.tensors.names())
    assert first.record["held_out_kl"] == second.record["held_out_kl"]
    with pytest.raises(InputError, match=r"--max-memory .* are needed"):
        run(tmp_path / "third", calibration=given, max_memory=needed - 1000)
    with pytest.raises(InputError, match="--answers own: the model takes"):
        run(tmp_path / "fourth", calibration=replace(FEW, answers="own"), max_memory=needed + 1000)


def test_what_is_quantized_already_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "once")
    with pytest.raises(InputError, match="quantized already"):
        run(tmp_path / "twice", model=str(tmp_path / "once"), calibration=replace(FEW, file=tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="exists"):
        run(tmp_path / "once")


def damaged(tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    source = TINY_FOLDER / "tiny-safegem"
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def texts(tmp_path: Path) -> CalibrationOptions:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "Why is the sky blue?", "answer": "It is."}) + "\n")
    return replace(FEW, file=tmp_path / "rows.jsonl", mix=Mix(samples=1, shares={"text": 1.0}), answers="given")


@pytest.mark.parametrize("part", ["layers.3.mlp.up_proj.weight", "embed_tokens.weight", "img_safety_head.mlp.0.bias"])
def test_a_tensor_that_is_not_finite_is_named_before_any_layer_is_rounded(part: str, tmp_path: Path) -> None:
    names: list[str] = []

    def change(tensors: dict[str, Tensor]) -> None:
        names.extend(name for name in tensors if name.endswith(part) and "vision" not in name)
        tensors[names[0]].view(-1)[-1] = torch.nan

    with pytest.raises(CheckpointError) as caught:
        run(tmp_path / "out", model=damaged(tmp_path, change), calibration=texts(tmp_path))
    assert f"tensor '{names[0]}' holds 1 NaN and 0 infinite values" in str(caught.value)
    assert not [*(tmp_path / ".out.unfinished").glob("layer*")] and not (tmp_path / "out").exists()


def test_what_is_written_in_16_bit_must_fit_there(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        (name,) = [name for name in tensors if name.endswith("language_model.model.norm.weight")]
        tensors[name] = tensors[name].float()
        tensors[name][0] = 3.4e38

    with pytest.raises(PrecisionError, match=r"norm\.weight' holds 3\.4e\+38, beyond bfloat16's maximum of 3\.39e\+38"):
        run(tmp_path / "out", model=damaged(tmp_path, change), calibration=texts(tmp_path))


def test_a_weight_that_no_scale_holds_names_its_layer_and_keeps_the_finished_ones(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        (name,) = [name for name in tensors if name.endswith("layers.2.self_attn.o_proj.weight")]
        tensors[name] = tensors[name].float()
        tensors[name][0, 0] = 1e9

    with pytest.raises(InputError, match=r"layers.2.self_attn.o_proj: .* exceeds float16's 65504"):
        run(tmp_path / "out", model=damaged(tmp_path, change), calibration=texts(tmp_path))
    assert [path.name for path in sorted((tmp_path / ".out.unfinished").glob("layer*"))] == [
        "layer-00000.safetensors",
        "layer-00001.safetensors",
    ]
    assert not (tmp_path / "out").exists()


def test_a_full_disk_keeps_finished_layers_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = unfinished_module.save_file, []

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        written.append(path)
        if len(written) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(unfinished_module, "save_file", full)
    with pytest.raises(InputError, match="the disk is full"):
        run(tmp_path / "out")
    assert len(list((tmp_path / ".out.unfinished").glob("layer-*.safetensors"))) == 2
    assert not list((tmp_path / ".out.unfinished").glob("*.part"))
    assert run(tmp_path / "out").out is not None


def test_random_weights_stay_marked(tmp_path: Path) -> None:
    folder = stand_in(open_checkpoint("tiny-safegem").folder, tmp_path / "checkpoint")
    for name, source, marked in (("stand-in", str(folder), True), ("real", "tiny-safegem", False)):
        options = RunOptions(guard_images=0)
        plan, chosen = int8_plan(), built_in("tiny-safegem")
        found = compress(open_checkpoint(source), tmp_path / name, plan, FEW, options, Progress(), chosen)
        assert open_checkpoint(str(found.out)).random_weights == marked
        assert (RANDOM_KEY in json.loads((tmp_path / name / "config.json").read_text())) == marked
        assert json.loads((tmp_path / name / "compression.json").read_text())["random_weights"] == marked
        assert any(line.startswith("RANDOM WEIGHTS") for line in describe(found, "next")) == marked


def test_planted_test_pictures_stop_the_run_or_mark_the_artifact(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "benchmarks.holisafe_mini", "--out", str(tmp_path / "suite"), "--questions", "0"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    leaking = replace(
        FEW, file=tmp_path / "suite" / "holisafe_bench.json", mix=Mix(samples=6, shares={"unsafe": 1, "safe": 1})
    )
    with pytest.raises(InputError, match="6 of 6 calibration samples belong to an evaluation suite"):
        run(tmp_path / "out", calibration=leaking)
    assert not list(tmp_path.glob(".out*"))
    said: list[str] = []
    found = run(tmp_path / "out", calibration=replace(leaking, allow_leakage=True), progress=Progress(say=said.append))
    assert found.record["anomalous"] and len(found.record["leakage"]["leaks"]) >= 6
    assert said[0].startswith("LEAKAGE ALLOWED")


def test_two_runs_do_not_write_one_artifact(tmp_path: Path) -> None:
    with unfinished_module.Unfinished(tmp_path / "out", {}), pytest.raises(InputError, match="another process"):
        unfinished_module.Unfinished(tmp_path / "out", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "5"], "--bits 5"),
        (["--bits", "four"], "--bits"),
        (["--group-size", "12"], "--group-size 12"),
        (["--group-size", "96"], "does not divide the 256 input columns of model.language_model.layers.0"),
        (["--damp", "0"], "--damp 0"),
        (["--sweeps", "-1"], "--sweeps -1"),
        (["--beams", "0"], "--beams 0"),
        (["--mix", "harm=1"], "--mix harm=1"),
        (["--calibration", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--layers", "0"], "--layers 0"),
        (["--device", "cuda"], "--device cuda"),
        (["--max-memory", "0.1"], "--max-memory 0.1"),
        (["--image-share", "2"], "--image-share 2"),
        (["--first-weight", "0"], "--first-weight 0"),
        (["--guard-weight", "nan"], "--guard-weight nan"),
        (["--other-beginnings", "1.5"], "--other-beginnings 1.5"),
        (["--other-beginnings", "nan"], "--other-beginnings nan"),
    ],
)
def test_bad_options_end_with_2_and_leave_nothing(
    arguments: list[str], message: str, tmp_path: Path, parent: Warm
) -> None:
    defaults = ["--model", "tiny-safegem", "--out", str(tmp_path / "out"), "--group-size", "32", "--samples", "4"]
    done = parent.run("quantize.gptq", *defaults, *arguments, under=tmp_path)
    assert done.code == 2, done.said
    assert message in " ".join(done.said.split()) and "Traceback" not in done.said
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_with_a_part_missing_is_refused(tmp_path: Path) -> None:
    found = run(tmp_path / "out")
    assert found.out is not None
    tensors = load_file(found.out / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".qzeros"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, found.out / "model.safetensors")
    with pytest.raises(InputError, match="is missing"):
        open_checkpoint(str(found.out))
    save_file({**tensors, name: tensors[name][:, :1].contiguous()}, found.out / "model.safetensors")
    store = open_checkpoint(str(found.out)).tensors
    assert isinstance(store, QuantizedTensors)
    with pytest.raises(InputError, match="do not fit together"):
        store.read(name.replace("qzeros", "weight"))
