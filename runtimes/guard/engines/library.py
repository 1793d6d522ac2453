"""Which TensorRT is installed beside which GPU, and whether an engine was built for the two.

TensorRT-RTX is a module of its own, whose engines are compiled to the end on the GPU that loads them
(https://docs.nvidia.com/deeplearning/tensorrt-rtx): they name compute capabilities in place of a GPU.
"""

from __future__ import annotations

import logging
import platform
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal, TypeAlias

from runtimes.guard.cuda import CudaRuntime, Gpu, current_gpu, driver_version, load_cuda, tensorrt_extra
from safevlm.contract.manifest import EngineInfo
from safevlm.errors import MissingExtraError
from safevlm.terminal.printable import one_line

__all__ = [
    "AMPERE",
    "HARDWARE_COMPATIBLE",
    "NAMES",
    "PURPOSE",
    "VERSION_COMPATIBLE",
    "EngineModule",
    "Library",
    "as_line",
    "collecting_logger",
    "engine_mismatch",
    "find_library",
    "import_tensorrt",
    "needs_proof",
]

EngineModule: TypeAlias = Literal["tensorrt", "tensorrt_rtx"]

PURPOSE = "judging with TensorRT"
AMPERE = (8, 0)
HARDWARE_COMPATIBLE, VERSION_COMPATIBLE = "hardware_compatible", "version_compatible"
"""Options of an engine that runs elsewhere, too (EngineInfo.options)."""
NAMES: dict[EngineModule, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
PYTHON_MODULES: dict[EngineModule, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),  # the metapackage, and what it installs
}

MOST_ERRORS = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """A TensorRT module, the CUDA runtime, and the GPU with its driver that both would use now."""

    module: EngineModule
    trt: Any
    cuda: CudaRuntime
    gpu: Gpu
    driver: str

    @property
    def version(self) -> str:
        """The module's version."""
        return str(self.trt.__version__)

    @property
    def name(self) -> str:
        """``TensorRT 10.3.0``."""
        return f"{NAMES[self.module]} {self.version}"

    @property
    def log(self) -> Any:
        """What the module reports to; ``errors`` are the last ones."""
        return collecting_logger(self.trt)

    def said(self) -> str:
        """Return and forget the errors that the module has reported, in brackets after a space; empty without any."""
        told = as_line(self.log.errors)
        self.log.errors.clear()
        return f" ({told})" if told else ""


def as_line(errors: Iterable[str]) -> str:
    """Return what a module has reported, each error once, as one line."""
    return "; ".join(dict.fromkeys(" ".join(error.split()) for error in errors))


@lru_cache(maxsize=8)
def collecting_logger(trt: Any) -> Any:
    """Return the one logger of a module, which keeps a pointer to the first that it is given, whoever builds or runs.

    TensorRT's own prints to stdout.
    """

    class CollectingLogger(trt.ILogger):  # type: ignore[misc]  # tensorrt has no types
        """Keep errors for the message of a failure, and pass warnings on to ``logging``."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=MOST_ERRORS)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                _log.info("TensorRT: %s", one_line(message))

    return CollectingLogger()


def import_tensorrt(module: EngineModule = "tensorrt") -> Any:
    """Return the Python module; MissingExtraError where it is not installed."""
    for name in PYTHON_MODULES[module]:
        try:
            return import_module(name)
        except ImportError as error:  # noqa: PERF203
            missing = error
    raise MissingExtraError(NAMES[module].lower(), _extra(module), PURPOSE) from missing


def _extra(module: EngineModule) -> str:
    """Return the extra that brings a module and what it needs on a GPU."""
    return "rtx" if module == "tensorrt_rtx" else tensorrt_extra()


def find_library(module: EngineModule = "tensorrt") -> Library:
    """Return what there is for engines of a module.

    Raises MissingExtraError without the libraries, InputError without a GPU.
    """
    trt = import_tensorrt(module)
    cuda = load_cuda(PURPOSE, _extra(module))
    gpu = current_gpu(cuda)  # before any TensorRT object: creating one without a GPU can crash
    return Library(module, trt, cuda, gpu, driver_version(cuda))


def needs_proof(info: EngineInfo, library: Library) -> bool:
    """Say whether an engine must first be compared with its ONNX file on this device.

    One that was never run, one of TensorRT-RTX, which is compiled anew on each GPU, and a portable one that was
    verified on another GPU or with another version than there is here.
    """
    verified_on = info.module, info.tensorrt_version, info.gpu_name, info.compute_capability
    here = "tensorrt", library.version, library.gpu.name, library.gpu.compute_capability
    return not info.verified or verified_on != here


def engine_mismatch(info: EngineInfo, version: str, gpu: Gpu) -> str | None:
    """Say why an engine cannot run with this version of its module on this GPU and machine; None when it can.

    A version compatible engine runs with newer releases of its major version, a hardware compatible one on every GPU
    from compute capability 8.0 up ("Version Compatibility" and "Hardware Compatibility" in TensorRT's documentation);
    no engine crosses operating systems or processors.
    """
    for what, built, here in (
        ("operating system", info.operating_system, platform.system().lower()),
        ("processor type", info.machine, platform.machine()),
    ):
        if built is not None and built.lower() != here.lower():
            return f"it was built for the {what} {built}, but this one is {here}"
    newer = bool(info.options.get(VERSION_COMPATIBLE)) and _newer(info.tensorrt_version, version)
    if info.tensorrt_version != version and not newer:
        return f"it was built with {NAMES[info.module]} {info.tensorrt_version}, but {version} is installed"
    if info.targets:
        return _target_mismatch(info.targets, gpu)
    assert info.gpu_name is not None and info.compute_capability is not None  # or it would have targets
    built_for = Gpu(info.gpu_name, info.compute_capability)
    portable = bool(info.options.get(HARDWARE_COMPATIBLE)) and min(_number(built_for), _number(gpu)) >= AMPERE
    if built_for != gpu and not portable:
        return (
            f"it was built on {built_for.name} (compute capability {built_for.compute_capability}), "
            f"but this GPU is {gpu.name} ({gpu.compute_capability})"
        )
    return None


def _target_mismatch(targets: tuple[str, ...], gpu: Gpu) -> str | None:
    here = f"sm{gpu.compute_capability.replace('.', '')}"
    if here in (target.lower() for target in targets):
        return None
    return f"it was built for {', '.join(targets)}, but this GPU is {gpu.name} ({here})"


def _newer(built: str, here: str) -> bool:
    """Say whether ``here`` is of the same major version as ``built``, and not older."""
    one, other = _numbers(built), _numbers(here)
    return one[:1] == other[:1] and one <= other


def _number(gpu: Gpu) -> tuple[int, ...]:
    return _numbers(gpu.compute_capability)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
