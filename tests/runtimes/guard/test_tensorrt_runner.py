"""The TensorRT runner against small stand-ins of ``tensorrt`` and ``cuda``; the real ones need a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.cuda import CudaRuntime, Gpu, current_gpu, free_memory, load_cuda
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.select import select_runner
from runtimes.guard.tensorrt_runner import TensorRTRunner, engine_mismatch, usable_engine
from safevlm.contract.manifest import EngineInfo
from safevlm.errors import BundleError, InputError, MissingExtraError, SafeVLMError
from tests.runtimes.bundles import SIZE, engine_file, write_bundle
from tests.runtimes.guard.fake_tensorrt import EMBEDDING, FakeCuda, FakeEngine, install

RGB = np.random.default_rng(1).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeCuda, FakeEngine]:
    return install(monkeypatch)


@pytest.fixture
def cuda(installed: tuple[FakeCuda, FakeEngine]) -> FakeCuda:
    return installed[0]


@pytest.fixture
def engine(installed: tuple[FakeCuda, FakeEngine]) -> FakeEngine:
    return installed[1]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Bundle]:
    return lambda **info: open_bundle(write_bundle(tmp_path, engine_file(tmp_path, **info)))


def test_a_batch_above_the_profile_is_judged_in_parts(engine: FakeEngine, write: Callable[..., Bundle]) -> None:
    with TensorRTRunner(write()) as runner:
        output = runner.infer(RGB)
    assert engine.context.batches == [4, 3]
    assert np.abs(output.logits - RGB.reshape(7, -1, 3).mean(axis=1) / 255).max() < 1e-6


def test_a_shared_tower_gives_embeddings_when_asked_and_copies_none_otherwise(
    engine: FakeEngine, cuda: FakeCuda, write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "names", ("rgb", "probs", "logits", "embeddings"))
    copied: list[int] = []
    copy = cuda.cudaMemcpyAsync

    def counted(*call: int) -> tuple[int]:
        copied.append(call[2])
        return copy(*call)

    monkeypatch.setattr(cuda, "cudaMemcpyAsync", counted)
    with TensorRTRunner(write()) as runner:
        plain, without = runner.infer(RGB[:2]), sum(copied)
        copied.clear()
        shared, with_them = runner.infer(RGB, embeddings=True), sum(copied)
    means = RGB.reshape(7, -1, 3).mean(axis=1) / 255
    assert plain.embeddings is None and without == 2 * (SIZE * SIZE * 3 + 2 * 3 * 4)
    assert shared.embeddings is not None and shared.embeddings.shape == (7, *EMBEDDING)
    assert np.abs(shared.embeddings.reshape(7, 3, 4) - means[:, :, None]).max() < 1e-6
    assert with_them == 7 * (SIZE * SIZE * 3 + 2 * 3 * 4 + 12 * 4)
    assert not cuda.held


def test_embeddings_that_an_engine_has_not_or_leaves_open_are_refused(
    engine: FakeEngine, cuda: FakeCuda, write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write()
    with TensorRTRunner(bundle) as runner, pytest.raises(InputError, match="export it with --embeddings"):
        runner.infer(RGB[:1], embeddings=True)
    monkeypatch.setattr(FakeEngine, "names", ("rgb", "probs", "logits", "embeddings"))
    monkeypatch.setattr(FakeEngine, "embedding", (-1, 2))
    with pytest.raises(BundleError, match=r"N x T x D with fixed T and D, not N x N x 2"):
        TensorRTRunner(bundle).activate()
    assert not cuda.held


def test_everything_is_given_back_also_when_activation_fails(
    engine: FakeEngine, cuda: FakeCuda, write: Callable[..., Bundle]
) -> None:
    bundle = write()
    with TensorRTRunner(bundle) as runner:
        assert len(cuda.held) == 4
        runner.infer(RGB[:1])
    assert not cuda.held
    cuda.failing = "cudaMalloc"
    with pytest.raises(SafeVLMError, match=r"CUDA: cudaMalloc failed: out of memory \(2\)"):
        TensorRTRunner(bundle).activate()
    assert not cuda.held


def test_an_engine_that_does_not_run_is_refused_whatever_the_call_before_has_left(
    engine: FakeEngine, write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "names", ("rgb", "probs", "logits", "embeddings"))
    with TensorRTRunner(write()) as runner:
        for embeddings in (False, True):
            right = runner.infer(RGB[:2], embeddings=embeddings)
            engine.context.idle = True
            with pytest.raises(SafeVLMError, match="not finite numbers for 2 of 2"):
                runner.infer(RGB[2:4], embeddings=embeddings)
            engine.context.idle = False
            assert np.array_equal(runner.infer(RGB[:2], embeddings=embeddings).logits, right.logits)


def test_a_call_that_fails_waits_for_what_it_has_queued(
    engine: FakeEngine, cuda: FakeCuda, write: Callable[..., Bundle]
) -> None:
    """Until then the GPU may still write into its memory, which is given back when it ends."""
    steps: list[str] = []

    def fail(step: str) -> None:
        steps.append(step)
        if step == "copy out":
            raise SafeVLMError("the second copy fails")

    with TensorRTRunner(write()) as runner:
        cuda.step = fail
        with pytest.raises(SafeVLMError, match="the second copy fails"):
            runner.infer(RGB[:1])
    assert steps == ["copy in", "copy out", "synchronize"]


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"tensorrt_version": "8.6.2"}, "built with TensorRT 8.6.2, but 10.3.0 is installed"),
        (
            {"gpu_name": "NVIDIA H100"},
            r"built on NVIDIA H100 \(compute capability 8.7\), but this GPU is Orin \(8.7\)",
        ),
        ({"compute_capability": "9.0"}, r"compute capability 9.0\), but this GPU is Orin \(8.7\)"),
    ],
)
def test_an_engine_of_another_version_or_gpu_is_refused_with_the_command(
    engine: FakeEngine, write: Callable[..., Bundle], info: dict[str, str], reason: str
) -> None:
    bundle = write(**info)
    with pytest.raises(BundleError, match=reason) as caught:
        usable_engine(bundle)
    assert f"python -m export.trt --bundle {bundle.folder}" in str(caught.value)
    with pytest.raises(BundleError, match=reason):
        TensorRTRunner(bundle, bundle.file(kind="engine")).activate()
    assert isinstance(select_runner(bundle, "auto"), OnnxRuntimeRunner)


def test_auto_takes_an_engine_that_runs_here(engine: FakeEngine, write: Callable[..., Bundle]) -> None:
    bundle = write()
    assert isinstance(select_runner(bundle, "auto"), TensorRTRunner)
    assert isinstance(select_runner(bundle, "tensorrt", precision="fp16"), TensorRTRunner)
    assert isinstance(select_runner(bundle, "auto", precision="fp32"), OnnxRuntimeRunner)
    assert isinstance(select_runner(bundle, "onnxruntime"), OnnxRuntimeRunner)


def test_an_engine_that_tensorrt_cannot_read_is_refused(
    engine: FakeEngine, write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write()
    monkeypatch.setattr(Bundle, "content", lambda self, file: b"nalp")
    with pytest.raises(BundleError, match=r"TensorRT 10\.3\.0 could not read it.*export\.trt"):
        TensorRTRunner(bundle).activate()


def test_an_engine_of_other_tensors_is_refused(
    engine: FakeEngine, write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "input_type", np.float32)
    with pytest.raises(BundleError, match=r"rgb, uint8, .* not rgb \(float32 .*Build it again: python -m export\.trt"):
        TensorRTRunner(write()).activate()


def test_a_batch_below_the_profile_is_refused(
    engine: FakeEngine, write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "least", 2)
    with (
        TensorRTRunner(write()) as runner,
        pytest.raises(InputError, match="takes 2 to 4 images at once, not 1"),
    ):
        runner.infer(RGB[:1])


def test_missing_libraries_and_gpus_are_told_apart(
    engine: FakeEngine, cuda: FakeCuda, write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write()
    cuda.devices = 0
    with pytest.raises(InputError, match=r"no NVIDIA GPU can be used here.*--runtime onnxruntime"):
        TensorRTRunner(bundle).activate()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", None)
    with pytest.raises(MissingExtraError, match=r"'cuda-python', which is not installed.*safevlm-edge\[trt-cu12\]"):
        TensorRTRunner(bundle).activate()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"'tensorrt', which is not installed.*safevlm-edge\[trt-cu12\]"):
        TensorRTRunner(bundle).activate()
    assert isinstance(select_runner(bundle, "auto"), OnnxRuntimeRunner)


def test_the_older_module_of_cuda_python_serves_too(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", FakeCuda("cuda.cudart"))
    assert current_gpu(load_cuda("a test")) == Gpu("Orin", "8.7")


def test_a_driver_of_an_older_cuda_is_told_with_both_versions(cuda: FakeCuda) -> None:
    cuda.driver = 11080
    with pytest.raises(InputError, match=r"driver is too old: it supports CUDA 11\.8, .* need 12\.0 or newer: update"):
        current_gpu(CudaRuntime(cuda))
    cuda.driver = 0
    with pytest.raises(InputError, match=r"there is no NVIDIA driver"):
        current_gpu(CudaRuntime(cuda))
    cuda.driver = 13000
    assert current_gpu(CudaRuntime(cuda)) == Gpu("Orin", "8.7")


@pytest.mark.parametrize(
    ("options", "version", "capability", "runs"),
    [
        ({}, "10.3.0", "8.6", True),
        ({}, "10.3.1", "8.6", False),
        ({}, "10.3.0", "8.9", False),
        ({"version_compatible": True}, "10.13.0", "8.6", True),
        ({"version_compatible": True}, "10.2.9", "8.6", False),
        ({"version_compatible": True}, "11.0.0", "8.6", False),
        ({"version_compatible": True}, "10.13.0", "8.9", False),
        ({"hardware_compatible": True}, "10.3.0", "9.0", True),
        ({"hardware_compatible": True}, "10.3.0", "7.5", False),
        ({"hardware_compatible": True, "version_compatible": True}, "10.9.0", "12.0", True),
    ],
)
def test_compatible_engines_run_where_nvidia_says(
    options: dict[str, bool], version: str, capability: str, runs: bool
) -> None:
    info = EngineInfo(
        tensorrt_version="10.3.0",
        gpu_name="A10",
        compute_capability="8.6",
        min_batch=1,
        opt_batch=1,
        max_batch=1,
        options=options,
    )
    here = Gpu("A10" if capability == "8.6" else "another", capability)
    assert (engine_mismatch(info, version, here) is None) == runs


@pytest.mark.parametrize(
    ("system", "machine", "told"),
    [("linux", "x86_64", None), ("windows", "x86_64", "operating system windows"), ("linux", "aarch64", "aarch64")],
)
def test_no_engine_crosses_operating_systems_or_processors(
    system: str, machine: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    info = EngineInfo(
        tensorrt_version="10.3.0",
        gpu_name="A10",
        compute_capability="8.6",
        operating_system=system,
        machine=machine,
        min_batch=1,
        opt_batch=1,
        max_batch=1,
        options={"hardware_compatible": True, "version_compatible": True},
    )
    found = engine_mismatch(info, "10.4.0", Gpu("L4", "8.9"))
    assert found is None if told is None else found is not None and told in found


def test_free_memory_is_read(cuda: FakeCuda) -> None:
    assert free_memory(CudaRuntime(cuda)) == 3 * 2**30


@pytest.mark.parametrize(("available", "free"), [(1, 3), (6, 6), (64, 8)])
def test_an_integrated_gpu_has_what_the_system_would_give_back(
    cuda: FakeCuda, available: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.integrated = 1
    monkeypatch.setattr("runtimes.guard.cuda.available_memory", lambda: available * 2**30)
    assert free_memory(CudaRuntime(cuda)) == free * 2**30


def test_a_missing_driver_is_no_gpu() -> None:
    def unloaded() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    module = SimpleNamespace(cudaError_t=SimpleNamespace(cudaSuccess=0), cudaDriverGetVersion=unloaded)
    with pytest.raises(InputError, match=r"no NVIDIA GPU can be used here \(Failed to dlopen"):
        current_gpu(CudaRuntime(module))


@pytest.mark.gpu
def test_the_real_libraries_name_the_gpu() -> None:
    """Judging with a real engine is tested with its export, in ``tests/export``."""
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    try:
        gpu = current_gpu(load_cuda("a test"))
    except InputError as error:
        pytest.skip(str(error))
    assert gpu.name and "." in gpu.compute_capability
