"""The guard on ONNX Runtime, on a GPU where its CUDA build is installed.

By itself ONNX Runtime goes on with the CPU where a provider cannot be had or fails, and says so in a log or not at all.
Here the provider that was asked for is the one that judges, or there is an error.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.guard.bundle import Bundle, specs
from runtimes.guard.nvidia_driver import gpu_names
from runtimes.guard.onnx_file import OnnxTensor
from runtimes.guard.runner import FileRunner, GuardOutput, GuardRunner
from safevlm.contract.graph_fit import misfit
from safevlm.contract.manifest import GuardFile
from safevlm.errors import BundleError, InputError, MissingExtraError
from safevlm.machine import memory_problem

__all__ = ["OnnxRuntimeRunner"]

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
OPTIONS: Mapping[str, Mapping[str, str]] = {CUDA: {"use_tf32": "0"}}
"""TF32 keeps ten bits of a factor: a float32 file would differ from its reference by far more than 1e-5."""
FAILED_TO_LOAD = "Failed to load "
EMBEDDINGS = "embeddings"
NUMPY_NAMES = {"float": "float32", "double": "float64"}
"""numpy's names of types where ONNX Runtime's are others."""

_log = logging.getLogger(__name__)


class OnnxRuntimeRunner(FileRunner):
    """Run an ONNX file of a bundle: the default one, or ``file``.

    ``threads`` bounds the threads within an operation (ONNX Runtime chooses when it is None). ``providers`` are ONNX
    Runtime's execution providers, the first of which must be had; by default CUDA's where the installed build has it
    and there is a GPU, with the CPU for what it lacks, and otherwise the CPU. Calls may run at the
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
        self._provider: str | None = None

    def _activate(self) -> None:
        try:
            onnxruntime = import_module("onnxruntime")
            state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "cpu", "judging with ONNX Runtime") from error
        there = onnxruntime.get_available_providers()
        gpus = gpu_names() if CUDA in (self.providers or there) else ()
        wanted = tuple(self.providers or _preferred(there, gpus))
        refusals: tuple[type[Exception], ...] = tuple(
            kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)
        )
        session = self._open_session(onnxruntime, wanted, (RuntimeError, state.EPFail), refusals)
        self._check_fit(session, str(self.bundle.path(self.file)))
        self.session, self.failures = session, (*GuardRunner.failures, ValueError, *refusals)
        self._provider, self.gpu = wanted[0], gpus[0] if gpus and wanted[0] == CUDA else None

    def _open_session(
        self,
        onnxruntime: Any,
        wanted: Sequence[str],
        of_providers: tuple[type[Exception], ...],
        refusals: tuple[type[Exception], ...],
    ) -> Any:
        """Return a session whose first provider is the first that is wanted."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, too; printed, they show names out of the file as they are
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        named, path = f"ONNX Runtime {onnxruntime.__version__}", self.bundle.path(self.file)
        there = onnxruntime.get_available_providers()
        if wanted[0] not in there:
            raise _not_in_use(named, wanted[0], f"this build has {', '.join(there)}")
        lacking = _preload(onnxruntime) if CUDA in wanted else ""
        providers = [(name, dict(OPTIONS.get(name, {}))) for name in wanted]
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        except (*of_providers, *refusals) as error:
            if memory := memory_problem(error):
                raise InputError(f"{path} cannot be loaded. {memory} Free it, or take a smaller precision.") from error
            if wanted[0] != CPU and isinstance(error, of_providers):  # not one of a file's faults
                raise _not_in_use(named, wanted[0], lacking or _first_line(error)) from error
            raise BundleError(
                f"{path}: {named} cannot load it: {_first_line(error)}. "
                "Export the bundle again, or install a newer onnxruntime."
            ) from error
        in_use = session.get_providers()[0]
        if in_use != wanted[0]:
            raise _not_in_use(named, wanted[0], lacking or f"it would judge on {in_use}")
        return session

    @property
    def provider(self) -> str:
        """ONNX Runtime's execution provider."""
        return self._provider or self.runtime

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
        names = [each.name for each in self._held(self.session).get_outputs()]
        return dict(zip(names, self._session_run(names, inputs), strict=True))

    def _session_run(self, names: list[str], inputs: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
        session = self._held(self.session)
        (given,) = session.get_inputs()
        pieces = [inputs] if not self.file.one_at_a_time else [inputs[i : i + 1] for i in range(len(inputs))]
        runs = [session.run(names, {given.name: piece}) for piece in pieces]
        return [np.concatenate([np.asarray(run[i]) for run in runs]) for i in range(len(names))]


def _preferred(there: Sequence[str], gpus: Sequence[str]) -> tuple[str, ...]:
    if CUDA in there and not gpus:
        _log.warning(
            "ONNX Runtime's CUDA build is installed, and there is no GPU that this process may use: the guard runs on "
            "the CPU."
        )
    return (CUDA, CPU) if CUDA in there and gpus else (CPU,)


def _preload(onnxruntime: Any) -> str:
    """Load the CUDA and cuDNN that pip installed; return the first thing that is said to be missing, or nothing.

    Releases before 1.21 cannot do it and look for the system's alone. What it prints would stand in a command's output.
    """
    said = io.StringIO()
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(said):
            preload()
    lines = said.getvalue().splitlines()
    for line in lines:
        _log.info("ONNX Runtime: %s", line)
    return next((line.strip() for line in lines if line.startswith(FAILED_TO_LOAD)), "")


def _not_in_use(runtime: str, provider: str, reason: str) -> InputError:
    return InputError(
        f"{runtime} cannot use {provider}: {reason}. Install CUDA and cuDNN for it: pip install 'safevlm-edge[gpu]'. "
        "To judge on the CPU, set CUDA_VISIBLE_DEVICES to nothing."
    )


def _tensor(value: Any) -> OnnxTensor:
    """Return ONNX Runtime's word of an input or output, whose type is such as ``tensor(float)``."""
    kind = str(value.type).removeprefix("tensor(").removesuffix(")")
    sides = tuple(side if isinstance(side, int) else None for side in value.shape)
    return OnnxTensor(value.name, NUMPY_NAMES.get(kind, kind), sides)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
