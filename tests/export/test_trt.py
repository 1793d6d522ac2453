"""``export.trt``: what the builder is told by each TensorRT, what lands in the bundle, and how it ends elsewhere."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import export.tensorrt.request as asking
import export.trt as command
from export.guard.bundle import data_beside
from export.rewrites.opset17 import lower_to_opset17
from export.rewrites.wide_values import FLOAT32
from export.tensorrt.builder import BUILDER_APIS, EngineOptions, builder_api
from export.tensorrt.engine import Device, EnginePart, current_engine
from export.tensorrt.request import EngineRequest, find_device
from export.trt import build_into, default_timing_cache, device_command
from runtimes.guard.bundle import Bundle, open_bundle, sha256_of
from runtimes.guard.cuda import Gpu
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from safevlm.contract.manifest import GuardFile, Head, Manifest, Source, Tap, TensorSpec
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import (
    BundleError,
    EngineUnavailableError,
    InputError,
    MissingExtraError,
    ParityError,
    SafeVLMError,
)
from tests.export.fake_tensorrt import make_tensorrt
from tests.runtimes.bundles import fitted

SIDE, CLASSES = 8, 4
ORIN = Gpu("Orin", "8.7")
RTX_MODULES = ("tensorrt_rtx", "tensorrt_rtx_bindings")
VERSIONS = ("8.6.2", "10.13.3.9", "11.4.0.106")


def write_guard(path: Path, *, beside: bool = False, approximate: str = "none") -> None:
    """Write an opset 20 guard with the operators that opset 17 has not, or has in another form."""
    random = np.random.default_rng(0)
    weights: dict[str, np.ndarray[Any, Any]] = {
        "scale": np.array([1 / 255], np.float32),
        "token_axes": np.array([1, 2]),
        "last_axis": np.array([-1]),
        "two": np.array(2, np.float32),
        "first": random.normal(size=(3, 32)).astype(np.float32),
        "second": random.normal(size=(16, CLASSES)).astype(np.float32) / 2,
    }
    nodes = [
        helper.make_node("Cast", ["rgb"], ["pixels"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"], name="mul"),
        helper.make_node("ReduceMean", ["scaled", "token_axes"], ["mean"], keepdims=0, name="tokens"),
        helper.make_node("Pow", ["mean", "two"], ["squares"], name="pow"),
        helper.make_node("ReduceMean", ["squares", "last_axis"], ["variance"], keepdims=1, name="variance"),
        helper.make_node("Add", ["mean", "variance"], ["feature"], name="add"),
        helper.make_node("MatMul", ["feature", "first"], ["wide"], name="first"),
        helper.make_node("Split", ["wide"], ["left", "right"], axis=1, num_outputs=2, name="split"),
        helper.make_node("Add", ["left", "right"], ["hidden"], name="sum"),
        helper.make_node("Gelu", ["hidden"], ["active"], approximate=approximate, name="gelu"),
        helper.make_node("MatMul", ["active", "second"], ["logits"], name="second"),
        helper.make_node("Softmax", ["logits"], ["probs"], axis=-1, name="softmax"),
    ]
    graph = helper.make_graph(
        nodes,
        "guard",
        [helper.make_tensor_value_info("rgb", TensorProto.UINT8, ["N", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", CLASSES]) for name in ("probs", "logits")],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    data = f"{path.name}.data"
    onnx.save(model, path, save_as_external_data=beside, location=data if beside else None, size_threshold=64)


def write_bundle(folder: Path, precisions: tuple[str, ...] = ("fp32", "fp16"), *, beside: bool = False) -> Bundle:
    folder.mkdir()
    files = []
    for precision in precisions:
        path = folder / f"guard.{precision}.onnx"
        write_guard(path, beside=beside)
        files.append(
            GuardFile(
                path=path.name,
                sha256=sha256_of(path),
                bytes=path.stat().st_size,
                kind="onnx",
                precision=precision,
                inputs=(TensorSpec(name="rgb", shape=("N", SIDE, SIDE, 3), dtype="uint8"),),
                outputs=tuple(
                    TensorSpec(name=name, shape=("N", CLASSES), dtype="float32") for name in ("probs", "logits")
                ),
            )
        )
        files += data_beside(path, files[-1])
    manifest = Manifest(
        created="2026-01-01T00:00:00+00:00",
        tool_version="0",
        source=Source(checkpoint="tiny-safegem", sha256="0" * 64, family="gemma3"),
        tap=Tap(source="projector", pooling="mean", tokens="image", learned="declared"),
        head=Head(kind="exact", reads="projector", pooling="mean", widths=(16, CLASSES)),
        classes=("safe", "one", "two", "three"),
        preprocessing=Preprocessing(
            height=SIDE, width=SIDE, fit="squash", filter="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ),
        files=tuple(files),
        default_file=files[0].path,
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return open_bundle(folder)


class EngineRunner(OnnxRuntimeRunner):
    """Run a fake engine: its file must be one, its answers are those of the bundle's fp32 graph plus ``error``."""

    error = 0.0

    def __init__(self, bundle: Bundle, file: GuardFile) -> None:
        assert "built" in json.loads(bundle.path(file).read_bytes())
        super().__init__(bundle, bundle.file("fp32"), threads=1)

    def _run_file(self, inputs: Any) -> dict[str, Any]:
        answers = super()._run_file(inputs)
        answers["probs"] = answers["probs"].copy()
        answers["probs"][:, 0] += self.error
        return answers


