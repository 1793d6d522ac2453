"""The few CUDA runtime calls a guard needs, through cuda-python and without torch.

Every call of cuda-python returns a tuple: the error first, then the results
(https://nvidia.github.io/cuda-python, ``cuda.bindings.runtime``; before 12.6 the module was ``cuda.cudart``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from safevlm.errors import InputError, MissingExtraError, SafeVLMError
from safevlm.machine import free_on_gpu

__all__ = [
    "CudaRuntime",
    "DeviceBuffer",
    "Gpu",
    "current_gpu",
    "driver_version",
    "free_memory",
    "is_jetson",
    "load_cuda",
    "tensorrt_extra",
]

DRIVER_FILE = Path("/proc/driver/nvidia/version")
TEGRA_RELEASE = Path("/etc/nv_tegra_release")
"""JetPack's own; a container without it still sees the next one."""
DEVICE_TREE = Path("/proc/device-tree/compatible")


@dataclass(frozen=True)
class Gpu:
    """A GPU as TensorRT tells them apart: ``NVIDIA H100 80GB HBM3``, ``9.0``."""

    name: str
    compute_capability: str


class CudaRuntime:
    """The CUDA runtime's functions, with their error codes turned into SafeVLMError."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._success = module.cudaError_t.cudaSuccess

    def call(self, function: str, *arguments: Any) -> Any:
        """Return a function's result (None, one value, or a tuple of them)."""
        error, *results = getattr(self._module, function)(*arguments)
        if error != self._success:
            _, text = self._module.cudaGetErrorString(error)
            raise SafeVLMError(f"CUDA: {function} failed: {_text(text)} ({error})")
        return results[0] if len(results) == 1 else tuple(results) or None

    def to_device(self, pointer: int, address: int, size: int, stream: Any) -> None:
        """Queue a copy of ``size`` bytes from the host's ``address`` to the device's ``pointer``."""
        kind = self._module.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", pointer, address, size, kind, stream)

    def fill(self, pointer: int, byte: int, size: int, stream: Any) -> None:
        """Queue that ``size`` bytes from the device's ``pointer`` on become ``byte``."""
        self.call("cudaMemsetAsync", pointer, byte, size, stream)

    def to_host(self, address: int, pointer: int, size: int, stream: Any) -> None:
        """Queue a copy of ``size`` bytes from the device's ``pointer`` to the host's ``address``."""
        kind = self._module.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", address, pointer, size, kind, stream)


class DeviceBuffer:
    """Memory on the GPU, ``size`` bytes, held until :meth:`free`."""

    def __init__(self, cuda: CudaRuntime, size: int) -> None:
        self._cuda = cuda
        self.size = size
        self.pointer: int | None = int(cuda.call("cudaMalloc", size))

    def free(self) -> None:
        """Give the memory back; twice is the same as once."""
        pointer, self.pointer = self.pointer, None
        if pointer is not None:
            self._cuda.call("cudaFree", pointer)


def load_cuda(purpose: str, extra: str | None = None) -> CudaRuntime:
    """Import cuda-python; MissingExtraError, saying what it is needed for, where it is not installed.

    ``extra`` is the one that brings it, by default TensorRT's.
    """
    try:
        return CudaRuntime(import_module("cuda.bindings.runtime"))
    except ImportError:
        try:
            return CudaRuntime(import_module("cuda.cudart"))
        except ImportError as error:
            raise MissingExtraError("cuda-python", extra or tensorrt_extra(), purpose) from error


def is_jetson() -> bool:
    """Say whether this machine is a Jetson, which has its own CUDA and TensorRT from JetPack."""
    return TEGRA_RELEASE.exists() or (DEVICE_TREE.exists() and b"nvidia,tegra" in DEVICE_TREE.read_bytes())


def tensorrt_extra() -> str:
    """Return the extra that brings TensorRT's libraries to this machine; those of CUDA 12 run with newer drivers."""
    return "jetson" if is_jetson() else "trt-cu12"


def current_gpu(cuda: CudaRuntime) -> Gpu:
    """Return the GPU that CUDA would use now; InputError where there is none, no driver, or one that is too old."""
    try:
        _check_driver(cuda)
        if cuda.call("cudaGetDeviceCount") == 0:
            raise SafeVLMError("CUDA finds no device")
        properties = cuda.call("cudaGetDeviceProperties", cuda.call("cudaGetDevice"))
    except (SafeVLMError, RuntimeError) as error:  # RuntimeError: cuda-python found no libcuda to load
        raise InputError(
            f"no NVIDIA GPU can be used here ({error}). The TensorRT runtime needs one with its driver; "
            "elsewhere use --runtime onnxruntime."
        ) from error
    return Gpu(_text(properties.name), f"{properties.major}.{properties.minor}")


def free_memory(cuda: CudaRuntime) -> int:
    """Return how many bytes of memory the GPU could give now."""
    free, total = cuda.call("cudaMemGetInfo")
    properties = cuda.call("cudaGetDeviceProperties", cuda.call("cudaGetDevice"))
    return free_on_gpu(int(free), int(total), integrated=bool(properties.integrated))


def driver_version(cuda: CudaRuntime) -> str:
    """Return the driver's CUDA and, where Linux's module says it, its own version: ``CUDA 12.8, 570.86.15``."""
    stated = f"CUDA {_version(int(cuda.call('cudaDriverGetVersion')))}"
    try:
        line = DRIVER_FILE.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:  # WSL and Jetson have no such file
        return stated
    own = re.search(r"\d+\.\d+(?:\.\d+)?", line)
    return stated if own is None else f"{stated}, {own[0]}"


def _check_driver(cuda: CudaRuntime) -> None:
    """Raise SafeVLMError without a driver, or with one of an older major CUDA than the libraries."""
    driver, runtime = int(cuda.call("cudaDriverGetVersion")), int(cuda.call("cudaRuntimeGetVersion"))
    if driver == 0:  # what CUDA says where none is installed
        raise SafeVLMError("there is no NVIDIA driver")
    of_extra = f" (pip install 'safevlm-edge[trt-cu{driver // 1000}]')" if driver // 1000 >= 12 else ""
    if driver // 1000 < runtime // 1000:
        raise SafeVLMError(
            f"the driver is too old: it supports CUDA {_version(driver)}, but the installed libraries need "
            f"{runtime // 1000}.0 or newer: update the driver, or install cuda-python and TensorRT for CUDA "
            f"{driver // 1000}{of_extra}"
        )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _text(value: bytes | str) -> str:
    return value.split(b"\0")[0].decode(errors="replace") if isinstance(value, bytes) else value
