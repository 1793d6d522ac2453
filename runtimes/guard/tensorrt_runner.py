"""The guard on TensorRT 8.6, 10 and 11: name-based tensors, device memory through cuda-python, no torch.

API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api (``ICudaEngine``,
``IExecutionContext``); every call used here exists in 8.6, 10.x and 11.x alike.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.guard.bundle import Bundle
from runtimes.guard.cuda import CudaRuntime, DeviceBuffer, Gpu, current_gpu, load_cuda
from runtimes.guard.runner import GuardOutput, GuardRunner
from safevlm.contract.manifest import EngineInfo, GuardFile
from safevlm.errors import BundleError, InputError, MissingExtraError, SafeVLMError

__all__ = [
    "HARDWARE_COMPATIBLE",
    "VERSION_COMPATIBLE",
    "TensorRTRunner",
    "engine_mismatch",
    "import_tensorrt",
    "usable_engine",
]

PURPOSE = "judging with TensorRT"
AMPERE = (8, 0)
HARDWARE_COMPATIBLE, VERSION_COMPATIBLE = "hardware_compatible", "version_compatible"
"""Options of an engine that runs elsewhere, too (EngineInfo.options)."""
INPUT, OUTPUTS, EMBEDDINGS = "rgb", ("probs", "logits"), "embeddings"
NAN_BYTE = 0xFF
"""Four of them are a float32 that is not a number."""


def import_tensorrt() -> Any:
    """Return the ``tensorrt`` module; MissingExtraError where it is not installed."""
    try:
        return import_module("tensorrt")
    except ImportError as error:
        raise MissingExtraError("tensorrt", "trt", PURPOSE) from error


def engine_mismatch(info: EngineInfo, version: str, gpu: Gpu) -> str | None:
    """Say why an engine cannot run with this TensorRT on this GPU; None when it can.

    A version compatible engine runs with newer releases of its major version, a hardware compatible one on every GPU
    from compute capability 8.0 up ("Version Compatibility" and "Hardware Compatibility" in TensorRT's documentation).
    """
    if info.gpu_name is None or info.compute_capability is None:
        return "it was built ahead of time, and is not verified on this GPU"
    newer = bool(info.options.get(VERSION_COMPATIBLE)) and _newer(info.tensorrt_version, version)
    if info.tensorrt_version != version and not newer:
        return f"it was built with TensorRT {info.tensorrt_version}, here is {version}"
    built_for = Gpu(info.gpu_name, info.compute_capability)
    portable = bool(info.options.get(HARDWARE_COMPATIBLE)) and min(_number(built_for), _number(gpu)) >= AMPERE
    if built_for != gpu and not portable:
        return (
            f"it was built on {built_for.name} (compute capability {built_for.compute_capability}), "
            f"here is {gpu.name} ({gpu.compute_capability})"
        )
    return None


def _newer(built: str, here: str) -> bool:
    """Say whether ``here`` is of the same major version as ``built``, and not older."""
    one, other = (tuple(int(part) for part in version.split(".") if part.isdigit()) for version in (built, here))
    return one[:1] == other[:1] and one <= other


def _number(gpu: Gpu) -> tuple[int, ...]:
    return tuple(int(part) for part in gpu.compute_capability.split("."))


def usable_engine(bundle: Bundle, precision: str | None = None) -> GuardFile:
    """Return the bundle's first engine that runs here.

    Raises MissingExtraError without the libraries, InputError without a GPU, BundleError when the bundle
    has no engine or only engines of another TensorRT or GPU, with the command that builds one.
    """
    bundle.file(precision, kind="engine")
    version = str(import_tensorrt().__version__)
    gpu = current_gpu(load_cuda(PURPOSE))
    reasons = []
    for file in bundle.files("engine"):
        if precision is not None and file.precision != precision:
            continue
        reason = _mismatch(file, version, gpu)
        if reason is None:
            return file
        reasons.append(f"{file.path}: {reason}")
    raise _not_for_here(bundle, "; ".join(reasons))


class TensorRTRunner(GuardRunner):
    """Run an engine of a bundle: the first that fits this machine, or ``file``.

    A batch above the engine's profile is judged in parts; one below its least batch is refused.
    """

    runtime = "tensorrt"

    def __init__(self, bundle: Bundle, file: GuardFile | None = None) -> None:
        super().__init__()
        self.bundle = bundle
        self.file = file
        self.preprocessing = bundle.manifest.preprocessing
        self.class_count = len(bundle.manifest.classes)
        self._loaded: _LoadedEngine | None = None

    def _activate(self) -> None:
        trt = import_tensorrt()
        cuda = load_cuda(PURPOSE)
        gpu = current_gpu(cuda)  # before any TensorRT object: creating one without a GPU can crash
        if self.file is None:
            self.file = usable_engine(self.bundle)
        reason = _mismatch(self.file, str(trt.__version__), gpu)
        if reason is not None:
            raise _not_for_here(self.bundle, f"{self.file.path}: {reason}")
        engine = _deserialize(trt, self.bundle, self.file)
        widths = self._widths(trt, engine)
        self.gives_embeddings = EMBEDDINGS in widths
        loaded = _LoadedEngine(cuda, engine, self.file.path)
        self._frees.callback(loaded.free)
        loaded.allocate(self.preprocessing.height * self.preprocessing.width * 3, widths)
        self._loaded = loaded

    def _deactivate(self) -> None:
        self._loaded = None

    def _run(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        return self._run_parts(rgb, OUTPUTS)

    def _run_sharing(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        return self._run_parts(rgb, (*OUTPUTS, EMBEDDINGS))

    def _run_parts(self, rgb: npt.NDArray[np.uint8], outputs: tuple[str, ...]) -> GuardOutput:
        loaded = self._held(self._loaded)
        starts = range(0, len(rgb), loaded.most)
        parts = [self._run_part(loaded, rgb[start : start + loaded.most], outputs) for start in starts]
        return GuardOutput(**{name: np.concatenate([part[name] for part in parts]) for name in outputs})

    def _run_part(
        self, loaded: _LoadedEngine, rgb: npt.NDArray[np.uint8], outputs: tuple[str, ...]
    ) -> dict[str, npt.NDArray[np.float32]]:
        if len(rgb) < loaded.least:
            raise InputError(
                f"this engine takes {loaded.least} to {loaded.most} images at once, not {len(rgb)}: build "
                f"one from 1 up with `{_rebuild(self.bundle)}`"
            )
        return loaded.run(rgb, outputs)

    def _widths(self, trt: Any, engine: Any) -> dict[str, tuple[int, ...]]:
        """Return each output's shape without its batch; BundleError unless all is uint8 in and float32 out."""
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name for name in names}
        outputs = (*OUTPUTS, EMBEDDINGS) if EMBEDDINGS in names else OUTPUTS
        wanted = {INPUT: "uint8"} | dict.fromkeys(outputs, "float32")
        modes = {name: engine.get_tensor_mode(name) for name in names}
        inputs = [name for name, mode in modes.items() if mode == trt.TensorIOMode.INPUT]
        if found != wanted or inputs != [INPUT]:
            raise BundleError(
                f"a guard engine has {wanted}; this one has {found}, of which {inputs} are inputs. "
                f"Build it again: {_rebuild(self.bundle)}"
            )
        assert self.class_count is not None
        widths: dict[str, tuple[int, ...]] = dict.fromkeys(OUTPUTS, (self.class_count,))
        if EMBEDDINGS in names:
            _, *width = engine.get_tensor_shape(EMBEDDINGS)
            if len(width) != 2 or min(width) < 1:
                raise BundleError(
                    f"a guard engine gives embeddings of N x T x D with T and D fixed; this one states N x "
                    f"{' x '.join(map(str, width))}. Build it again: {_rebuild(self.bundle)}"
                )
            widths[EMBEDDINGS] = tuple(map(int, width))
        return widths