class WrongRunner(EngineRunner):
    error = 5e-3


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("export.tensorrt.engine.MOST_RUNS", 4)
    return tmp_path / "cache"


def request(rebuild: bool = False, timing_cache: Path | None = None, **options: Any) -> EngineRequest:
    return EngineRequest(options=EngineOptions(**options), rebuild=rebuild, timing_cache=timing_cache, parity_images=3)


def build(bundle: Bundle, trt: Any, wanted: EngineRequest | None = None, runner: Any = EngineRunner) -> Bundle:
    manifest, built = build_into(bundle, wanted or request(), Device(trt, ORIN), make_runner=runner)
    assert built
    opened = open_bundle(bundle.folder)
    assert opened.manifest == manifest
    return opened


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- what each TensorRT is told -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "network_flags", "builder_flags", "parsed"),
    [
        ("8.6.2", 1 << 0, ["FP16", "PREFER_PRECISION_CONSTRAINTS"], "opset17.standard.guard.fp32.onnx"),
        ("10.13.3.9", 1 << 1, [], "standard.guard.fp16.onnx"),
        ("11.4.0.106", 0, [], "standard.guard.fp16.onnx"),
    ],
)
def test_each_version_is_told_fp16_in_its_own_way(
    bundle: Bundle, version: str, network_flags: int, builder_flags: list[str], parsed: str
) -> None:
    trt = make_tensorrt(version)
    build(bundle, trt, request(max_batch=16, opt_batch=4, workspace_mib=512))
    assert trt.calls.network_flags == network_flags
    assert trt.calls.set_flags == builder_flags
    assert trt.calls.parsed == parsed
    assert trt.calls.cleared_flags == ["TF32"]
    assert trt.calls.pools == {"WORKSPACE": 512 * 2**20}
    assert trt.calls.profiles == [("rgb", (1, SIDE, SIDE, 3), (4, SIDE, SIDE, 3), (16, SIDE, SIDE, 3))]


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the lean runtime's module be installed in a version."""
    return lambda version: monkeypatch.setitem(sys.modules, "tensorrt_lean", SimpleNamespace(__version__=version))


@pytest.mark.parametrize("version", VERSIONS)
def test_compatible_engines_are_asked_for_and_say_so(bundle: Bundle, version: str, lean: Callable[[str], None]) -> None:
    lean(version)
    trt = make_tensorrt(version)
    built = build(bundle, trt, request(precision="fp32", hardware_compatible=True, version_compatible=True))
    assert trt.calls.set_flags == ["VERSION_COMPATIBLE"] and trt.calls.level.name == "AMPERE_PLUS"
    (engine,) = built.files("engine")
    assert engine.engine is not None
    assert engine.engine.options["hardware_compatible"] is engine.engine.options["version_compatible"] is True
    build(bundle, plain := make_tensorrt(version), request(precision="fp32"))
    assert plain.calls.set_flags == [] and plain.calls.level == "NONE"


