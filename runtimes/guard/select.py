"""Choose the runner of a bundle by the runtime's name."""

from __future__ import annotations

import logging
from typing import Literal, get_args

from runtimes.guard.bundle import Bundle
from runtimes.guard.runner import GuardRunner
from safevlm.errors import BundleError, InputError

__all__ = ["RUNTIMES", "Runtime", "select_runner"]

Runtime = Literal["auto", "onnxruntime", "openvino", "tensorrt", "torch"]
RUNTIMES: tuple[str, ...] = get_args(Runtime)

_log = logging.getLogger(__name__)


def select_runner(
    bundle: Bundle,
    runtime: Runtime | str = "auto",
    *,
    precision: str | None = None,
    threads: int | None = None,
) -> GuardRunner:
    """Return a runner, not yet activated.

    ``auto`` is TensorRT where the bundle has an engine that runs on this machine, else ONNX Runtime.
    ``torch`` opens the checkpoint that the bundle names and runs its untouched path; it has no precisions.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, not {threads}")
    if not bundle.manifest.source.standalone:
        raise BundleError(
            f"{bundle.folder} holds the exact parts of a guard that reads the language model (standalone: false): it "
            "cannot judge a picture by itself, only around a prefill (python -m runtimes.gate). For one that can: "
            f"python -m export.onnx {bundle.manifest.source.model_option} --out {bundle.folder} --images DIR"
        )
    if runtime == "auto":
        return _auto(bundle, precision, threads)
    if runtime == "onnxruntime":
        return _onnxruntime(bundle, precision, threads)
    if runtime == "openvino":
        from runtimes.guard.openvino_runner import OpenVinoRunner

        return OpenVinoRunner(bundle, None if precision is None else bundle.file(precision), threads)
    if runtime == "tensorrt":
        from runtimes.guard.tensorrt_runner import TensorRTRunner, usable_engine

        return TensorRTRunner(bundle, usable_engine(bundle, precision))
    if runtime == "torch":
        return _torch(bundle, precision, threads)
    raise InputError(f"unknown runtime {runtime!r}; allowed: {', '.join(RUNTIMES)}")


def _auto(bundle: Bundle, precision: str | None, threads: int | None) -> GuardRunner:
    engines = bundle.files("engine")
    if any(precision in (None, file.precision) for file in engines):
        from runtimes.guard.tensorrt_runner import TensorRTRunner, usable_engine

        try:
            return TensorRTRunner(bundle, usable_engine(bundle, precision))
        except InputError as error:
            _log.info("TensorRT is passed over: %s", error)
    return _onnxruntime(bundle, precision, threads)


def _onnxruntime(bundle: Bundle, precision: str | None, threads: int | None) -> GuardRunner:
    from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner

    return OnnxRuntimeRunner(bundle, bundle.file(precision), threads)


def _torch(bundle: Bundle, precision: str | None, threads: int | None) -> GuardRunner:
    if precision is not None:
        raise InputError("runtime torch judges with the checkpoint itself, in float32: leave --precision out")
    if bundle.manifest.head.kind == "distilled":
        raise InputError(
            f"{bundle.folder} holds a distilled head, and runtime torch judges with the checkpoint's own guard, which "
            "reads the language model: use --runtime onnxruntime, or python -m runtimes.gate for the exact verdict"
        )
    from runtimes.guard.torch_runner import TorchRunner, open_source

    size = bundle.manifest.preprocessing
    return TorchRunner(open_source(bundle), grid=(size.height, size.width), threads=threads)
