"""The TensorRT runner against small stand-ins of ``tensorrt`` and ``cuda``; the real ones need a GPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.errors import BundleError, InputError, MissingExtraError, SafeVLMError
from models.manifest import EngineInfo
from runtimes.bundle import Bundle, open_bundle
from runtimes.cuda import CudaRuntime, Gpu, current_gpu, free_memory, load_cuda
from runtimes.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.select import select_runner
from runtimes.tensorrt_runner import TensorRTRunner, engine_mismatch, usable_engine
from tests.runtimes.bundles import SIZE, engine_file, write_bundle

EMBEDDING = (6, 2)
"""T x D."""
RGB = np.random.default_rng(1).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8)


class FakeCuda(ModuleType):
    """cuda-python's runtime over the host's memory; counts what is held."""

    def __init__(self, name: str = "cuda.bindings.runtime") -> None:
        super().__init__(name)
        self.cudaError_t = SimpleNamespace(cudaSuccess=0)
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        self.devices = 1
        self.driver = 12020
        self.failing = ""
        self.held: dict[int, Any] = {}

    def _held(self, thing: Any, address: int) -> tuple[int, int]:
        self.held[address] = thing
        return 0, address

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, b"out of memory"

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[int, int]:
        return 0, 12090

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, 3 * 2**30, 8 * 2**30

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, self.devices

    def cudaGetDevice(self) -> tuple[int, int]:
        return 0, 0

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        return 0, SimpleNamespace(name=b"Orin\0\0", major=8, minor=7)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if self.failing == "cudaMalloc" and self.held.keys() - {4096}:
            return 2, 0
        memory = ctypes.create_string_buffer(size)
        return self._held(memory, ctypes.addressof(memory))

    def cudaFree(self, pointer: int) -> tuple[int]:
        del self.held[pointer]
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:
        return self._held("stream", 4096)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        del self.held[stream]
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        assert stream == 4096
        assert (to if kind == 1 else source) in self.held
        ctypes.memmove(to, source, size)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (0,)


class FakeContext:
    """Answer with each picture's mean colour as logits."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.shape: tuple[int, ...] = (0,)
        self.addresses: dict[str, int] = {}
        self.batches: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return name == "rgb" and shape[0] <= self.most

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shape[0], *EMBEDDING) if name == "embeddings" else (self.shape[0], 3)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        count = self.shape[0]
        self.batches.append(count)
        pixels = (ctypes.c_uint8 * (count * SIZE * SIZE * 3)).from_address(self.addresses["rgb"])
        logits = np.frombuffer(bytes(pixels), np.uint8).reshape(count, -1, 3).mean(axis=1) / 255
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        for name, values in (("probs", probs), ("logits", logits)):
            result = values.astype(np.float32).tobytes()
            ctypes.memmove(self.addresses[name], result, len(result))
        if "embeddings" in self.addresses:
            tokens = np.repeat(logits, 4, axis=1).reshape(count, *EMBEDDING).astype(np.float32).tobytes()
            ctypes.memmove(self.addresses["embeddings"], tokens, len(tokens))
        return True


class FakeEngine:
    names: tuple[str, ...] = ("rgb", "probs", "logits")
    embedding: tuple[int, ...] = (-1, *EMBEDDING)
    least, most = 1, 4
    input_type: Any = np.uint8

    def __init__(self) -> None:
        self.context = FakeContext(self.most)

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.embedding if name == "embeddings" else (-1, 3)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.input_type if name == "rgb" else np.float32

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "rgb" else "out"

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(batch, SIZE, SIZE, 3) for batch in (self.least, 2, self.most)]

    def create_execution_context(self) -> FakeContext:
        return self.context


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    module = FakeCuda()
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = module  # type: ignore[attr-defined]
    for name, fake in (
        ("cuda", ModuleType("cuda")),
        ("cuda.bindings", bindings),
        ("cuda.bindings.runtime", module),
    ):
        monkeypatch.setitem(sys.modules, name, fake)
    return module


@pytest.fixture
def engine(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    trt = ModuleType("tensorrt")
    logger = SimpleNamespace(ERROR=1)

    def make_logger(level: int) -> Any:
        return logger

    make_logger.ERROR = 1  # type: ignore[attr-defined]
    contents: dict[str, Any] = {
        "__version__": "10.3.0",
        "Logger": make_logger,
        "nptype": lambda kind: kind,
        "TensorIOMode": SimpleNamespace(INPUT="in"),
        "Runtime": lambda _: SimpleNamespace(
            deserialize_cuda_engine=lambda content: fake if content == b"plan" else None
        ),
    }
    for name, value in contents.items():
        setattr(trt, name, value)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return fake


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
    monkeypatch.setattr(FakeEngine, "embedding", (-1, -1, 2))
    with pytest.raises(BundleError, match=r"T and D fixed; this one states N x -1 x 2"):
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


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"tensorrt_version": "8.6.2"}, "built with TensorRT 8.6.2, here is 10.3.0"),
        (
            {"gpu_name": "NVIDIA H100"},
            r"built on NVIDIA H100 \(compute capability 8.7\), here is Orin \(8.7\)",
        ),
        ({"compute_capability": "9.0"}, r"compute capability 9.0\), here is Orin \(8.7\)"),
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
    with pytest.raises(BundleError, match=r"'rgb': 'float32'.*Build it again: python -m export\.trt"):
        TensorRTRunner(write()).activate()


def test_a_batch_below_the_profile_is_refused(
    engine: FakeEngine, write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "least", 2)
    with (
        TensorRTRunner(write()) as runner,
        pytest.raises(InputError, match="takes 2 to 4 pictures at once, not 1"),
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
    with pytest.raises(MissingExtraError, match=r"'cuda-python', which is not installed.*safevlm-edge\[trt\]"):
        TensorRTRunner(bundle).activate()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"'tensorrt', which is not installed.*safevlm-edge\[trt\]"):
        TensorRTRunner(bundle).activate()
    assert isinstance(select_runner(bundle, "auto"), OnnxRuntimeRunner)


def test_the_older_module_of_cuda_python_serves_too(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", FakeCuda("cuda.cudart"))
    assert current_gpu(load_cuda("a test")) == Gpu("Orin", "8.7")


def test_a_driver_of_an_older_cuda_is_told_with_both_versions(cuda: FakeCuda) -> None:
    cuda.driver = 11080
    with pytest.raises(InputError, match=r"driver is too old: it brings CUDA 11\.8, .* need 12\.0 or newer: update"):
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


def test_free_memory_is_read(cuda: FakeCuda) -> None:
    assert free_memory(CudaRuntime(cuda)) == 3 * 2**30


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
