"""The runtimes of a guard by name, and the runner of a bundle on one of them.

A new runtime costs its runner and an entry here: in ``RUNTIMES``, and in ``ONNX_RUNTIMES`` where it runs ONNX files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from safevlm.errors import BundleError, InputError

if TYPE_CHECKING:
    from runtimes.guard.bundle import Bundle
    from runtimes.guard.runner import GuardRunner
    from safevlm.contract.manifest import GuardFile

__all__ = ["ONNX_RUNTIMES", "RUNTIMES", "on_file", "select_runner"]

Choose: TypeAlias = "Callable[[Bundle, str | None, int | None], GuardRunner]"
"""Takes a bundle, the wanted precision and the number of threads."""
OpenFile: TypeAlias = "Callable[[Bundle, GuardFile | None, int | None], GuardRunner]"
"""Takes a bundle, one of its ONNX files (None: the runtime's choice) and the number of threads."""

_log = logging.getLogger(__name__)


def select_runner(
    bundle: Bundle,
    runtime: str = "auto",
    *,
    precision: str | None = None,
    threads: int | None = None,
) -> GuardRunner:
    """Return a runner, not yet activated.

    ``auto`` is TensorRT where the bundle has an engine that runs on this machine, otherwise ONNX Runtime.
    ``torch`` opens the checkpoint that the bundle names and runs its untouched path; it has no precisions.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, not {threads}")
    if not bundle.manifest.source.standalone:
        raise BundleError(
            f"the guard of {bundle.folder} is not standalone (standalone: false), so it cannot judge images without "
            "the language model. Use python -m runtimes.gate, or export a standalone guard: "
            f"python -m export.onnx {bundle.manifest.source.model_option} --out {bundle.folder} --images DIR"
        )
    if runtime not in RUNTIMES:
        raise InputError(f"unknown runtime {runtime!r}; allowed: {', '.join(RUNTIMES)}")
    return RUNTIMES[runtime](bundle, precision, threads)


def _auto(bundle: Bundle, precision: str | None, threads: int | None) -> GuardRunner:
    engines = bundle.files("engine", "guard")
    if any(precision in (None, file.precision) for file in engines):
        try:
            return _tensorrt(bundle, precision, threads)
        except InputError as error:
            reason = getattr(error, "reason", str(error).rstrip("."))
            _log.warning("ONNX Runtime judges: %s.", reason)
    return RUNTIMES["onnxruntime"](bundle, precision, threads)


def _tensorrt(bundle: Bundle, precision: str | None, _: int | None) -> GuardRunner:
    from runtimes.guard.tensorrt_runner import TensorRTRunner, usable_engine

    return TensorRTRunner(bundle, usable_engine(bundle, precision))


def _torch(bundle: Bundle, precision: str | None, threads: int | None) -> GuardRunner:
    if precision is not None:
        raise InputError("runtime torch judges with the checkpoint itself, in float32: leave --precision out")
    if bundle.manifest.head.kind == "distilled":
        raise InputError(
            f"{bundle.folder} holds a distilled head, but runtime torch uses the checkpoint's own guard, which needs "
            "the language model. Use --runtime onnxruntime, or python -m runtimes.gate for the exact verdict"
        )
    from runtimes.guard.torch_runner import TorchRunner, open_source

    size = bundle.manifest.preprocessing
    return TorchRunner(open_source(bundle), grid=(size.height, size.width), threads=threads)


def _onnxruntime(bundle: Bundle, file: GuardFile | None, threads: int | None) -> GuardRunner:
    from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner

    return OnnxRuntimeRunner(bundle, file, threads)


def _openvino(bundle: Bundle, file: GuardFile | None, threads: int | None) -> GuardRunner:
    from runtimes.guard.openvino_runner import OpenVinoRunner

    return OpenVinoRunner(bundle, file, threads)


def on_file(open_file: OpenFile) -> Choose:
    """Return the choice of a runtime that runs the bundle's ONNX file of the wanted precision."""
    return lambda bundle, precision, threads: open_file(
        bundle, None if precision is None else bundle.file(precision), threads
    )


ONNX_RUNTIMES: dict[str, OpenFile] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
RUNTIMES: dict[str, Choose] = {
    "auto": _auto,
    "onnxruntime": on_file(_onnxruntime),
    "openvino": on_file(_openvino),
    "tensorrt": _tensorrt,
    "torch": _torch,
}
