"""Which engine is for which library, GPU, system and processor; whatever is not falls to ONNX Runtime with one line."""

from __future__ import annotations

import logging
import platform
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.tensorrt.builder import read_graph
from runtimes.gateway.gateway import Gateway
from runtimes.guard.bundle import open_bundle
from runtimes.guard.cuda import DRIVER_FILE, CudaRuntime, driver_version
from runtimes.guard.engines.library import find_library, import_tensorrt
from runtimes.guard.judge import Guard
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.select import select_runner
from runtimes.guard.tensorrt_runner import TensorRTRunner, usable_engine
from safevlm.errors import InputError, MissingExtraError
from safevlm.installed.libraries import EXTRAS
from tests.runtimes.bundles import RTX, engine_file, write_bundle
from tests.runtimes.guard.fake_tensorrt import FakeCuda, install, install_rtx

HERE = {"operating_system": platform.system().lower(), "machine": platform.machine()}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "operating system": (
        HERE | {"operating_system": "windows"},
        "built for the operating system windows, but this one is",
    ),
    "processor": (HERE | {"machine": "riscv64"}, "built for the processor type riscv64, but this one is"),
    "version": ({"tensorrt_version": "1.8.0"}, "built with TensorRT-RTX 1.8.0, but 1.7.1.116 is installed"),
    "targets": ({"targets": ("sm80", "sm120")}, r"built for sm80, sm120, but this GPU is Orin \(sm87\)"),
    "module": (
        {
            "module": "tensorrt",
            "tensorrt_version": "10.3.0",
            "targets": (),
            "gpu_name": "Orin",
            "compute_capability": "8.7",
        },
        r"needs the package 'tensorrt', which is not installed",
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(("info", "reason"), OTHERS.values(), ids=OTHERS)
def test_an_engine_of_something_else_is_refused_and_onnx_runtime_judges_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    info: dict[str, Any],
    reason: str,
) -> None:
    install_rtx(monkeypatch)
    bundle = open_bundle(write_bundle(tmp_path / "b", engine_file(tmp_path / "b", **(RTX | info))))
    with pytest.raises(InputError, match=reason):
        usable_engine(bundle)
    with pytest.raises(InputError, match=reason):
        TensorRTRunner(bundle, bundle.file(kind="engine")).activate()
    with caplog.at_level(logging.WARNING):
        assert isinstance(select_runner(bundle), OnnxRuntimeRunner)
    (line,) = caplog.messages
    assert line.startswith("ONNX Runtime judges: ") and "\n" not in line


def test_every_way_to_a_guard_says_that_no_engine_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda, _ = install_rtx(monkeypatch)
    cuda.devices = 0
    folder = write_bundle(tmp_path / "b", engine_file(tmp_path / "b", **RTX))
    for open_ in (Guard.open, lambda path: Gateway.open(path, upstream="http://127.0.0.1:1/v1")):
        caplog.clear()
        open_(folder)
        assert ["no NVIDIA GPU can be used here" in line for line in caplog.messages] == [True]


def test_a_bundle_without_engines_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "b", engine_file(tmp_path / "b", **RTX)))
    with caplog.at_level(logging.DEBUG):
        select_runner(open_bundle(write_bundle(tmp_path / "plain")))
        select_runner(bundle, precision="fp32")
        select_runner(bundle, "onnxruntime")
    assert not caplog.messages


def test_the_engine_that_fits_is_found_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    rtx = engine_file(tmp_path / "b", **RTX)
    wrong = engine_file(tmp_path / "b", content=b"other", precision="int8", gpu_name="Thor")
    fits = engine_file(tmp_path / "b", precision="fp32", **HERE)
    bundle = open_bundle(write_bundle(tmp_path / "b", rtx, wrong, fits))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    assert usable_engine(bundle).path == fits.path
    with pytest.raises(InputError, match=r"'tensorrt-rtx', which is not installed.*\[rtx\]"):
        usable_engine(bundle, "fp16")


def test_the_metapackage_comes_before_what_it_installs(monkeypatch: pytest.MonkeyPatch) -> None:
    install_rtx(monkeypatch)
    assert import_tensorrt("tensorrt_rtx").__name__ == "tensorrt_rtx_bindings"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", sys.modules["tensorrt_rtx_bindings"])
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    assert find_library("tensorrt_rtx").name == "TensorRT-RTX 1.7.1.116"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtraError, match=r"'tensorrt-rtx'.*\[rtx\]"):
        find_library("tensorrt_rtx")


def test_what_is_missing_for_a_module_comes_with_its_own_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    install_rtx(monkeypatch)
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"'cuda-python'.*safevlm-edge\[rtx\]"):
        find_library("tensorrt_rtx")
    assert "cuda-python" in EXTRAS["rtx"].needs


def test_who_builds_and_who_runs_hear_a_module_through_one_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the first one that it is given: of two, the second would stay silent."""
    install_rtx(monkeypatch)
    library = find_library("tensorrt_rtx")
    heard: list[Any] = []
    monkeypatch.setattr(library.trt, "OnnxParser", lambda *_: SimpleNamespace(parse_from_file=lambda _: True), False)
    monkeypatch.setattr(library.trt, "NetworkDefinitionCreationFlag", None, raising=False)

    def builder(log: Any) -> Any:
        heard.append(log)
        return SimpleNamespace(create_network=lambda _: None)

    monkeypatch.setattr(library.trt, "Builder", builder, raising=False)
    read_graph(library.trt, Path("guard.onnx"))
    assert heard == [library.log]
    library.log.log(library.trt.ILogger.ERROR, "no\n kernel")
    library.log.log(library.trt.ILogger.ERROR, "no kernel")
    assert library.said() == " (no kernel)" and library.said() == ""


def test_the_driver_is_told_by_both_its_numbers_where_it_says_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = CudaRuntime(FakeCuda())
    said = tmp_path / "version"
    monkeypatch.setattr("runtimes.guard.cuda.DRIVER_FILE", said)
    assert driver_version(cuda) == "CUDA 12.2" and DRIVER_FILE.is_absolute()
    said.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu\nGCC version: 13.3.0\n")
    assert driver_version(cuda) == "CUDA 12.2, 570.86.15"
