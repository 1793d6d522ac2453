"""The provider that was asked for judges, or nothing does: ONNX Runtime's CUDA build, played on the CPU."""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as state

from runtimes.guard import nvidia_driver, onnxruntime_runner
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.judge import Guard
from runtimes.guard.nvidia_driver import gpu_names
from runtimes.guard.onnxruntime_runner import CPU, CUDA, OnnxRuntimeRunner
from safevlm.errors import InputError, SafeVLMError
from tests.runtimes.bundles import SIZE, fitted, onnx_file, write_bundle

RGB = np.full((1, SIZE, SIZE, 3), 200, np.uint8)
GPU = "NVIDIA Imagined 80GB"


class CudaBuild:
    """``onnxruntime`` as its CUDA build is, over the real one for CPUs; what sessions were asked for is kept."""

    def __init__(self) -> None:
        self.__dict__.update({name: getattr(onnxruntime, name) for name in ("__version__", "SessionOptions")})
        self.asked: list[dict[str, Any]] = []
        self.missing: str | None = None
        self.opening: Exception | None = None
        self.running: Exception | None = None

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", CUDA, CPU]

    def preload_dlls(self) -> None:
        if self.missing:
            print(f"Failed to load {self.missing}: cannot open shared object file")  # noqa: T201

    def InferenceSession(self, path: str, options: Any, **asked: Any) -> Any:
        self.asked.append(asked)
        if self.opening:
            raise self.opening
        real = onnxruntime.InferenceSession(path, options, providers=[CPU])
        in_use = [name for name, _ in asked["providers"] if not (self.missing and name == CUDA)]

        def run(*given: Any) -> Any:
            if self.running:
                raise self.running
            return real.run(*given)

        return SimpleNamespace(
            run=run, get_inputs=real.get_inputs, get_outputs=real.get_outputs, get_providers=lambda: in_use
        )


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> CudaBuild:
    found = CudaBuild()
    monkeypatch.setitem(sys.modules, "onnxruntime", found)
    monkeypatch.setattr(onnxruntime_runner, "gpu_names", lambda: (GPU,))
    return found


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return open_bundle(write_bundle(tmp_path / "b"))


def test_a_gpu_is_asked_for_in_true_float32_without_a_way_back(build: CudaBuild, bundle: Bundle) -> None:
    with OnnxRuntimeRunner(bundle) as runner:
        runner.infer(RGB)
        assert (runner.provider, runner.gpu) == (CUDA, GPU)
    assert build.asked == [{"providers": [(CUDA, {"use_tf32": "0"}), (CPU, {})], "enable_fallback": 0}]


