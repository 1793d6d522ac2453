"""The exact parts of a guard behind the language model, run beside it: the vision path before, the head after.

A bundle that says ``standalone: false`` holds them as ONNX files and, where they were built, as engines. Without either
the checkpoint's own layers do the same on torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from runtimes.guard.bundle import Bundle
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.runner import FileRunner
from safevlm.contract.graph_fit import Role
from safevlm.errors import InputError

__all__ = ["ExactParts", "select_parts"]

WITHOUT = {"vision": "vision tower", "head": "guard head"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExactParts:
    """What runs in place of the checkpoint's own vision path and guard head; None leaves it to these."""

    vision: FileRunner | None = None
    head: FileRunner | None = None

    @property
    def runners(self) -> tuple[FileRunner, ...]:
        """Those there are."""
        return tuple(each for each in (self.vision, self.head) if each is not None)

    @property
    def runtimes(self) -> str:
        """What they run on, for records: ``tensorrt``; empty without any."""
        return ", ".join(dict.fromkeys(each.runtime for each in self.runners))

    @property
    def gpu(self) -> str | None:
        """Name of the GPU that they run on, where one does; known from activation on."""
        return next((each.gpu for each in self.runners if each.gpu is not None), None)

    def activate(self) -> None:
        """Load both; none is held when one cannot be."""
        with ExitStack() as taken:
            for runner in self.runners:
                taken.enter_context(runner)
            taken.pop_all()

    def deactivate(self) -> None:
        """Give both back, the second one whatever becomes of the first."""
        with ExitStack() as taken:
            for runner in self.runners:
                taken.callback(runner.deactivate)


def select_parts(
    bundle: Bundle, runtime: str = "auto", *, precision: str | None = None, threads: int | None = None
) -> ExactParts:
    """Return the runners of a bundle's parts, not yet activated; ``precision`` is the vision path's.

    ``auto`` takes engines that run on this machine and leaves the rest to the checkpoint's own layers, with a line that
    says why where there is an engine. ``torch`` leaves all to them. Raises InputError for a runtime that runs no parts;
    ``tensorrt`` and ``onnxruntime`` raise what is raised where a file is missing or does not run.
    """
    if runtime == "torch":
        return ExactParts()
    chosen: dict[Role, str | None] = {"vision": precision, "head": None}
    if runtime == "auto":
        return _engines_that_run(bundle, chosen)
    if runtime == "tensorrt":
        return ExactParts(**{role: _engine(bundle, role, wanted) for role, wanted in chosen.items()})
    if runtime == "onnxruntime":
        return ExactParts(**{role: _onnx(bundle, role, wanted, threads) for role, wanted in chosen.items()})
    raise InputError(
        f"runtime {runtime} runs only standalone guards, but {bundle.folder} holds a guard's exact parts (standalone: "
        "false). Use auto, tensorrt, onnxruntime or torch."
    )


def _engine(bundle: Bundle, role: Role, precision: str | None) -> FileRunner:
    from runtimes.guard.tensorrt_runner import TensorRTRunner, usable_engine

    return TensorRTRunner(bundle, usable_engine(bundle, precision, role))


def _engines_that_run(bundle: Bundle, chosen: Mapping[Role, str | None]) -> ExactParts:
    """Return the engines there are for this device, and say in one line why others that the bundle has are not used."""
    found: dict[str, FileRunner] = {}
    reasons: dict[str, list[str]] = {}
    for role, precision in chosen.items():
        if not any(precision in (None, file.precision) for file in bundle.files("engine", role)):
            continue
        try:
            found[role] = _engine(bundle, role, precision)
        except InputError as error:
            reasons.setdefault(getattr(error, "reason", str(error).rstrip(".")), []).append(WITHOUT[role])
    if reasons:
        told = "; ".join(f"{' and '.join(parts)} ({reason})" for reason, parts in reasons.items())
        _log.warning("torch runs the checkpoint's own %s.", told)
    return ExactParts(**found)


def _onnx(bundle: Bundle, role: Role, precision: str | None, threads: int | None) -> FileRunner:
    files = bundle.files("onnx", role)
    file = next((each for each in files if precision in (None, each.precision)), None)
    if file is None:
        there = ", ".join(each.precision for each in files) or "none"
        raise InputError(
            f"{bundle.folder} has no {role} file of precision {precision or 'any'}; it has: {there}. Choose one of "
            "these with --precision, or export the bundle again."
        )
    return OnnxRuntimeRunner(bundle, file, threads)
