"""Stand-ins of TensorRT, TensorRT-RTX and cuda-python over host memory, for the runner; the real ones need a GPU."""

from __future__ import annotations

import ctypes
import enum
import itertools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest

from tests.runtimes.bundles import SIZE

EMBEDDING = (6, 2)
"""T x D."""
Step: TypeAlias = Callable[[str], None]


def at_once(step: str) -> None:
    return


class FakeCuda(ModuleType):
    """cuda-python's runtime over the host's memory; counts what is held."""

    def __init__(self, name: str = "cuda.bindings.runtime", step: Step = at_once) -> None:
        super().__init__(name)
        self.cudaError_t = SimpleNamespace(cudaSuccess=0)
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        self.devices = 1
        self.integrated = 0
        self.driver = 12020
        self.failing = ""
        self.step = step
        self.held: dict[int, Any] = {}
        self._streams = itertools.count(4096)

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
        return 0, SimpleNamespace(name=b"Orin\0\0", major=8, minor=7, integrated=self.integrated)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if self.failing == "cudaMalloc" and any(each != "stream" for each in self.held.values()):
            return 2, 0
        memory = ctypes.create_string_buffer(size)
        return self._held(memory, ctypes.addressof(memory))

    def cudaFree(self, pointer: int) -> tuple[int]:
        del self.held[pointer]
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:
        return self._held("stream", next(self._streams))

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        del self.held[stream]
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        assert stream in self.held
        self.step("copy in" if kind == 1 else "copy out")
        assert (to if kind == 1 else source) in self.held
        ctypes.memmove(to, source, size)
        return (0,)

    def cudaMemsetAsync(self, pointer: int, byte: int, size: int, stream: int) -> tuple[int]:
        assert {stream, pointer} <= self.held.keys()
        ctypes.memset(pointer, byte, size)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        self.step("synchronize")
        return (0,)


class FakeContext:
    """Write what its engine answers to the memory that it was told."""

    def __init__(self, engine: FakeEngine, config: FakeRuntimeConfig | None = None) -> None:
        self.engine, self.config, self.step = engine, config, engine.step
        self.shape: tuple[int, ...] = (0,)
        self.addresses: dict[str, int] = {}
        self.batches: list[int] = []
        self.idle = False
        """Whether it says that it runs, and does not."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return name == self.engine.input_name and shape[0] <= self.engine.most

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shape[0], *self.engine.shapes[name])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.step("execute")
        self.batches.append(self.shape[0])
        self.engine.runs += 1
        if self.idle:
            return True
        kind = np.dtype(self.engine.input_type)
        size = int(np.prod(self.shape)) * kind.itemsize
        given = ctypes.string_at(self.addresses[self.engine.input_name], size)
        found = self.engine.answer(np.frombuffer(given, kind).reshape(self.shape))
        for name, address in self.addresses.items():
            if name != self.engine.input_name:
                result = np.ascontiguousarray(found[name], np.float32).tobytes()
                ctypes.memmove(address, result, len(result))
        if self.config is not None and self.config.cache is not None:
            self.config.cache.kernels.add(self.shape[0])
        return True


def mean_colour(rgb: Any) -> dict[str, Any]:
    """Answer with each image's mean colour as logits, and as tokens."""
    logits = rgb.reshape(len(rgb), -1, 3).mean(axis=1) / 255
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return {"probs": probs, "logits": logits, "embeddings": np.repeat(logits, 4, axis=1).reshape(-1, *EMBEDDING)}


class FakeEngine:
    """An engine; the attributes of the class say what the next one is."""

    names: tuple[str, ...] = ("rgb", "probs", "logits")
    embedding: tuple[int, ...] = EMBEDDING
    least, most = 1, 4
    input_type: Any = np.uint8
    answer: Callable[[Any], dict[str, Any]] = staticmethod(mean_colour)
    hidden: tuple[int, ...] = EMBEDDING

    def __init__(self, step: Step = at_once) -> None:
        self.step = step
        self.runs = 0
        self.context = FakeContext(self)

    @property
    def input_name(self) -> str:
        return self.names[0]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "rgb": (SIZE, SIZE, 3),
            "hidden": self.hidden,
            "probs": (3,),
            "logits": (3,),
            "embeddings": self.embedding,
        }

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self.shapes[name])

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.input_type if name == self.input_name else np.float32

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == self.input_name else "out"

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(batch, *self.shapes[name]) for batch in (self.least, 2, self.most)]

    def create_execution_context(self) -> FakeContext:
        self.context = FakeContext(self)
        return self.context


