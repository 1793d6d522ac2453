"""A checkpoint's numbers that a precision cannot hold: they are named, and what can hold them is kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from export import onnx as onnx_export
from export import trt
from export.guard.half_precision import half_fault, output_beyond_half, watched, weight_beyond_half
from export.guard.heads import HeadRequest
from export.onnx import ExportOptions, export_guard, main
from export.tensorrt.builder import EngineOptions
from export.tensorrt.request import EngineRequest
from runtimes.guard.bundle import open_bundle
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import CheckpointError, ParityError, PrecisionError
from safevlm.network.reference import GuardModel, build_reference_guard, build_vision
from tests.safevlm.checkpoint.random_checkpoints import LAYOUTS, Written, write_checkpoint

BOTH = ExportOptions(precisions=("fp32", "fp16"), parity_images=2)
Tensors = dict[str, torch.Tensor]
UP = {"llava": "encoder.layers.0.mlp.fc1", "gemma3": "encoder.layers.0.mlp.fc1", "qwen2_5_vl": "blocks.0.mlp.up_proj"}
DOWN = {
    "llava": "encoder.layers.0.mlp.fc2",
    "gemma3": "encoder.layers.0.mlp.fc2",
    "qwen2_5_vl": "blocks.0.mlp.down_proj",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Written]:
    folder = tmp_path_factory.mktemp("numbers")
    return {each: write_checkpoint(*each, folder / "-".join(each)) for each in LAYOUTS}


def changed(written: Written, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """Copy a checkpoint with other tensors."""
    shutil.copytree(written.folder, folder, dirs_exist_ok=True)
    tensors = load_file(written.folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def named(tensors: Tensors, part: str) -> str:
    """Return the one tensor of the vision tower whose name ends so."""
    (name,) = (name for name in tensors if name.endswith(part) and "vis" in name)
    return name


def overflowing(family: str) -> Callable[[Tensors], None]:
    """Make an activation leave float16 inside the MLP of the first layer; what leaves the layer is as it was."""

    def change(tensors: Tensors) -> None:
        for name in ([named(tensors, f"{UP[family]}.weight")], [named(tensors, f"{UP[family]}.bias")]):
            tensors[name[0]] *= 2.0**16
        tensors[named(tensors, f"{DOWN[family]}.weight")] *= 2.0**-16

    return change


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_a_weight_that_float16_cannot_hold_is_named_as_it_is_stored(
    checkpoints: dict[tuple[str, str], Written], layout: tuple[str, str], tmp_path: Path
) -> None:
    names: list[str] = []

    def change(tensors: Tensors) -> None:
        names.append(named(tensors, f"{UP[layout[0]]}.weight"))
        tensors[names[0]][1, 2] = -70000.0

    checkpoint = open_checkpoint(str(changed(checkpoints[layout], tmp_path, change)), tap="projector")
    said = f"tensor '{names[0]}' holds 70,000, beyond float16's maximum of 65,504"
    assert weight_beyond_half(checkpoint, build_reference_guard(checkpoint), embeddings=False) == said
    assert weight_beyond_half(checkpoint, build_vision(checkpoint), embeddings=True) == said


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_an_activation_that_float16_cannot_hold_is_named_by_its_module(
    checkpoints: dict[tuple[str, str], Written], layout: tuple[str, str], tmp_path: Path
) -> None:
    names: list[str] = []

    def change(tensors: Tensors) -> None:
        overflowing(layout[0])(tensors)
        names.append(named(tensors, f"{UP[layout[0]]}.weight").removesuffix(".weight"))

    checkpoint = open_checkpoint(str(changed(checkpoints[layout], tmp_path, change)), tap="projector")
    images = checkpoints[layout].images(1).numpy()
    for model in (build_reference_guard(checkpoint), build_vision(checkpoint)):
        assert weight_beyond_half(checkpoint, model, embeddings=False) is None
        vision = model.vision if isinstance(model, GuardModel) else model
        with watched(vision.core.named_modules()) as seen, torch.no_grad():
            vision(torch.from_numpy(images))
        reason = str(output_beyond_half(checkpoint, model, seen, embeddings=False))
        found = re.fullmatch(r"the output of '(.*)' reaches ([\d,.e+]+), beyond float16's maximum of 65,504", reason)
        assert found is not None and found[1] == names[0] and float(found[2].replace(",", "")) > 65504
        reason = str(half_fault(checkpoint, model, images, embeddings=False))
        assert reason == f"the output of '{names[0]}' leaves float16's range on image 1"
    sound = open_checkpoint(str(checkpoints[layout].folder), tap="projector")
    assert half_fault(sound, build_reference_guard(sound), images, embeddings=True) is None


@pytest.mark.parametrize(
    ("layout", "tap", "role"),
    [(("gemma3", "hf"), "projector", "guard"), (("llava", "original"), "language_model", "vision")],
)
def test_float32_is_kept_where_float16_overflows(
    checkpoints: dict[tuple[str, str], Written], layout: tuple[str, str], tap: Any, role: str, tmp_path: Path
) -> None:
    folder = changed(checkpoints[layout], tmp_path / "checkpoint", overflowing(layout[0]))
    out = tmp_path / "out"
    with pytest.raises(PrecisionError, match=r"precision fp16 was left out: the output of '.*fc1' reaches") as caught:
        export_guard(open_checkpoint(str(folder), tap=tap), out, BOTH)
    assert f"The bundle in {out} is complete with" in str(caught.value) and caught.value.left_out == ("fp16",)
    assert {file.precision for file in open_bundle(out).manifest.files} == {"fp32"}
    assert not [path for path in out.iterdir() if "fp16" in path.name]
    images = checkpoints[layout].images(2).numpy()
    answers = onnxruntime.InferenceSession(out / f"{role}.fp32.onnx").run(None, {"rgb": images})
    assert all(np.isfinite(answer).all() for answer in answers)


def test_float16_alone_leaves_nothing(checkpoints: dict[tuple[str, str], Written], tmp_path: Path) -> None:
    folder = changed(checkpoints["gemma3", "hf"], tmp_path / "checkpoint", overflowing("gemma3"))
    with pytest.raises(PrecisionError, match=r"Nothing was exported: give --precision fp32\.") as caught:
        export_guard(
            open_checkpoint(str(folder)), tmp_path / "out", ExportOptions(precisions=("fp16",), parity_images=2)
        )
    assert caught.value.exit_code == 2 and caught.value.left_out == ()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_command_prints_what_it_kept_and_ends_with_2(
    checkpoints: dict[tuple[str, str], Written], tmp_path: Path
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[named(tensors, "layers.0.mlp.fc1.weight")][0, 0] = 1e5

    folder = changed(checkpoints["gemma3", "hf"], tmp_path / "checkpoint", change)
    arguments = ["--model", str(folder), "--out", str(tmp_path / "out"), "--precision", "fp32,fp16", "--json"]
    done = CliRunner().invoke(main, [*arguments, "--parity-images", "2"])
    assert isinstance(done.exception, PrecisionError) and done.exception.exit_code == 2
    assert [file["path"] for file in json.loads(done.stdout)["manifest"]["files"]] == ["guard.fp32.onnx"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["layers.1.self_attn.q_proj.bias", "img_safety_head.mlp.0.weight"])
def test_a_tensor_that_is_not_finite_is_named_before_anything_is_exported(
    checkpoints: dict[tuple[str, str], Written], tmp_path: Path, part: str, value: float
) -> None:
    names: list[str] = []

    def change(tensors: Tensors) -> None:
        names.append(part if part in tensors else named(tensors, part))
        tensors[names[0]].view(-1)[3] = value

    folder = changed(checkpoints["llava", "original"], tmp_path / "checkpoint", change)
    counted = "1 NaN and 0 infinite" if value != value else "0 NaN and 1 infinite"
    with pytest.raises(CheckpointError) as caught:
        export_guard(open_checkpoint(str(folder), tap="projector"), tmp_path / "out", BOTH)
    assert f"tensor '{names[0]}' holds {counted} values" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_what_the_guard_does_not_read_is_not_looked_at(
    checkpoints: dict[tuple[str, str], Written], tmp_path: Path
) -> None:
    """LLaVA does not read CLIP's last layer; the projector's last map is folded into the head, in float32."""

    def change(tensors: Tensors) -> None:
        tensors[named(tensors, "encoder.layers.2.mlp.fc1.weight")][0, 0] = 1e6
        tensors["model.mm_projector.2.weight"] *= 1e6
        tensors["img_safety_head.mlp.0.weight"] *= 1e-6

    checkpoint = open_checkpoint(
        str(changed(checkpoints["llava", "original"], tmp_path / "checkpoint", change)), tap="projector"
    )
    guard = build_reference_guard(checkpoint)
    with watched(guard.vision.core.named_modules()) as seen, torch.no_grad():
        guard(checkpoints["llava", "original"].images(1))
    for embeddings, said in ((False, "None"), (True, "mm_projector.2.weight' holds")):
        assert said in str(weight_beyond_half(checkpoint, guard, embeddings=embeddings))
    for embeddings, said in ((False, "None"), (True, "the output of 'model.mm_projector.2' reaches")):
        assert said in str(output_beyond_half(checkpoint, guard, seen, embeddings=embeddings))


def test_a_fault_of_the_export_is_still_ours(
    checkpoints: dict[tuple[str, str], Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = onnx_export.build_graph

    def tampered(guard: Any, precision: Any, **options: Any) -> Any:
        graph = honest(guard, precision, **options)
        if precision == "fp16":
            graph.head[-1].bias = torch.nn.Parameter(torch.full_like(graph.head[-1].bias, float("nan")))
        return graph

    monkeypatch.setattr(onnx_export, "build_graph", tampered)
    with pytest.raises(ParityError, match=r"guard\.fp16\.onnx: .* not finite\. Please report this"):
        export_guard(open_checkpoint(str(checkpoints["gemma3", "hf"].folder)), tmp_path / "out", BOTH)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_float32_cannot_compute_is_refused_with_the_module(
    checkpoints: dict[tuple[str, str], Written], tmp_path: Path
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[named(tensors, "encoder.layers.1.mlp.fc1.weight")] *= 1e38

    folder = changed(checkpoints["gemma3", "hf"], tmp_path / "checkpoint", change)
    with pytest.raises(
        CheckpointError, match=r"layers\.2\.layer_norm1' gives NaN or infinity in float32, for 2 of 2 images"
    ):
        export_guard(open_checkpoint(str(folder)), tmp_path / "out", BOTH)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@given(exponent=st.integers(-45, 38), layer=st.integers(0, 2), down=st.booleans())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_float16_is_blamed_only_where_it_fails(
    checkpoints: dict[tuple[str, str], Written], exponent: int, layer: int, down: bool
) -> None:
    """Whatever is scaled, and by how much: a reason is found exactly where torch itself fails in float16."""
    written = checkpoints["gemma3", "hf"]
    checkpoint = open_checkpoint(str(written.folder))
    guard = build_reference_guard(checkpoint)
    mlp = guard.vision.get_submodule(f"core.vision_tower.encoder.layers.{layer}.mlp")
    chosen = mlp.get_submodule("fc2" if down else "fc1").get_parameter("weight")
    chosen.data = chosen.data * 10.0**exponent
    images = written.images(1)
    with torch.no_grad():
        right = guard(images)[0]
        if not bool(torch.isfinite(right).all()) or not bool(torch.isfinite(chosen).all()):
            return
        guard.vision.half()
        try:
            found = guard(images)[0]
        finally:
            guard.vision.float()
    fails = not float((found - right).abs().max()) <= 0.02  # also for NaN
    fresh = build_reference_guard(checkpoint)
    weight = fresh.vision.get_submodule(f"core.vision_tower.encoder.layers.{layer}.mlp.{'fc2' if down else 'fc1'}")
    weight.weight.data = weight.weight.data * 10.0**exponent
    reason = half_fault(checkpoint, fresh, images.numpy(), embeddings=False)
    assert (reason is not None) == fails


def test_an_engine_needs_only_its_own_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(*_: Any, **__: Any) -> None:
        raise PrecisionError("precision fp16 was left out", left_out=("fp16",))

    monkeypatch.setattr(onnx_export, "export_with_progress", export)
    monkeypatch.setattr(trt, "open_bundle", lambda folder, **_: folder)
    asked = {each: EngineRequest(options=EngineOptions(precision=each)) for each in ("fp16", "fp32")}  # type: ignore[arg-type]
    arguments = (open_checkpoint("tiny-safegem"), tmp_path)
    with pytest.raises(PrecisionError):
        trt._export(*arguments, asked["fp16"], HeadRequest(), embeddings=False)
    assert trt._export(*arguments, asked["fp32"], HeadRequest(), embeddings=False) == tmp_path
    assert "note: precision fp16 was left out" in capsys.readouterr().err