def test_a_missing_library_is_an_error_and_never_the_cpu(
    build: CudaBuild, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    build.missing = "libcudnn.so.9"
    with pytest.raises(InputError, match=rf"cannot use {CUDA}: Failed to load libcudnn\.so\.9.*safevlm-edge\[gpu\]"):
        OnnxRuntimeRunner(bundle).activate()
    build.missing = "it says nothing"
    build.preload_dlls = lambda: None  # type: ignore[method-assign]
    with pytest.raises(InputError, match=rf"cannot use {CUDA}: it would judge on {CPU}"):
        OnnxRuntimeRunner(bundle).activate()
    assert capsys.readouterr().out == "", "what it prints would stand in a command's JSON"


@pytest.mark.parametrize("error", [RuntimeError("CUDA_PATH is set but CUDA"), state.EPFail("CUDNN_STATUS_NOT_INIT")])
def test_a_provider_that_fails_as_it_is_opened_is_an_error(build: CudaBuild, bundle: Bundle, error: Exception) -> None:
    build.opening = error
    with pytest.raises(InputError, match=f"cannot use {CUDA}: CUD"):
        OnnxRuntimeRunner(bundle).activate()


@pytest.mark.parametrize(
    "text", ["CUDA failure 2: out of memory ; GPU=0", "Failed to allocate memory for requested buffer of size 9"]
)
def test_a_full_gpu_is_said_to_be_full(build: CudaBuild, bundle: Bundle, text: str) -> None:
    build.opening = state.RuntimeException(text)
    with pytest.raises(InputError, match=r"cannot be loaded\. The GPU's memory is full\. Free it"):
        OnnxRuntimeRunner(bundle).activate()


def test_a_provider_that_fails_on_an_image_gives_no_verdict(build: CudaBuild, bundle: Bundle) -> None:
    with OnnxRuntimeRunner(bundle) as runner:
        build.running = state.EPFail("CUDA failure 700: an illegal memory access was encountered")
        with pytest.raises(SafeVLMError, match="illegal memory access"):
            runner.infer(RGB)
        assert runner.provider == CUDA


def test_the_real_session_does_not_fall_back_either(bundle: Bundle) -> None:
    with OnnxRuntimeRunner(bundle) as runner:
        assert runner.session._enable_fallback is False
        assert (runner.provider, runner.gpu) == (CPU, None)


def test_without_a_gpu_the_cuda_build_judges_on_the_cpu_and_says_so(
    build: CudaBuild, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnxruntime_runner, "gpu_names", lambda: ())
    with caplog.at_level(logging.WARNING), OnnxRuntimeRunner(bundle) as runner:
        assert (runner.provider, runner.gpu) == (CPU, None)
    assert "no GPU that this process may use: the guard runs on the CPU" in caplog.text
    with pytest.raises(InputError, match="cannot use DmlExecutionProvider: this build has Tensorrt"):
        OnnxRuntimeRunner(bundle, providers=["DmlExecutionProvider"]).activate()


def test_the_cpu_build_asks_no_driver(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[str, ...]:
        raise InputError("NVIDIA's driver does not work")

    monkeypatch.setattr(onnxruntime_runner, "gpu_names", broken)
    with OnnxRuntimeRunner(bundle, providers=[CPU]) as runner:
        assert runner.provider == CPU


# -- the driver -------------------------------------------------------------------------------------------


def driver(init: int = 0, names: tuple[bytes, ...] = ()) -> Callable[[str], Any]:
    def get_count(pointer: Any) -> int:
        pointer._obj.value = len(names)
        return 0

    def get(pointer: Any, number: int) -> int:
        pointer._obj.value = number
        return 0

    def get_name(text: Any, size: int, device: Any) -> int:
        text.value = names[device.value]
        return 0

    return lambda _: SimpleNamespace(
        cuInit=lambda _: init, cuDeviceGetCount=get_count, cuDeviceGet=get, cuDeviceGetName=get_name
    )


@pytest.mark.parametrize(
    ("load", "found"),
    [
        (driver(names=(b"NVIDIA A10", b"Orin")), ("NVIDIA A10", "Orin")),
        (driver(), ()),
        (driver(init=100), ()),
        (driver(init=34), ()),
    ],
)
def test_the_driver_names_its_gpus(
    load: Callable[[str], Any], found: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert gpu_names() == found


def test_a_driver_that_fails_is_not_the_same_as_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", driver(init=803))
    with pytest.raises(InputError, match="cuInit gives error 803"):
        gpu_names()
    monkeypatch.undo()
    monkeypatch.setattr(nvidia_driver, "DRIVER", "libnowhere.so")
    assert gpu_names() == ()


# -- what is written down -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("provider", "mentioned"), [(CPU, True), (CUDA, False), (None, False)])
def test_thresholds_of_another_provider_are_mentioned(
    provider: str | None, mentioned: bool, build: CudaBuild, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = fitted(onnx_file(tmp_path), block=0.9, allow=0.1, provider=provider)
    folder = write_bundle(tmp_path, thresholds=(entry,))
    with caplog.at_level(logging.WARNING), Guard.open(folder):
        pass
    assert (f"fitted on {CPU}, and {CUDA} judges" in caplog.text) == mentioned


def test_manifests_from_before_there_were_providers_are_read(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, thresholds=(fitted(onnx_file(tmp_path), block=0.9, allow=0.1),))
    stated = json.loads((folder / "manifest.json").read_text())
    del stated["thresholds"][0]["provider"]
    stated["files"][0]["latency"] = {"median_ms": 1, "p95_ms": 1, "batch": 1, "runtime": "onnxruntime", "machine": "x"}
    (folder / "manifest.json").write_text(json.dumps(stated))
    manifest = open_bundle(folder).manifest
    assert manifest.thresholds and manifest.thresholds[0].provider is None
    latency = manifest.files[0].latency
    assert latency is not None and latency.provider is None