def test_what_cannot_fit_is_refused_before_the_build(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(bundle.folder)
    trt = make_tensorrt("10.3.0")
    with pytest.raises(EngineUnavailableError, match=r"needs about .* of GPU memory at --max-batch 512, and 256 KiB"):
        build_into(bundle, request(max_batch=512), Device(trt, ORIN, 2**18), make_runner=EngineRunner)
    full = SimpleNamespace(total=0, used=0, free=10)
    monkeypatch.setattr("export.tensorrt.room.shutil.disk_usage", lambda _: full)
    with pytest.raises(EngineUnavailableError, match=r"does not fit on this disk, which has 10 bytes free"):
        build_into(bundle, request(), Device(trt, ORIN), make_runner=EngineRunner)
    assert trt.calls.parsed is None and content(bundle.folder) == before


@pytest.mark.parametrize("version", VERSIONS)
def test_an_fp32_engine_comes_from_the_fp32_graph_without_half_precision(bundle: Bundle, version: str) -> None:
    trt = make_tensorrt(version)
    build(bundle, trt, request(precision="fp32"))
    assert trt.calls.set_flags == []
    assert trt.calls.parsed.endswith("guard.fp32.onnx")
    assert trt.calls.pools == {}
    assert all(layer.precision is None for layer in trt.calls.networks[0].layers)


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_an_int8_engine_comes_from_the_int8_graph_and_is_judged_by_it(tmp_path: Path, version: str) -> None:
    bundle = write_bundle(tmp_path / "bundle", ("fp32", "fp16", "int8"))
    trt = make_tensorrt(version)
    built = build(bundle, trt, request(precision="int8"))
    assert trt.calls.parsed == "standard.guard.int8.onnx" and trt.calls.set_flags == []
    (engine,) = built.files("engine")
    assert engine.path == f"engines/int8-sm87-trt{version}.plan" and engine.parity is not None
    assert engine.parity.reference == "ONNX Runtime on the CPU with this bundle's int8 file"
    assert engine.engine is not None and engine.engine.options["onnx_fp16_sha256"] == bundle.file("fp16").sha256
    assert built.file("int8").kind == "onnx", "the engine does not stand in its own source's place"


def test_8_6_has_no_int8_engine_and_says_what_has(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", ("fp32", "fp16", "int8"))
    with pytest.raises(InputError, match="int8 engines need TensorRT 10 or newer"):
        build(bundle, make_tensorrt("8.6.2"), request(precision="int8"))


def test_8_6_keeps_squares_and_means_in_float32(bundle: Bundle) -> None:
    trt = make_tensorrt("8.6.2")
    build(bundle, trt)
    pinned = {layer.name for layer in trt.calls.networks[0].layers if layer.precision == "float32"}
    assert pinned == {FLOAT32 + name for name in ("tokens", "pow", "variance")}
    assert all(layer.output_types == {0: "float32"} for layer in trt.calls.networks[0].layers if layer.precision)


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_a_strongly_typed_network_is_not_given_layer_precisions(bundle: Bundle, version: str) -> None:
    trt = make_tensorrt(version)
    build(bundle, trt)
    assert all(layer.precision is None for layer in trt.calls.networks[0].layers)


@pytest.mark.parametrize("version", ["8.5.3.1", "7.1", "unknown"])
def test_a_tensorrt_before_8_6_is_refused(version: str) -> None:
    with pytest.raises(EngineUnavailableError, match=rf"TensorRT {version} is too old: 8\.6 or newer"):
        builder_api(version)


@pytest.mark.parametrize(
    ("version", "index"),
    [("8.6.1.post1", 0), ("9.3.0", 0), ("10.0.1", 1), ("10.16", 1), ("11.4.0.106", 2), ("12.0", 2)],
)
def test_every_version_from_8_6_on_has_its_api(version: str, index: int) -> None:
    assert builder_api(version) is BUILDER_APIS[index]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_batch": 2, "opt_batch": 4}, "Give 1 <= opt-batch <= max-batch"),
        ({"max_batch": 0}, "Give 1 <= opt-batch <= max-batch"),
        ({"max_batch": 4_097}, "an engine of 4097 images at once is not allowed. Give at most 4096"),
        ({"opt_batch": 10**12}, "Give at most 4096"),
        ({"workspace_mib": 0}, "--workspace-mib 0 is not allowed. Give 1 to 8796093022207"),
        ({"workspace_mib": 2**43}, "--workspace-mib 8796093022208 is not allowed. Give 1 to 8796093022207"),
        ({"precision": "int4"}, "--precision int4 is not allowed. Give one of fp16, fp32, int8"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        EngineOptions(**options)


# -- the graph for 8.6 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("beside", [False, True])
def test_the_graph_in_opset_17_computes_the_same(tmp_path: Path, approximate: str, beside: bool) -> None:
    source, target = tmp_path / "guard.onnx", tmp_path / "scratch" / "guard.onnx"
    target.parent.mkdir()
    write_guard(source, beside=beside, approximate=approximate)
    lower_to_opset17(source, target)
    model = onnx.load(target, load_external_data=False)
    assert model.opset_import[0].version == 17
    assert not {"Gelu"} & {node.op_type for node in model.graph.node}
    assert all(len(node.input) == 1 for node in model.graph.node if node.op_type == "ReduceMean")
    assert beside == (target.parent / "guard.onnx.data").exists()
    rgb = np.random.default_rng(1).integers(0, 256, (5, 1, 1, 3), dtype=np.uint8).repeat(SIDE, 1).repeat(SIDE, 2)
    before, after = (onnxruntime.InferenceSession(str(path)).run(None, {"rgb": rgb}) for path in (source, target))
    assert np.ptp(before[0], axis=0).max() > 0.05  # or equality would say nothing
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, old, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_weights_beside_the_graph_reach_every_parser(tmp_path: Path, version: str) -> None:
    bundle = write_bundle(tmp_path / "bundle", beside=True)
    before = content(bundle.folder)
    build(bundle, make_tensorrt(version))
    assert before.items() - content(bundle.folder).items() == {("manifest.json", before["manifest.json"])}


def test_a_node_that_opset_17_has_not_is_refused(tmp_path: Path) -> None:
    write_guard(tmp_path / "guard.onnx")
    model = onnx.load(tmp_path / "guard.onnx")
    next(node for node in model.graph.node if node.op_type == "Pow").op_type = "ImageDecoder"
    onnx.save(model, tmp_path / "guard.onnx")
    with pytest.raises(SafeVLMError, match=r"cannot be written in opset 17.*ImageDecoder"):
        lower_to_opset17(tmp_path / "guard.onnx", tmp_path / "low.onnx")


def test_axes_that_are_computed_cannot_be_lowered(tmp_path: Path) -> None:
    write_guard(tmp_path / "guard.onnx")
    model = onnx.load(tmp_path / "guard.onnx")
    next(node for node in model.graph.node if node.op_type == "ReduceMean").input[1] = "mystery"
    onnx.save(model, tmp_path / "guard.onnx")
    with pytest.raises(SafeVLMError, match=r"ReduceMean 'tokens' computes its 'mystery'.*TensorRT 10 or newer"):
        lower_to_opset17(tmp_path / "guard.onnx", tmp_path / "low.onnx")


def test_8_6_without_the_package_onnx_says_what_to_install(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"'onnx'.*safevlm-edge\[trt-cu12\]"):
        build(bundle, make_tensorrt("8.6.2"))


# -- the entry ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_is_entered_and_read_again(bundle: Bundle, version: str) -> None:
    opened = build(bundle, make_tensorrt(version), request(max_batch=4, opt_batch=2, workspace_mib=64))
    (entry,) = opened.files("engine")
    assert entry.path == f"engines/fp16-sm87-trt{version}.plan"
    assert entry.parity is not None and entry.parity.images == 3 and entry.parity.max_abs_prob_delta == 0
    assert entry.latency is not None and entry.latency.runtime == f"tensorrt {version}"
    assert entry.latency.machine.startswith("Orin")
    info = entry.engine
    assert info is not None
    assert (info.tensorrt_version, info.gpu_name, info.compute_capability) == (version, "Orin", "8.7")
    assert (info.min_batch, info.opt_batch, info.max_batch) == (1, 2, 4)
    assert info.options["workspace_mib"] == 64
    assert info.options["onnx_sha256"] == opened.file("fp32" if version.startswith("8") else "fp16").sha256
    assert opened.manifest.default_file == bundle.manifest.default_file
    assert opened.files("onnx") == bundle.files("onnx")


def test_the_bundle_is_left_without_unfinished_files(bundle: Bundle) -> None:
    build(bundle, make_tensorrt("8.6.2"))
    assert set(content(bundle.folder)) == {
        "manifest.json",
        "guard.fp32.onnx",
        "guard.fp16.onnx",
        "engines/fp16-sm87-trt8.6.2.plan",
    }
    assert {path.name for path in bundle.folder.iterdir() if path.is_dir()} == {"engines"}


def test_an_engine_that_is_up_to_date_is_not_built_again(bundle: Bundle) -> None:
    device = Device(make_tensorrt("10.3.0"), ORIN)
    opened = build(bundle, device.trt)
    assert current_engine(opened, EnginePart("guard", EngineOptions()), device) is not None
    before = content(bundle.folder)
    manifest, built = build_into(opened, request(), Device(make_tensorrt("10.3.0"), ORIN), make_runner=EngineRunner)
    assert not built
    assert manifest == opened.manifest
    assert content(bundle.folder) == before


@pytest.mark.parametrize(
    ("version", "gpu", "options"),
    [
        ("10.3.1", ORIN, {}),
        ("10.3.0", Gpu("Thor", "11.0"), {}),
        ("10.3.0", ORIN, {"max_batch": 9}),
        ("10.3.0", ORIN, {"opt_batch": 2}),
        ("10.3.0", ORIN, {"workspace_mib": 1}),
        ("10.3.0", ORIN, {"precision": "fp32"}),
    ],
)
def test_any_difference_makes_an_engine_out_of_date(
    bundle: Bundle, version: str, gpu: Gpu, options: dict[str, Any]
) -> None:
    opened = build(bundle, make_tensorrt("10.3.0"))
    part = EnginePart("guard", EngineOptions(**options))
    assert current_engine(opened, part, Device(make_tensorrt(version), gpu)) is None


def test_another_graph_makes_an_engine_out_of_date(bundle: Bundle) -> None:
    opened = build(bundle, make_tensorrt("10.3.0"))
    files = tuple(
        file.model_copy(update={"sha256": "1" * 64}) if file.path == "guard.fp16.onnx" else file
        for file in opened.manifest.files
    )
    changed = Bundle(opened.folder, opened.manifest.model_copy(update={"files": files}), opened.digest)
    part = EnginePart("guard", EngineOptions())
    assert current_engine(changed, part, Device(make_tensorrt("10.3.0"), ORIN)) is None


def test_rebuilding_replaces_the_entry_and_others_stay(bundle: Bundle) -> None:
    build(bundle, make_tensorrt("10.3.0"))
    build(open_bundle(bundle.folder), make_tensorrt("11.4.0.106"))
    build(open_bundle(bundle.folder), make_tensorrt("10.3.0"), request(precision="fp32"))
    opened = build(open_bundle(bundle.folder), make_tensorrt("10.3.0"), request(max_batch=2))
    again = build(opened, make_tensorrt("10.3.0"), request(rebuild=True, max_batch=2))
    for found in (opened, again):
        entries = [
            (file.precision, file.engine.tensorrt_version, file.engine.max_batch)
            for file in found.files("engine")
            if file.engine is not None
        ]
        assert sorted(entries) == [("fp16", "10.3.0", 2), ("fp16", "11.4.0.106", 8), ("fp32", "10.3.0", 8)]


def test_two_gpus_of_one_capability_have_an_engine_each(bundle: Bundle) -> None:
    for name in ("Orin", "Orin Nano", "Orin NX"):
        device = Device(make_tensorrt("10.3.0"), Gpu(name, "8.7"))
        build_into(open_bundle(bundle.folder), request(), device, make_runner=EngineRunner)
    paths = {file.path for file in open_bundle(bundle.folder).files("engine")}
    assert paths == {f"engines/fp16-sm87-trt10.3.0{suffix}.plan" for suffix in ("", "-2", "-3")}


def test_a_default_engine_stays_the_default_when_it_is_rebuilt(bundle: Bundle) -> None:
    opened = build(bundle, make_tensorrt("10.3.0"))
    path = opened.files("engine")[0].path
    chosen = opened.manifest.model_copy(update={"default_file": path})
    (bundle.folder / "manifest.json").write_text(chosen.to_json())
    opened = build(open_bundle(bundle.folder), make_tensorrt("10.3.0"), request(max_batch=2))
    assert opened.manifest.default_file == path


def test_thresholds_go_with_the_engine_they_were_fitted_for(bundle: Bundle) -> None:
    opened = build(bundle, make_tensorrt("10.3.0"))
    engine, onnx_file = opened.files("engine")[0], opened.files("onnx")[0]
    kept, gone = (fitted(file, block=0.5, allow=0.5) for file in (onnx_file, engine))
    manifest = opened.manifest.model_copy(update={"thresholds": (kept, gone)})
    (bundle.folder / "manifest.json").write_text(manifest.to_json())
    opened = build(open_bundle(bundle.folder), make_tensorrt("10.3.0"), request(max_batch=2))
    assert opened.manifest.thresholds == (kept,)


# -- what fails -----------------------------------------------------------------------------------------


def _kill() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["build", "run"])
def test_an_interrupted_build_leaves_the_bundle_as_it_was(
    bundle: Bundle, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle, make_tensorrt("10.3.0"))
    before = content(bundle.folder)
    trt = make_tensorrt("10.3.0")
    target: Any = trt.Builder if when == "build" else EngineRunner
    monkeypatch.setattr(target, "build_serialized_network" if when == "build" else "_run_file", lambda *_: _kill())
    with pytest.raises(KeyboardInterrupt):
        build(open_bundle(bundle.folder), trt, request(rebuild=True))
    assert content(bundle.folder) == before
    open_bundle(bundle.folder)


def test_a_kill_between_plan_and_manifest_leaves_a_bundle_that_opens(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle, make_tensorrt("10.3.0"))
    writes: list[Manifest] = []

    def write_once(folder: Path, manifest: Manifest) -> None:
        if writes:
            _kill()
        writes.append(manifest)
        (folder / "manifest.json").write_text(manifest.to_json())

    monkeypatch.setattr("export.tensorrt.engine.write_manifest", write_once)
    with pytest.raises(KeyboardInterrupt):
        build(open_bundle(bundle.folder), make_tensorrt("10.3.0"), request(rebuild=True, max_batch=2))
    assert open_bundle(bundle.folder).files("engine") == ()


def test_what_a_dead_process_left_is_removed(bundle: Bundle) -> None:
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    abandoned = bundle.folder / f".engine.partial-{finished.pid}"
    abandoned.mkdir()
    (abandoned / "guard.plan").write_bytes(b"half")
    build(bundle, make_tensorrt("10.3.0"))
    assert not abandoned.exists()


def test_an_engine_that_disagrees_is_not_kept(bundle: Bundle) -> None:
    before = content(bundle.folder)
    with pytest.raises(ParityError, match=r"fp32 engine differs .* max \|Δp\| 5\.0.e-03 .*The file was discarded"):
        build(bundle, make_tensorrt("10.3.0"), request(precision="fp32"), WrongRunner)
    assert content(bundle.folder) == before
    build(bundle, make_tensorrt("10.3.0"), request(precision="fp16"), WrongRunner)  # within fp16's tolerance


def test_an_operator_that_the_parser_of_8_6_lacks_is_named_with_its_node(bundle: Bundle) -> None:
    before = content(bundle.folder)
    with pytest.raises(EngineUnavailableError) as raised:
        build(bundle, make_tensorrt("8.6.2", refuse=("Softmax", "Split")))
    said = str(raised.value)
    assert "TensorRT 8.6.2 cannot read" in said
    assert "operator Softmax, node 'softmax': Plugin not found" in said
    assert "operator Split, node 'split': Plugin not found" in said
    assert "Use TensorRT 10 or newer" in said and "--runtime onnxruntime" in said
    assert content(bundle.folder) == before


@pytest.mark.parametrize(
    "reason",
    [
        "2: [virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory (no further information)",
        "Cuda Error in allocate: 2 (out of memory)",
        "Could not find any implementation for node a due to insufficient workspace.",
    ],
)
def test_too_little_gpu_memory_says_what_to_make_smaller(bundle: Bundle, reason: str) -> None:
    with pytest.raises(EngineUnavailableError, match=r"too little free memory.*--max-batch 8.*smaller --max-batch"):
        build(bundle, make_tensorrt("11.4.0.106", fail=reason))


def test_any_other_failure_repeats_what_tensorrt_said(bundle: Bundle) -> None:
    with pytest.raises(SafeVLMError, match=r"built no engine: Error Code 10: CHECK\(0\) failed") as raised:
        build(bundle, make_tensorrt("11.4.0.106", fail="Error Code 10:\n CHECK(0) failed"))
    assert raised.value.exit_code == 1


def test_a_bundle_without_int8_gets_the_command_that_makes_it(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"no ONNX file of precision int8 .* --precision fp32,fp16,int8"):
        build(bundle, make_tensorrt("10.3.0"), request(precision="int8"))


@pytest.mark.parametrize(("there", "missing"), [(("fp16",), "fp32"), (("fp32",), "fp16")])
def test_a_bundle_without_a_precision_gets_the_export_command(
    tmp_path: Path, there: tuple[str, ...], missing: str
) -> None:
    bundle = write_bundle(tmp_path / "poor", there)
    command_line = "python -m export.onnx --model tiny-safegem --out .*poor --precision fp32,fp16"
    with pytest.raises(BundleError, match=f"no ONNX file of precision {missing} .*{command_line}"):
        build(bundle, make_tensorrt("10.3.0"))


def test_8_6_takes_a_bundle_of_fp32_alone(tmp_path: Path) -> None:
    build(write_bundle(tmp_path / "poor", ("fp32",)), make_tensorrt("8.6.2"))


# -- timing cache ---------------------------------------------------------------------------------------


def test_the_timing_cache_is_read_and_updated(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "new" / "cache"
    for before in (b"", b"+timed"):
        trt = make_tensorrt("10.3.0")
        build(open_bundle(bundle.folder), trt, request(rebuild=True, timing_cache=file))
        assert trt.calls.caches == [before]
        assert file.read_bytes() == before + b"+timed"
    assert [path.name for path in file.parent.iterdir()] == ["cache"]


def test_the_timing_cache_lies_in_the_users_cache_folder(bundle: Bundle, cache_folder: Path) -> None:
    trt = make_tensorrt("10.3.0")
    build(bundle, trt)
    assert default_timing_cache(Device(trt, ORIN)) == cache_folder / "safevlm-edge" / "tensorrt-10.3.0-sm87-Orin.timing"
    assert default_timing_cache(Device(trt, ORIN)).read_bytes() == b"+timed"


def test_gpus_of_one_compute_capability_share_no_timings() -> None:
    trt = make_tensorrt("10.3.0")
    cards = [Gpu(name, "8.6") for name in ("NVIDIA A10", "NVIDIA GeForce RTX 3090", "a/../b\n", "NVIDIA A10G")]
    caches = [default_timing_cache(Device(trt, card)) for card in cards]
    assert len({*caches}) == len(cards) and len({each.parent for each in caches}) == 1
    assert caches[1].name == "tensorrt-10.3.0-sm86-NVIDIA-GeForce-RTX-3090.timing"


@pytest.mark.parametrize("content", [b"damaged", b"another GPU"])
def test_a_timing_cache_of_another_kind_is_passed_over_with_a_message(
    bundle: Bundle, tmp_path: Path, content: bytes
) -> None:
    file, said = tmp_path / "cache", list[str]()
    file.write_bytes(content)
    device = Device(make_tensorrt("10.3.0"), ORIN)
    build_into(bundle, request(timing_cache=file), device, make_runner=EngineRunner, report=said.append)
    assert any(f"timing cache {file} is ignored" in line for line in said)
    assert file.read_bytes() == b"+timed"


def test_a_timing_cache_that_cannot_be_written_is_not_fatal(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    said: list[str] = []
    device = Device(make_tensorrt("10.3.0"), ORIN)
    wanted = request(timing_cache=tmp_path / "file" / "cache")
    _, built = build_into(bundle, wanted, device, make_runner=EngineRunner, report=said.append)
    assert built
    assert any("is not saved" in line for line in said)


# -- where there is no device ---------------------------------------------------------------------------


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RTX_MODULES, "tensorrt", "cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)


def run_module(*arguments: str, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, without the packages that a GPU machine may have."""
    hidden = [*RTX_MODULES, "tensorrt", "cuda", "cuda.bindings", "cuda.cudart"]
    hide = f"import sys; sys.modules.update(dict.fromkeys({hidden}));"
    start = "import runpy; sys.argv[0] = 'export.trt'; runpy.run_module('export.trt', run_name='__main__')"
    code = f"{hide}{prelude}\n{start}"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_without_a_device_the_exit_code_is_6_and_the_command_is_given(bundle: Bundle) -> None:
    before = content(bundle.folder)
    options = ["--precision", "fp32", "--max-batch", "4", "--opt-batch", "2", "--workspace-mib", "256", "--json"]
    ended = run_module("--bundle", str(bundle.folder), *options)
    assert ended.returncode == 6, ended.stderr
    printed = json.loads(ended.stdout)
    assert Manifest.model_validate(printed["manifest"]) == bundle.manifest
    assert "the package 'tensorrt' is not installed" in ended.stderr
    assert "the package 'cuda-python' is not installed" in ended.stderr
    assert f"The bundle in {bundle.folder} is complete" in ended.stderr
    assert f"python -m export.trt --bundle {bundle.folder} {' '.join(options)}" in ended.stderr
    assert content(bundle.folder) == before


def test_a_device_needs_neither_torch_nor_transformers_nor_onnx(bundle: Bundle) -> None:
    """The forbidden packages raise where they are imported, even by way of another module."""
    forbidden = ["torch", "transformers", "onnx", "onnxscript", "safetensors", "huggingface_hub", "rich"]
    ended = run_module("--bundle", str(bundle.folder), prelude=f"sys.modules.update(dict.fromkeys({forbidden}));")
    assert ended.returncode == 6, ended.stderr


def test_the_printed_command_asks_for_the_same_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[EngineRequest] = []
    monkeypatch.setattr(command, "open_bundle", lambda folder: folder)
    monkeypatch.setattr(command, "_build_and_print", lambda bundle, wanted, again, as_json: asked.append(wanted))
    wanted = EngineRequest(
        options=EngineOptions(
            precision="fp32",
            max_batch=5,
            opt_batch=3,
            workspace_mib=7,
            hardware_compatible=True,
            version_compatible=True,
        ),
        rebuild=True,
        timing_cache=tmp_path / "a cache",
        images=tmp_path,
        parity_images=9,
    )
    for each in (wanted, EngineRequest()):
        words = shlex.split(device_command(tmp_path / "a bundle", each))
        assert words[:3] == ["python", "-m", "export.trt"]
        CliRunner().invoke(command.main, words[3:], catch_exceptions=False)
        assert asked.pop() == each


@pytest.mark.parametrize(
    ("version", "gpu", "options", "said"),
    [
        ("8.6.2", ORIN, ("--precision", "int8"), "int8 engines need TensorRT 10 or newer"),
        ("10.3.0", Gpu("T4", "7.5"), ("--hardware-compatible",), r"compute capability 8\.0 or newer, and T4 has 7\.5"),
        ("10.3.0", ORIN, ("--version-compatible",), r"tensorrt_lean is not installed.*tensorrt-lean==10\.3\.0"),
    ],
)
def test_what_the_device_cannot_build_is_refused_before_the_export(
    version: str, gpu: Gpu, options: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*_: object, **__: object) -> None:
        raise AssertionError("the long work has begun")

    monkeypatch.setitem(sys.modules, "tensorrt_lean", None)
    monkeypatch.setattr(command, "find_device", lambda request: Device(make_tensorrt(version), gpu))
    monkeypatch.setattr(command, "_export", export)
    with pytest.raises(InputError, match=said):
        CliRunner().invoke(command.main, ["--model", "tiny-safegem", *options], catch_exceptions=False)


def test_a_lean_runtime_of_another_version_does_not_do(bundle: Bundle, lean: Callable[[str], None]) -> None:
    lean("10.2.0")
    with pytest.raises(InputError, match="in the same version"):
        build(bundle, make_tensorrt("10.3.0"), request(version_compatible=True))
    lean("10.3.0.post1")
    build(bundle, make_tensorrt("10.3.0"), request(version_compatible=True))


def test_a_jetson_is_told_where_its_tensorrt_is(
    no_device: None, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "compatible").write_bytes(b"nvidia,p3768-0000+p3767-0000\0nvidia,tegra234\0")
    monkeypatch.setattr("runtimes.guard.cuda.DEVICE_TREE", tmp_path / "compatible")
    with pytest.raises(EngineUnavailableError, match=r"JetPack brings it: .*--system-site-packages.*edge\[jetson\]"):
        find_device()
    with pytest.raises(InputError, match="--hardware-compatible: engines of a Jetson"):
        build(bundle, make_tensorrt("10.3.0"), request(hardware_compatible=True))


def test_everything_that_is_missing_is_said_at_once(no_device: None) -> None:
    with pytest.raises(EngineUnavailableError, match=r"'tensorrt' is not inst.*; .*'cuda-python' is not inst"):
        find_device()


def test_a_machine_without_a_gpu_says_so(no_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt("10.3.0"))

    def no_gpu(cuda: object) -> Gpu:
        raise InputError("no NVIDIA GPU can be used here") from RuntimeError("cudaErrorNoDevice (100)")

    monkeypatch.setattr(asking, "load_cuda", lambda purpose: object())
    monkeypatch.setattr(asking, "current_gpu", no_gpu)
    with pytest.raises(EngineUnavailableError) as raised:
        find_device()
    assert str(raised.value) == (
        "no engine was built here: no usable NVIDIA GPU was found (cudaErrorNoDevice (100)); TensorRT-RTX, which needs "
        "no GPU, is not installed (pip install 'safevlm-edge[rtx]')."
    )


def test_an_old_tensorrt_counts_as_missing(no_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = make_tensorrt("8.6.1")
    trt.__version__ = "8.4.3"
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    with pytest.raises(EngineUnavailableError, match=r"TensorRT 8\.4\.3 is too old"):
        find_device()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model or --bundle is missing"),
        (["--bundle", "b", "--model", "m", "--grid", "448"], "--model, --grid cannot be combined with --bundle"),
        (["--bundle", "nowhere"], "nowhere is missing, not a guard bundle"),
        (["--bundle", "b", "--max-batch", "0"], "Give 1 <= opt-batch <= max-batch"),
    ],
)
def test_bad_usage_is_one_message(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(command.main, arguments)
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)


# -- the command with a device --------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Give the command a fake TensorRT on a fake GPU."""

    def install(trt: Any) -> None:
        monkeypatch.setattr(command, "find_device", lambda request: Device(trt, ORIN))
        monkeypatch.setattr(
            command.build_into, "__kwdefaults__", {"make_runner": EngineRunner, "report": lambda _: None}
        )

    return install


def test_the_command_builds_once_and_says_so_the_second_time(bundle: Bundle, device: Callable[[Any], None]) -> None:
    arguments = ["--bundle", str(bundle.folder), "--parity-images", "3", "--json"]
    device(make_tensorrt("10.3.0"))
    first, second = (CliRunner().invoke(command.main, arguments, catch_exceptions=False) for _ in range(2))
    assert "up to date" not in first.stderr and "timing kernels" in first.stderr
    assert "up to date; give --rebuild to build it again" in second.stderr and "timing kernels" not in second.stderr
    for result in (first, second):
        assert Manifest.model_validate(json.loads(result.stdout)["manifest"]).files[-1].kind == "engine"


def test_a_refusal_on_the_device_does_not_send_to_the_device(bundle: Bundle, device: Callable[[Any], None]) -> None:
    device(make_tensorrt("8.6.2", refuse=("Softmax",)))
    result = CliRunner().invoke(command.main, ["--bundle", str(bundle.folder), "--json"])
    assert isinstance(result.exception, EngineUnavailableError)
    assert "Copy it to the device" not in str(result.exception)
    assert json.loads(result.stdout)["manifest"]["default_file"] == "guard.fp32.onnx"


@pytest.mark.gpu
def test_a_real_engine_agrees_and_is_read_again(bundle: Bundle) -> None:
    try:
        here = find_device(EngineRequest(builder="tensorrt"))
    except EngineUnavailableError as error:
        pytest.skip(f"needs TensorRT and an NVIDIA GPU: {error}")
    for precision in ("fp32", "fp16"):
        wanted = request(precision=precision, max_batch=4)
        manifest, built = build_into(open_bundle(bundle.folder), wanted, here)
        assert built and manifest.files[-1].parity is not None
        assert current_engine(open_bundle(bundle.folder), EnginePart("guard", wanted.options), here) is not None
