"""``export.trt`` without a GPU: engines by TensorRT-RTX, their entries, and what bad targets get."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import export.trt as command
from export.onnx import ExportOptions, export_guard
from export.tensorrt.builder import EngineOptions
from export.tensorrt.engine import Device, EnginePart, current_engine
from export.tensorrt.request import EngineRequest, find_device
from export.tensorrt.targets import DEFAULT_TARGETS, check_targets, parse_targets
from export.trt import build_into
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.cuda import Gpu
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.contract.manifest import GuardFile
from safevlm.errors import BundleError, EngineUnavailableError, InputError, ParityError
from tests.export.fake_tensorrt import make_tensorrt
from tests.export.test_trt import content, write_bundle
from tests.safevlm.checkpoint.random_checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the exact parts of a guard behind the language model."""
    folder = tmp_path_factory.mktemp("parts")
    written = write_checkpoint("llava", "original", folder / "checkpoint")
    checkpoint = open_checkpoint(str(written.folder), tap="language_model")
    export_guard(checkpoint, folder / "bundle", ExportOptions(precisions=("fp32", "fp16"), parity_images=2))
    return folder / "bundle"


@pytest.fixture
def parts(exported: Path, tmp_path: Path) -> Bundle:
    return open_bundle(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


def build(bundle: Bundle, *options: str) -> Any:
    return CliRunner().invoke(command.main, ["--bundle", str(bundle.folder), *options])


def test_an_engine_for_all_targets_is_entered_as_not_verified(rtx: Any, bundle: Bundle) -> None:
    done = build(bundle)
    assert done.exit_code == 0, done.exception
    opened = open_bundle(bundle.folder)
    (engine,) = opened.files("engine")
    assert engine.path == f"engines/fp16-sm80-sm86-sm89-sm120-rtx{rtx.__version__}.plan"
    assert engine.role == "guard" and engine.parity is None and engine.latency is None
    assert (engine.inputs, engine.outputs) == (opened.file("fp16").inputs, opened.file("fp16").outputs)
    info = engine.engine
    assert info is not None and info.module == "tensorrt_rtx" and info.tensorrt_version == rtx.__version__
    assert info.targets == DEFAULT_TARGETS and info.gpu_name is None and info.compute_capability is None
    assert (info.operating_system, info.machine) == (platform.system().lower(), platform.machine())
    assert not info.verified and info.parity_seed == 0
    assert opened.manifest.default_file == bundle.manifest.default_file
    assert f"engine: {engine.path}\n  for sm80 (A100, A30), sm86" in done.stdout and "not run yet" in done.stdout


def test_an_engine_is_built_again_only_for_other_targets(rtx: Any, bundle: Bundle) -> None:
    build(bundle)
    before = content(bundle.folder)
    assert "up to date" in build(bundle).stderr
    assert content(bundle.folder) == before
    build(bundle, "--targets", "SM121, sm89", "--json")
    targets = [file.engine.targets for file in open_bundle(bundle.folder).files("engine") if file.engine is not None]
    assert targets == [DEFAULT_TARGETS, ("sm89", "sm121")]
    assert "--rebuild" not in build(bundle, "--rebuild").stderr
    assert len(open_bundle(bundle.folder).files("engine")) == 2


def test_both_parts_of_a_guard_behind_the_language_model_become_engines(rtx: Any, parts: Bundle) -> None:
    done = build(parts, "--precision", "fp32", "--targets", "sm89")
    assert done.exit_code == 0, done.exception
    engines = open_bundle(parts.folder).files("engine")
    assert [(file.role, file.precision) for file in engines] == [("vision", "fp32"), ("head", "fp32")]
    assert [file.inputs[0].name for file in engines] == ["rgb", "hidden"]
    assert engines[0].outputs[0].shape[1:] == engines[1].inputs[0].shape[1:]
    last = done.stdout.splitlines()[-8:]
    assert last[0] == f"engines: {engines[0].path} and {engines[1].path}"
    assert any("judges after the image" in line for line in last)
    source = parts.manifest.source.model_option
    asked = f"  python -m export.trt {source} --precision fp32 --targets sm89 --out {parts.folder} --images DIR"
    assert last[-2] == asked
    with pytest.raises(BundleError, match=r"have no INT8 file\. Give --precision fp16 or fp32"):
        raise build(parts, "--precision", "int8").exception


class PartRunner(OnnxRuntimeRunner):
    """Run a fake engine of a part: its answers are those of the ONNX file, ``scale`` times as large."""

    scale = 1.0

    def __init__(self, bundle: Bundle, file: GuardFile) -> None:
        assert "built" in json.loads(bundle.path(file).read_bytes())
        super().__init__(bundle, next(other for other in bundle.files("onnx", file.role)))

    def _run_file(self, inputs: Any) -> dict[str, Any]:
        return {name: np.asarray(value * self.scale) for name, value in super()._run_file(inputs).items()}


class WrongRunner(PartRunner):
    scale = 1.1


def test_parts_built_on_a_gpu_are_compared_and_timed(
    parts: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.tensorrt.engine.MOST_RUNS", 3)
    device = Device(make_tensorrt("10.3.0"), Gpu("Orin", "8.7"))
    request = EngineRequest(timing_cache=tmp_path / "timing", parity_images=2)
    with pytest.raises(ParityError, match="the fp16 engine of the vision: image embeddings differ"):
        build_into(parts, request, device, make_runner=WrongRunner)
    build_into(parts, request, device, make_runner=PartRunner)
    opened = open_bundle(parts.folder)
    vision, head = opened.files("engine")
    assert [vision.path, head.path] == [f"engines/{name}-sm87-trt10.3.0.plan" for name in ("vision.fp16", "head.fp32")]
    assert vision.parity is not None and vision.parity.max_rel_embedding_delta == 0
    assert head.parity is not None and head.parity.max_abs_prob_delta == 0
    assert vision.latency is not None and head.latency is not None
    for role, precision in (("vision", "fp16"), ("head", "fp32")):
        part = EnginePart(role, EngineOptions(precision=precision))  # type: ignore[arg-type]
        assert current_engine(opened, part, device) is not None


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            "sm87",
            r"does not compile a guard for sm87 \(Jetson Orin\): it is not one of its targets. It compiles for sm80",
        ),
        ("sm80,sm90", r"for sm90 \(H100, H200\): it is not one of its targets.* --builder tensorrt"),
        ("sm75", r"for sm75 \(RTX 20, T4\): .*FP32 GEMM is not supported.* It compiles for sm80, sm86, sm89, sm120"),
    ],
)
def test_a_target_that_is_not_compiled_for_is_named_with_those_that_are(
    rtx: Any, targets: str, said: str, bundle: Bundle
) -> None:
    before = content(bundle.folder)
    result = build(bundle, "--targets", targets)
    assert isinstance(result.exception, InputError) and result.exception.exit_code == 2
    with pytest.raises(InputError, match=said):
        raise result.exception
    assert content(bundle.folder) == before
    early = CliRunner().invoke(command.main, ["--model", "no-such-checkpoint", "--targets", targets])
    assert str(early.exception) == str(result.exception), "told before the checkpoint is opened"


