"""A TensorRT engine as it is loaded: read, compared with its role, given memory, and run. No torch.

API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api (``ICudaEngine``, ``IExecutionContext``);
every call used here exists in 8.6, 10.x and 11.x alike. What TensorRT-RTX has beside these is asked of it alone.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.guard.bundle import Bundle, specs
from runtimes.guard.cuda import DeviceBuffer
from runtimes.guard.engines.library import VERSION_COMPATIBLE, Library
from runtimes.guard.engines.runtime_cache import RuntimeCache
from runtimes.guard.onnx_file import OnnxTensor
from safevlm.contract.graph_fit import misfit
from safevlm.contract.manifest import GuardFile, TensorSpec
from safevlm.errors import BundleError, EngineRefusedError, InputError, SafeVLMError

__all__ = ["OUTPUTS", "LoadedEngine", "advice", "rebuild_command"]

NAN_BYTE = 0xFF
"""Four of them are a float32 that is not a number."""
OUTPUTS = {"guard": ("probs", "logits"), "vision": ("embeddings",), "head": ("probs", "logits")}
"""What an engine of a role gives; a guard may give embeddings, too."""
DIAGNOSTICS = {
    "VERSION_MISMATCH": "it was built by another version of TensorRT-RTX",
    "UNSUPPORTED_CC": "it was not built for the compute capability of this GPU",
    "OLD_CUDA_DRIVER": "the GPU's driver is too old for it: update the driver",
    "OLD_CUDA_RUNTIME": "the installed CUDA runtime is too old for it: update the CUDA libraries",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it",
    "MALFORMED_ENGINE": "the file is damaged, or is not an engine of TensorRT-RTX",
    "CUDA_ERROR": "CUDA's driver or runtime is not installed correctly",
}
"""EngineInvalidityDiagnostics in plain words."""

_log = logging.getLogger(__name__)


class LoadedEngine:
    """An engine with its context, stream and device memory: what the calls of one activation work on."""

    def __init__(self, library: Library, bundle: Bundle, file: GuardFile) -> None:
        """Read the file; whatever it is, it is checked before anything runs.

        Raises BundleError for a file that TensorRT cannot read or that is no engine of its role.
        """
        self._library, self._file = library, file
        self._cuda = library.cuda
        self._buffers: dict[str, DeviceBuffer] = {}
        self._stream: Any = None
        self._config: Any = None
        self._cache: RuntimeCache | None = None
        self._engine = _deserialize(library, bundle, file)
        self._input, outputs = _checked(library, bundle, file, self._engine)
        self._widths = {each.name: tuple(map(int, each.shape[1:])) for each in outputs}
        least, _, most = self._engine.get_tensor_profile_shape(self._input.name, 0)
        self.least, self.most = int(least[0]), int(most[0])
        self._context = self._create_context()
        if self._context is None:
            raise SafeVLMError(f"{file.path}: {library.name} could not create an execution context{library.said()}")
        self._rebuild = rebuild_command(bundle)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of all that it gives."""
        return tuple(self._widths)

    def _create_context(self) -> Any:
        if self._library.module != "tensorrt_rtx":
            return self._engine.create_execution_context()
        self._config = config = self._engine.create_runtime_config()
        # By default kernels for a new batch size are compiled beside the calls and take over between two of them: an
        # image's answer would change by rounding while the process runs, away from what was verified.
        kinds = self._library.trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
        self._cache = RuntimeCache(self._library, config, self._file.sha256)
        return self._engine.create_execution_context(config)

    def allocate(self) -> None:
        """Take a stream, and memory for the largest batch."""
        self._stream = self._cuda.call("cudaStreamCreate")
        sizes = {self._input.name: np.dtype(self._input.dtype).itemsize * math.prod(self._row_shape)}
        sizes |= {name: 4 * math.prod(width) for name, width in self._widths.items()}
        for name, size in sizes.items():
            self._buffers[name] = DeviceBuffer(self._cuda, size * self.most)
            if not self._context.set_tensor_address(name, self._pointer(name)):
                raise SafeVLMError(f"{self._library.name} refused the memory for {name}")

    def save_cache(self) -> None:
        """Keep what was compiled for this GPU so far."""
        if self._cache is not None:
            self._cache.save()

    def free(self) -> None:
        """Give everything back."""
        try:
            self.save_cache()
        finally:
            self._context = self._cache = self._config = self._engine = None
            buffers, self._buffers = self._buffers, {}
            stream, self._stream = self._stream, None
            for buffer in buffers.values():
                buffer.free()
            if stream is not None:
                self._cuda.call("cudaStreamDestroy", stream)

    def run(self, inputs: npt.NDArray[Any], outputs: tuple[str, ...]) -> dict[str, npt.NDArray[np.float32]]:
        """Return the named outputs of N inputs, which are run in parts of the profile's largest batch at most.

        Raises InputError for a part below its least batch.
        """
        starts = range(0, len(inputs), self.most)
        parts = [self._run_part(inputs[start : start + self.most], outputs) for start in starts]
        return {name: np.concatenate([part[name] for part in parts]) for name in outputs}

    def _run_part(self, inputs: npt.NDArray[Any], outputs: tuple[str, ...]) -> dict[str, npt.NDArray[np.float32]]:
        """Run one batch; copy only ``outputs`` back from the GPU.

        An output that the engine did not write is NaN, never what a call before has left.
        """
        if len(inputs) < self.least:
            raise InputError(
                f"this engine takes {self.least} to {self.most} images at once, not {len(inputs)}. Build one from 1 up "
                f"with `{self._rebuild}`"
            )
        if inputs.shape[1:] != self._row_shape or not self._context.set_input_shape(self._input.name, inputs.shape):
            raise SafeVLMError(f"{self._library.name} refused an input of shape {inputs.shape}")
        shapes = {name: (len(inputs), *width) for name, width in self._widths.items()}
        for name, shape in shapes.items():
            if (stated := tuple(self._context.get_tensor_shape(name))) != shape:
                raise SafeVLMError(f"{self._library.name} gives {name} the shape {stated}, not {shape}")
        results = {name: np.full(shapes[name], np.nan, np.float32) for name in outputs}
        try:
            self._queue(inputs, results)
        finally:  # after an error, too: what was queued may still read and write this call's memory
            self._cuda.call("cudaStreamSynchronize", self._stream)
        return results

    def _queue(self, inputs: npt.NDArray[Any], results: dict[str, npt.NDArray[np.float32]]) -> None:
        self._cuda.to_device(self._pointer(self._input.name), inputs.ctypes.data, inputs.nbytes, self._stream)
        for name, result in results.items():
            self._cuda.fill(self._pointer(name), NAN_BYTE, result.nbytes, self._stream)
        if not self._context.execute_async_v3(int(self._stream)):
            raise SafeVLMError(f"{self._library.name} could not queue the guard{self._library.said()}")
        for name, result in results.items():
            self._cuda.to_host(result.ctypes.data, self._pointer(name), result.nbytes, self._stream)

    @property
    def _row_shape(self) -> tuple[int, ...]:
        return tuple(map(int, self._input.shape[1:]))

    def _pointer(self, name: str) -> int:
        pointer = self._buffers[name].pointer
        assert pointer is not None
        return pointer


