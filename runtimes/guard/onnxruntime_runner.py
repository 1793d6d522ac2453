"""The guard on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.guard.bundle import Bundle, specs
from runtimes.guard.onnx_file import OnnxTensor
from runtimes.guard.runner import FileRunner, GuardOutput, GuardRunner
from safevlm.contract.graph_fit import misfit
from safevlm.contract.manifest import GuardFile
from safevlm.errors import BundleError, MissingExtraError

__all__ = ["OnnxRuntimeRunner"]

PREFERRED_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
"""Tried in this order where the installed build has them."""
EMBEDDINGS = "embeddings"
NUMPY_NAMES = {"float": "float32", "double": "float64"}
"""numpy's names of types where ONNX Runtime's are others."""


class OnnxRuntimeRunner(FileRunner):
    """Run an ONNX file of a bundle: the default one, or ``file``.

    ``threads`` bounds the threads within an operation (ONNX Runtime chooses when it is None). Calls may run at the
    same time: ``InferenceSession.run`` is made for that, nothing is bound to memory of ours, and every call gets
    arrays of its own.
    """

    runtime = "onnxruntime"
    exclusive = False
    outputs: tuple[str, ...] = ("probs", "logits")
    """That a file must have."""

    def __init__(
        self,
        bundle: Bundle,
        file: GuardFile | None = None,
        threads: int | None = None,
        *,
        providers: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.bundle = bundle
        self.file = file or bundle.file()
        self.role = self.file.role
        self.threads = threads
        self.providers = providers
        self.preprocessing = bundle.manifest.preprocessing
        self.class_count = len(bundle.manifest.classes)
        self.gives_embeddings = any(output.name == EMBEDDINGS for output in self.file.outputs)
        self.session: Any = None

    def _activate(self) -> None:
        try:
            onnxruntime = import_module("onnxruntime")
            state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "cpu", "judging with ONNX Runtime") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, too; printed, they show names out of the file as they are
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        there = onnxruntime.get_available_providers()
        wanted = self.providers or [name for name in PREFERRED_PROVIDERS if name in there]
        path = self.bundle.path(self.file)
        refusals = tuple(
            kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)
        )
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=list(wanted))
        except refusals as error:
            raise BundleError(
                f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {_first_line(error)}. "
                "Export the bundle again, or install a newer onnxruntime."
            ) from error
        self._check_fit(session, str(path))
        self.session, self.failures = session, (*GuardRunner.failures, ValueError, *refusals)

    def _check_fit(self, session: Any, path: str) -> None:
        """Compare what was loaded with the manifest: the file could have been swapped since the bundle was opened."""
        inputs, outputs = (
            specs([_tensor(each) for each in tensors], path)
            for tensors in (session.get_inputs(), session.get_outputs())
        )
        problem = misfit(self.file.role, inputs, outputs, self.preprocessing, len(self.bundle.manifest.classes))
        if problem is not None:
            raise BundleError(f"{path} does not fit its manifest: {problem}. Export the bundle again.")

    def _deactivate(self) -> None:
        self.session = None

    def _run(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        probs, logits = self._session_run(list(self.outputs), rgb)
        return GuardOutput(probs=probs, logits=logits)

    def _run_sharing(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        probs, logits, embeddings = self._session_run([*self.outputs, EMBEDDINGS], rgb)
        return GuardOutput(probs=probs, logits=logits, embeddings=embeddings)

    def _run_file(self, inputs: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.float32]]:
        session = self._held(self.session)
        (name,) = (each.name for each in session.get_inputs())
        names = [each.name for each in session.get_outputs()]
        return dict(zip(names, map(np.asarray, session.run(names, {name: inputs})), strict=True))

    def _session_run(self, names: list[str], rgb: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        session = self._held(self.session)
        pieces = [rgb] if not self.file.one_at_a_time else [rgb[i : i + 1] for i in range(len(rgb))]
        runs = [session.run(names, {"rgb": piece}) for piece in pieces]
        return [np.concatenate([np.asarray(run[i]) for run in runs]) for i in range(len(names))]


def _tensor(value: Any) -> OnnxTensor:
    """Return ONNX Runtime's word of an input or output, whose type is such as ``tensor(float)``."""
    kind = str(value.type).removeprefix("tensor(").removesuffix(")")
    sides = tuple(side if isinstance(side, int) else None for side in value.shape)
    return OnnxTensor(value.name, NUMPY_NAMES.get(kind, kind), sides)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
