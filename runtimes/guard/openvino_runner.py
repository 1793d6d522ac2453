"""The guard on OpenVINO, which on x86 processors multiplies in int8 and, where the hardware can, in bfloat16."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.guard.bundle import Bundle, specs
from runtimes.guard.onnx_file import OnnxTensor
from runtimes.guard.onnxruntime_runner import EMBEDDINGS
from runtimes.guard.runner import GuardOutput, GuardRunner
from safevlm.contract.graph_fit import misfit
from safevlm.contract.manifest import GuardFile
from safevlm.errors import BundleError, MissingExtraError

__all__ = ["OpenVinoRunner"]

OUTPUTS = ("probs", "logits")
NUMPY_NAMES = {"u8": "uint8", "f32": "float32", "f16": "float16"}
"""numpy's names of the types that a guard may have."""


class OpenVinoRunner(GuardRunner):
    """Run an ONNX file of a bundle on the CPU, one image at a time: the default one, or ``file``.

    A float32 file is computed in float32. What an INT8 or FP16 file leaves in floating point may be computed in
    bfloat16 where the processor can. ``threads`` bounds the threads (OpenVINO chooses when it is None).
    """

    runtime = "openvino"

    def __init__(self, bundle: Bundle, file: GuardFile | None = None, threads: int | None = None) -> None:
        super().__init__()
        self.bundle = bundle
        self.file = file or static_file(bundle)
        self.threads = threads
        self.preprocessing = bundle.manifest.preprocessing
        self.class_count = len(bundle.manifest.classes)
        self.gives_embeddings = any(output.name == EMBEDDINGS for output in self.file.outputs)
        self._request: Any = None

    def _activate(self) -> None:
        try:
            openvino = import_module("openvino")
        except ImportError as error:
            raise MissingExtraError("openvino", "openvino", "judging with OpenVINO") from error
        path, core = self.bundle.path(self.file), openvino.Core()
        try:
            model = core.read_model(str(path))
            self._check_fit(model, str(path))
            model.reshape({0: [1, self.preprocessing.height, self.preprocessing.width, 3]})
            compiled = core.compile_model(model, "CPU", self._settings())
        except RuntimeError as error:  # OpenVINO has no other kind
            raise BundleError(
                f"{path}: OpenVINO {openvino.__version__} cannot load it: {_last_line(error)}. "
                "Export the bundle again, or install a newer openvino."
            ) from error
        self._request = compiled.create_infer_request()
        self.failures = (*GuardRunner.failures, RuntimeError, ValueError)

    def _check_fit(self, model: Any, path: str) -> None:
        """Compare what was loaded with the manifest: the file could have been swapped since the bundle was opened."""
        inputs, outputs = (specs(map(_tensor, tensors), path) for tensors in (model.inputs, model.outputs))
        problem = misfit(self.file.role, inputs, outputs, self.preprocessing, len(self.bundle.manifest.classes))
        if problem is not None:
            raise BundleError(f"{path} does not fit its manifest: {problem}. Export the bundle again.")

    def _settings(self) -> dict[str, str | int]:
        settings: dict[str, str | int] = {"PERFORMANCE_HINT": "LATENCY"}
        if self.file.precision == "fp32":
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        if self.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.threads
        return settings

    def _deactivate(self) -> None:
        self._request = None

    def _run(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        probs, logits = self._infer(OUTPUTS, rgb)
        return GuardOutput(probs=probs, logits=logits)

    def _run_sharing(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        probs, logits, embeddings = self._infer((*OUTPUTS, EMBEDDINGS), rgb)
        return GuardOutput(probs=probs, logits=logits, embeddings=embeddings)

    def _infer(self, names: tuple[str, ...], rgb: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        """Return the named outputs of every image; the arrays are copies, since OpenVINO uses its own again."""
        request = self._held(self._request)
        rows: list[list[npt.NDArray[np.float32]]] = [[] for _ in names]
        for image in rgb:
            found = request.infer([image[np.newaxis]])
            for name, row in zip(names, rows, strict=True):
                row.append(np.array(found[name], dtype=np.float32))
        return [np.concatenate(row) for row in rows]


def _tensor(value: Any) -> OnnxTensor:
    """Return OpenVINO's word of an input or output."""
    kind = str(value.element_type.get_type_name())
    sides = tuple(int(side.get_length()) if side.is_static else None for side in value.partial_shape)
    return OnnxTensor(value.any_name, NUMPY_NAMES.get(kind, kind), sides)


def static_file(bundle: Bundle) -> GuardFile:
    """Return the default file, or the static INT8 one beside it where the default finds its scales as it runs."""
    file = bundle.file()
    return bundle.file("int8") if file.precision == "int8-dynamic" else file


def _last_line(error: RuntimeError) -> str:
    """Return what went wrong: OpenVINO's messages begin with where in its sources."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
