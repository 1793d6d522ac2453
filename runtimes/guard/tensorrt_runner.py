"""The guard, or one of its parts, on TensorRT 8.6, 10 and 11 and on TensorRT-RTX, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.guard.bundle import Bundle
from runtimes.guard.engines.library import (
    HARDWARE_COMPATIBLE,
    VERSION_COMPATIBLE,
    engine_mismatch,
    find_library,
    import_tensorrt,
    needs_proof,
)
from runtimes.guard.engines.loaded import LoadedEngine, advice
from runtimes.guard.engines.proof import Proof
from runtimes.guard.engines.verify import is_proven, prove
from runtimes.guard.runner import FileRunner, GuardOutput
from safevlm.contract.graph_fit import Role
from safevlm.contract.manifest import GuardFile
from safevlm.errors import BundleError, EngineRefusedError, InputError, SafeVLMError

__all__ = [
    "HARDWARE_COMPATIBLE",
    "VERSION_COMPATIBLE",
    "TensorRTRunner",
    "engine_mismatch",
    "import_tensorrt",
    "misplaced",
    "usable_engine",
]

OUTPUTS, EMBEDDINGS = ("probs", "logits"), "embeddings"


class TensorRTRunner(FileRunner):
    """Run an engine of a bundle: the first that fits this machine, or ``file``.

    A batch above the engine's profile is judged in parts; one below its least batch is refused. An engine that was not
    run here before is compared with the bundle's ONNX file when it is activated, and refused where they differ;
    ``verify`` compares any engine, anew.
    """

    runtime = "tensorrt"

    def __init__(self, bundle: Bundle, file: GuardFile | None = None, *, verify: bool = False) -> None:
        super().__init__()
        self.bundle = bundle
        self.file = file
        self.verify = verify
        self.preprocessing = bundle.manifest.preprocessing
        self.class_count = len(bundle.manifest.classes)
        self.proof: Proof | None = None
        """Of the last activation; None for an engine that needs none."""
        self._loaded: LoadedEngine | None = None

    def _activate(self) -> None:
        if self.file is None:
            self.file = usable_engine(self.bundle)
        file, info = self.file, self.file.engine
        if info is None:
            raise BundleError(f"{file.path}: it is a file of kind {file.kind}, not an engine. {advice(self.bundle)}")
        library = find_library(info.module)
        reason = engine_mismatch(info, library.version, library.gpu)
        if reason is not None:
            raise EngineRefusedError(f"{file.path}: {reason}", advice(self.bundle))
        loaded = LoadedEngine(library, self.bundle, file)
        self._frees.callback(loaded.free)
        loaded.allocate()
        self.gpu = library.gpu.name
        self.role, self.gives_embeddings = file.role, file.role == "guard" and EMBEDDINGS in loaded.outputs
        self.proof = None
        if self.verify or needs_proof(info, library):
            self.proof = prove(library, self.bundle, file, loaded, again=self.verify)
        loaded.save_cache()
        self._loaded = loaded

    def _deactivate(self) -> None:
        self._loaded = None

    def _run(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        return GuardOutput(**self._held(self._loaded).run(rgb, OUTPUTS))

    def _run_sharing(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        return GuardOutput(**self._held(self._loaded).run(rgb, (*OUTPUTS, EMBEDDINGS)))

    def _run_file(self, inputs: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.float32]]:
        loaded = self._held(self._loaded)
        return loaded.run(inputs, loaded.outputs)


def usable_engine(bundle: Bundle, precision: str | None = None, role: Role = "guard") -> GuardFile:
    """Return the bundle's first engine of a role that runs here.

    One that was never run here is tried, which takes as long as the images that it is compared on. Raises
    MissingExtraError without the libraries, InputError without a GPU, BundleError when the bundle has no engine or
    none that runs here, with the reason of each and the command that builds one.
    """
    bundle.file(precision, kind="engine")
    there = [file for file in bundle.files("engine", role) if precision in (None, file.precision)]
    reasons: list[str] = []
    missing: list[InputError] = []
    for file in there:
        try:
            reason = misplaced(file)
        except InputError as error:
            missing.append(error)
            reason = str(error).rstrip(".")
        told = f"{file.path}: {reason}" if reason is not None else _refusal(bundle, file)
        if told is None:
            return file
        reasons.append(told)
    if missing and len(missing) == len(there) and len(set(map(str, missing))) == 1:
        raise missing[0]
    told = "; ".join(reasons) or f"it has no {role} engine"
    raise EngineRefusedError(f"no engine of {bundle.folder} runs here ({told})", advice(bundle))


def misplaced(file: GuardFile) -> str | None:
    """Return why an engine was not built for this device, None when it was.

    Raises MissingExtraError without its library, InputError without a GPU.
    """
    assert file.engine is not None  # it is an engine's entry
    library = find_library(file.engine.module)
    return engine_mismatch(file.engine, library.version, library.gpu)


def _refusal(bundle: Bundle, file: GuardFile) -> str | None:
    """Return why an engine that must be proven is refused here, None where it is not; one without a proof is tried."""
    assert file.engine is not None
    library = find_library(file.engine.module)
    if not needs_proof(file.engine, library) or is_proven(library, bundle, file):
        return None
    try:
        with TensorRTRunner(bundle, file):
            return None
    except EngineRefusedError as error:
        return error.reason
    except SafeVLMError as error:
        return f"{file.path}: it could not be tried ({str(error).rstrip('.')})"