class _LoadedEngine:
    """An engine with its context, stream and device memory: what the calls of one activation work on."""

    def __init__(self, cuda: CudaRuntime, engine: Any, path: str) -> None:
        self._cuda, self._engine = cuda, engine
        self._buffers: dict[str, DeviceBuffer] = {}
        self._stream: Any = None
        self._widths: dict[str, tuple[int, ...]] = {}
        least, _, most = engine.get_tensor_profile_shape(INPUT, 0)
        self.least, self.most = int(least[0]), int(most[0])
        self._context = engine.create_execution_context()
        if self._context is None:
            raise SafeVLMError(f"{path}: TensorRT could not create an execution context (memory?)")

    def allocate(self, image_bytes: int, widths: dict[str, tuple[int, ...]]) -> None:
        """Take a stream, and memory for the largest batch of images of so many bytes and of outputs so wide."""
        self._stream = self._cuda.call("cudaStreamCreate")
        self._widths = widths
        sizes = {INPUT: image_bytes * self.most}
        sizes |= {name: 4 * math.prod(width) * self.most for name, width in widths.items()}
        for name, size in sizes.items():
            self._buffers[name] = DeviceBuffer(self._cuda, size)
            if not self._context.set_tensor_address(name, self._pointer(name)):
                raise SafeVLMError(f"TensorRT refused the memory of {name}")

    def free(self) -> None:
        """Give everything back."""
        self._context = self._engine = None
        buffers, self._buffers = self._buffers, {}
        stream, self._stream = self._stream, None
        for buffer in buffers.values():
            buffer.free()
        if stream is not None:
            self._cuda.call("cudaStreamDestroy", stream)

    def run(self, rgb: npt.NDArray[np.uint8], outputs: tuple[str, ...]) -> dict[str, npt.NDArray[np.float32]]:
        """Judge at most the profile's largest batch; copy only ``outputs`` back from the GPU.

        An output that the engine did not write is NaN, never what a call before has left.
        """
        if not self._context.set_input_shape(INPUT, rgb.shape):
            raise SafeVLMError(f"TensorRT refused an input of shape {rgb.shape}")
        shapes = {name: (len(rgb), *width) for name, width in self._widths.items()}
        for name, shape in shapes.items():
            if (stated := tuple(self._context.get_tensor_shape(name))) != shape:
                raise SafeVLMError(f"TensorRT gives {name} the shape {stated}, not {shape}")
        results = {name: np.full(shapes[name], np.nan, np.float32) for name in outputs}
        try:
            self._queue(rgb, results)
        finally:  # after an error, too: what was queued may still read and write this call's memory
            self._cuda.call("cudaStreamSynchronize", self._stream)
        return results

    def _queue(self, rgb: npt.NDArray[np.uint8], results: dict[str, npt.NDArray[np.float32]]) -> None:
        self._cuda.to_device(self._pointer(INPUT), rgb.ctypes.data, rgb.nbytes, self._stream)
        for name, result in results.items():
            self._cuda.fill(self._pointer(name), NAN_BYTE, result.nbytes, self._stream)
        if not self._context.execute_async_v3(int(self._stream)):
            raise SafeVLMError("TensorRT could not queue the guard; its log above says why")
        for name, result in results.items():
            self._cuda.to_host(result.ctypes.data, self._pointer(name), result.nbytes, self._stream)

    def _pointer(self, name: str) -> int:
        pointer = self._buffers[name].pointer
        assert pointer is not None
        return pointer


def _deserialize(trt: Any, bundle: Bundle, file: GuardFile) -> Any:
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    if file.engine is not None and file.engine.options.get(VERSION_COMPATIBLE):
        runtime.engine_host_code_allowed = True  # such an engine carries a small runtime; its hash was checked
    engine = runtime.deserialize_cuda_engine(bundle.content(file))
    if engine is None:
        raise _not_for_here(bundle, f"{file.path}: TensorRT {trt.__version__} could not read it")
    return engine


def _mismatch(file: GuardFile, version: str, gpu: Gpu) -> str | None:
    if file.engine is None:
        return f"it is a file of kind {file.kind}, not an engine"
    return engine_mismatch(file.engine, version, gpu)


def _rebuild(bundle: Bundle) -> str:
    return f"python -m export.trt --bundle {bundle.folder}"


def _not_for_here(bundle: Bundle, reason: str) -> BundleError:
    return BundleError(
        f"no engine of {bundle.folder} runs here ({reason}). An engine runs only with the TensorRT version "
        f"and on the GPU it was built with. Build one here, `{_rebuild(bundle)}`, or use --runtime onnxruntime."
    )
