"""What engine is asked for, and what it is built with: TensorRT on the GPU here, or TensorRT-RTX without one."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from export.guard.options import PARITY_IMAGES
from export.tensorrt.builder import EngineOptions
from export.tensorrt.engine import Device
from export.tensorrt.targets import DEFAULT_TARGETS, check_targets
from runtimes.guard.cuda import current_gpu, free_memory, is_jetson, load_cuda, tensorrt_extra
from runtimes.guard.engines.library import AMPERE, import_tensorrt
from safevlm.errors import EngineUnavailableError, InputError, MissingExtraError

__all__ = ["Builder", "EngineRequest", "check_options", "find_device"]

PURPOSE = "building a TensorRT engine"
Builder = Literal["auto", "tensorrt", "rtx"]


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """An engine to build: with what options, and how it is checked.

    ``rebuild`` builds even what is there already; ``timing_cache`` is a file, by default one a TensorRT version
    and GPU in the user's cache folder; ``images`` a folder of images for the parity check, else drawn ones.
    ``builder`` ``auto`` is TensorRT where there is a GPU for it, otherwise TensorRT-RTX, which compiles for
    ``targets``; an option that only one of the two has decides for that one.
    """

    options: EngineOptions = field(default_factory=EngineOptions)
    builder: Builder = "auto"
    targets: tuple[str, ...] | None = None
    rebuild: bool = False
    timing_cache: Path | None = None
    images: Path | None = None
    parity_images: int = PARITY_IMAGES

    def __post_init__(self) -> None:
        if self._only_tensorrt and self._only_rtx:
            raise InputError(
                f"{self._only_tensorrt[0]} is an option of TensorRT and {self._only_rtx[0]} of TensorRT-RTX: give one "
                "of the two."
            )

    @property
    def builders(self) -> tuple[Literal["tensorrt", "rtx"], ...]:
        """The builders that may be taken, the first one preferred."""
        if self._only_rtx:
            return ("rtx",)
        return ("tensorrt",) if self._only_tensorrt else ("tensorrt", "rtx")

    @property
    def _only_tensorrt(self) -> list[str]:
        given = {
            "--builder tensorrt": self.builder == "tensorrt",
            "--hardware-compatible": self.options.hardware_compatible,
            "--version-compatible": self.options.version_compatible,
            "--timing-cache": self.timing_cache is not None,
        }
        return [option for option, is_given in given.items() if is_given]

    @property
    def _only_rtx(self) -> list[str]:
        given = {"--builder rtx": self.builder == "rtx", "--targets": self.targets is not None}
        return [option for option, is_given in given.items() if is_given]


def find_device(request: EngineRequest = EngineRequest()) -> Device:
    """Return what engines are built with and for; EngineUnavailableError names everything that is missing.

    Raises InputError for targets that TensorRT-RTX does not compile for.
    """
    missing: list[str] = []
    for builder in request.builders:
        device, lacks = _gpu_device() if builder == "tensorrt" else _rtx_device(request.targets or DEFAULT_TARGETS)
        if device is not None:
            return device
        missing += lacks
    raise EngineUnavailableError(f"no engine was built here: {'; '.join(missing)}.")


def check_options(options: EngineOptions, device: Device) -> None:
    """Refuse what a device's TensorRT or GPU cannot build: before an export, which can take hours.

    Raises InputError with a way out.
    """
    try:
        device.api.source_precision(options.precision)
    except EngineUnavailableError as error:
        raise InputError(str(error)) from error
    if options.hardware_compatible and device.gpu is not None:
        if is_jetson():
            raise InputError(
                "--hardware-compatible: engines of a Jetson run only on the same kind of Jetson. Leave it out."
            )
        if tuple(map(int, device.gpu.compute_capability.split("."))) < AMPERE:
            raise InputError(
                f"--hardware-compatible engines need compute capability 8.0 or newer, and {device.gpu.name} has "
                f"{device.gpu.compute_capability}. Leave it out, or build on a newer GPU."
            )
    if options.version_compatible and not _has_lean_runtime(device.version):
        raise InputError(
            f"--version-compatible builds TensorRT's lean runtime into the engine, and tensorrt_lean is not installed. "
            f"Install it in the same version: {_lean_package(device.version)}."
        )


def _has_lean_runtime(version: str) -> bool:
    """Say whether the builder will find the lean runtime; a wheel's is found once its module is imported."""
    try:
        lean = import_module("tensorrt_lean")
    except ImportError:
        pass
    else:
        return str(lean.__version__).split(".post")[0] == version.split(".post")[0]
    try:
        ctypes.CDLL(f"libnvinfer_lean.so.{version.split('.')[0]}")
    except OSError:
        return False
    return True


def _lean_package(version: str) -> str:
    if is_jetson():
        return "sudo apt-get install libnvinfer-lean" + version.split(".")[0]
    cuda = next((name for name in ("cu13", "cu12") if _is_installed(f"tensorrt-{name}")), None)
    return f"pip install tensorrt-lean{f'-{cuda}' if cuda else ''}=={version}"


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _rtx_device(targets: tuple[str, ...]) -> tuple[Device | None, list[str]]:
    try:
        trt = import_tensorrt("tensorrt_rtx")
    except MissingExtraError:
        return None, ["TensorRT-RTX, which needs no GPU, is not installed (pip install 'safevlm-edge[rtx]')"]
    check_targets(trt, targets)
    return Device(trt, targets=targets), []


def _gpu_device() -> tuple[Device | None, list[str]]:
    """Return TensorRT and the GPU here, or all that is missing."""
    missing, trt, gpu, free = [], None, None, None
    try:
        trt = import_tensorrt()
        _ = Device(trt).api
    except MissingExtraError:
        missing.append(f"the package 'tensorrt' is not installed ({_how_to_install()})")
    except EngineUnavailableError as error:
        missing.append(str(error).rstrip("."))
    try:
        cuda = load_cuda(PURPOSE)
        gpu, free = current_gpu(cuda), free_memory(cuda)
    except MissingExtraError:
        missing.append(f"the package 'cuda-python' is not installed (pip install 'safevlm-edge[{tensorrt_extra()}]')")
    except InputError as error:
        missing.append(f"no usable NVIDIA GPU was found ({_reason(error)})")
    return (None if missing else Device(trt, gpu, free)), missing


def _how_to_install() -> str:
    if is_jetson():
        return "JetPack brings it: make the environment with python3 -m venv --system-site-packages"
    return f"pip install 'safevlm-edge[{tensorrt_extra()}]'"


def _reason(error: InputError) -> str:
    """Return what CUDA said, without the advice that follows it."""
    return str(error.__cause__ or error).rstrip(".")