# -- TensorRT-RTX ---------------------------------------------------------------------------------------


class FakeRuntimeCache:
    """Remembers for which batch sizes kernels were compiled."""

    def __init__(self) -> None:
        self.kernels: set[int] = set()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"cache:"):
            return False
        self.kernels = {int(size) for size in blob.removeprefix(b"cache:").split()}
        return True

    def serialize(self) -> bytes:
        return b"cache:" + b" ".join(str(size).encode() for size in sorted(self.kernels))


class FakeRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self) -> None:
        self.cache: FakeRuntimeCache | None = None

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeRtxEngine(FakeEngine):
    loaded_kernels: list[frozenset[int]]
    """What each context found compiled already."""

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig()

    def create_execution_context(self, runtime_config: FakeRuntimeConfig | None = None) -> FakeContext:
        assert runtime_config is not None and runtime_config.cache is not None
        assert runtime_config.dynamic_shapes_kernel_specialization_strategy == Specialization.EAGER
        self.loaded_kernels.append(frozenset(runtime_config.cache.kernels))
        self.context = FakeContext(self, runtime_config)
        return self.context


class EngineValidity(enum.IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


class Specialization(enum.IntEnum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class FakeLogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class FakeRuntime:
    """Reads one engine and no other."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine

    def deserialize_cuda_engine(self, content: bytes) -> FakeEngine | None:
        return self.engine if content == b"plan" else None


class FakeRtxRuntime(FakeRuntime):
    validity: tuple[EngineValidity, int] = (EngineValidity.VALID, 0)
    engine_header_size = 4

    def get_engine_validity(self, content: bytes) -> tuple[EngineValidity, int]:
        return self.validity


# -- installing -----------------------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, step: Step = at_once) -> tuple[FakeCuda, FakeEngine]:
    """Let ``import tensorrt`` and cuda-python find these; ``step`` is told each of their steps before it is done."""
    module, engine = _install_cuda(monkeypatch, step), FakeEngine(step)
    _install_module(monkeypatch, "tensorrt", "10.3.0", lambda _: FakeRuntime(engine))
    return module, engine


def install_rtx(monkeypatch: pytest.MonkeyPatch, step: Step = at_once) -> tuple[FakeCuda, FakeRtxEngine]:
    """Let ``import tensorrt_rtx_bindings`` find TensorRT-RTX's, without ``tensorrt`` and ``tensorrt_rtx``."""
    module, engine = _install_cuda(monkeypatch, step), FakeRtxEngine(step)
    engine.loaded_kernels = []
    trt = _install_module(monkeypatch, "tensorrt_rtx_bindings", "1.7.1.116", lambda _: FakeRtxRuntime(engine))
    trt.EngineValidity, trt.EngineInvalidityDiagnostics = EngineValidity, EngineInvalidityDiagnostics
    trt.DynamicShapesKernelSpecializationStrategy = Specialization
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    return module, engine


def _install_cuda(monkeypatch: pytest.MonkeyPatch, step: Step) -> FakeCuda:
    module = FakeCuda(step=step)
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = module  # type: ignore[attr-defined]
    for name, fake in (
        ("cuda", ModuleType("cuda")),
        ("cuda.bindings", bindings),
        ("cuda.bindings.runtime", module),
    ):
        monkeypatch.setitem(sys.modules, name, fake)
    return module


def _install_module(monkeypatch: pytest.MonkeyPatch, name: str, version: str, runtime: Callable[[Any], Any]) -> Any:
    trt: Any = ModuleType(name)

    trt.__version__, trt.ILogger, trt.Runtime = version, FakeLogger, runtime
    trt.nptype, trt.TensorIOMode = lambda kind: kind, SimpleNamespace(INPUT="in")
    monkeypatch.setitem(sys.modules, name, trt)
    return trt
