"""Stand-ins of ``tensorrt`` and cuda-python over the host's memory, for the runner; the real ones need a GPU."""

from __future__ import annotations

import ctypes
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
        return 0, SimpleNamespace(name=b"Orin\0\0", major=8, minor=7)

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
    """Answer with each picture's mean colour as logits."""

    def __init__(self, most: int, step: Step = at_once) -> None:
        self.most = most
        self.step = step
        self.shape: tuple[int, ...] = (0,)
        self.addresses: dict[str, int] = {}
        self.batches: list[int] = []
        self.idle = False
        """Whether it says that it runs, and does not."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return name == "rgb" and shape[0] <= self.most

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shape[0], *EMBEDDING) if name == "embeddings" else (self.shape[0], 3)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.step("execute")
        count = self.shape[0]
        self.batches.append(count)
        if self.idle:
            return True
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

    def __init__(self, step: Step = at_once) -> None:
        self.step = step
        self.context = FakeContext(self.most, step)

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
        self.context = FakeContext(self.most, self.step)
        return self.context


def install(monkeypatch: pytest.MonkeyPatch, step: Step = at_once) -> tuple[FakeCuda, FakeEngine]:
    """Let ``import tensorrt`` and cuda-python find these; ``step`` is told each of their steps before it is done."""
    module = FakeCuda(step=step)
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = module  # type: ignore[attr-defined]
    for name, fake in (
        ("cuda", ModuleType("cuda")),
        ("cuda.bindings", bindings),
        ("cuda.bindings.runtime", module),
    ):
        monkeypatch.setitem(sys.modules, name, fake)
    engine = FakeEngine(step)
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
            deserialize_cuda_engine=lambda content: engine if content == b"plan" else None
        ),
    }
    for name, value in contents.items():
        setattr(trt, name, value)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return module, engine