@pytest.mark.parametrize("text", ["", "89", "8.9", "sm89;sm80", "all", "sm89,", "sm\u0661\u0662"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a target"):
        parse_targets(text)


def test_the_default_targets_are_compiled_for(rtx: Any) -> None:
    check_targets(rtx, DEFAULT_TARGETS)
    assert parse_targets(",".join(reversed(DEFAULT_TARGETS))) == DEFAULT_TARGETS


def test_a_disk_that_cannot_hold_the_engine_is_said_before_the_build(
    rtx: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.tensorrt.room.shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    result = build(bundle)
    assert isinstance(result.exception, EngineUnavailableError)
    assert "does not fit on this disk, which has 10 bytes free" in str(result.exception)


def test_which_builder_is_taken(rtx: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert find_device() == Device(rtx, targets=DEFAULT_TARGETS)
    assert find_device(EngineRequest(targets=("sm89",))).targets == ("sm89",)
    for only in (
        EngineRequest(builder="tensorrt"),
        EngineRequest(options=EngineOptions(hardware_compatible=True)),
        EngineRequest(options=EngineOptions(version_compatible=True)),
        EngineRequest(timing_cache=tmp_path),
    ):
        with pytest.raises(EngineUnavailableError, match="'tensorrt' is not installed"):
            find_device(only)
    with pytest.raises(InputError, match=r"--timing-cache is an option of TensorRT and --targets of TensorRT-RTX"):
        EngineRequest(timing_cache=tmp_path, targets=("sm89",))
    with pytest.raises(InputError, match=r"--version-compatible is .* and --builder rtx of"):
        EngineRequest(builder="rtx", options=EngineOptions(version_compatible=True))


def test_a_gpu_with_tensorrt_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = make_tensorrt("10.3.0")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr("export.tensorrt.request.load_cuda", lambda purpose: object())
    monkeypatch.setattr("export.tensorrt.request.current_gpu", lambda cuda: Gpu("Orin", "8.7"))
    monkeypatch.setattr("export.tensorrt.request.free_memory", lambda cuda: 7)
    assert find_device() == Device(trt, Gpu("Orin", "8.7"), 7)