def _deserialize(library: Library, bundle: Bundle, file: GuardFile) -> Any:
    library.log.errors.clear()
    runtime = library.trt.Runtime(library.log)
    if file.engine is not None and file.engine.options.get(VERSION_COMPATIBLE):
        runtime.engine_host_code_allowed = True  # such an engine carries a small runtime; its hash was checked
    content = bundle.content(file)
    if library.module == "tensorrt_rtx":
        if len(content) < runtime.engine_header_size:  # it would be read beyond its end
            raise EngineRefusedError(f"{file.path}: {DIAGNOSTICS['MALFORMED_ENGINE']}", advice(bundle))
        _check_validity(library, bundle, file, *runtime.get_engine_validity(content))
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise EngineRefusedError(f"{file.path}: {library.name} could not read it{library.said()}", advice(bundle))
    return engine


def _check_validity(library: Library, bundle: Bundle, file: GuardFile, validity: Any, diagnostics: int) -> None:
    """Refuse what TensorRT-RTX calls invalid here, or anything that is not known to be valid."""
    kinds, bits = library.trt.EngineInvalidityDiagnostics.__members__, int(diagnostics)
    reasons = [DIAGNOSTICS.get(name, name) for name, kind in kinds.items() if bits & int(kind)]
    if unnamed := bits & ~sum(int(kind) for kind in kinds.values()):
        reasons.append(f"its reason {unnamed} is unknown here")
    told = ("; ".join(reasons) or "it does not say why") + library.said()
    if validity == library.trt.EngineValidity.SUBOPTIMAL:
        _log.warning("%s: %s can run it here, but slower than it could be (%s)", file.path, library.name, told)
    elif validity != library.trt.EngineValidity.VALID:
        reason = f"{file.path}: {library.name} says that it cannot run here: {told}"
        raise EngineRefusedError(reason, advice(bundle))


def _checked(
    library: Library, bundle: Bundle, file: GuardFile, engine: Any
) -> tuple[TensorSpec, tuple[TensorSpec, ...]]:
    """Return an engine's input and outputs. Raises BundleError unless they are those of its role."""
    trt = library.trt
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found: dict[bool, list[OnnxTensor]] = {True: [], False: []}
    for name in names:
        sides = tuple(None if int(side) < 0 else int(side) for side in engine.get_tensor_shape(name))
        kind = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
        found[engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT].append(OnnxTensor(name, kind, sides))
    inputs, outputs = (specs(found[is_input], file.path) for is_input in (True, False))
    manifest = bundle.manifest
    problem = misfit(file.role, inputs, outputs, manifest.preprocessing, len(manifest.classes))
    wanted = {*OUTPUTS[file.role], *(["embeddings"] if file.role == "guard" else [])}
    open_sides = [each.name for each in (*inputs, *outputs) if "N" in each.shape[1:]]
    if problem is None and (strangers := sorted({each.name for each in outputs} - wanted)):
        problem = f"it gives {strangers[0]}, which is not an output of a {file.role}"
    if problem is None and file.role == "head" and (inputs[0].name, inputs[0].dtype) != ("hidden", "float32"):
        problem = f"a head's input is hidden, float32, not {inputs[0].name}, {inputs[0].dtype}"
    if problem is None and open_sides:
        problem = f"only the batch of {open_sides[0]} may be left open"
    if problem is not None:
        raise BundleError(
            f"{file.path} is not a {file.role} engine: {problem}. Build it again: {rebuild_command(bundle)}"
        )
    return inputs[0], outputs


def rebuild_command(bundle: Bundle) -> str:
    """Return the command that builds an engine on the device."""
    return f"python -m export.trt --bundle {bundle.folder}"


def advice(bundle: Bundle) -> str:
    """Return what to do where no engine of a bundle runs."""
    return (
        "An engine runs only with the library version and on the GPUs it was built for. Build one here, "
        f"`{rebuild_command(bundle)}`, or use --runtime onnxruntime."
    )
