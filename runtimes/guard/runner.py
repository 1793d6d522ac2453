"""The contract of every runner: N pictures in, their class probabilities out, checked on both sides.

Name law: runtime ``onnxruntime`` is class ``OnnxRuntimeRunner`` in ``runtimes/guard/onnxruntime_runner.py``.
Shapes: N pictures, H x W pixels, C classes.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from runtimes.guard.activation import Activated
from safevlm.contract.graph_fit import Role
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import InputError, SafeVLMError
from safevlm.machine import memory_advice
from safevlm.terminal.printable import shortened

__all__ = ["FileRunner", "GuardOutput", "GuardRunner"]

T = TypeVar("T")

SUM_TOLERANCE = 1e-2
"""A float16 softmax over 20 classes sums to 1 within a few thousandths."""


@dataclass(frozen=True)
class GuardOutput:
    """Probabilities and logits, each float32, N x C; image embeddings N x T x D where they were asked for."""

    probs: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]
    embeddings: npt.NDArray[np.float32] | None = None


class GuardRunner(Activated):
    """One guard on one runtime; a context manager that holds the runtime's resources while it is entered.

    A subclass fills in :meth:`_activate`, :meth:`_run` and, where it holds something, :meth:`_deactivate`,
    and sets :attr:`preprocessing` at the latest when it is activated. What :meth:`_run` returns is the caller's own:
    never memory that the runtime uses again.
    """

    runtime: ClassVar[str]
    preprocessing: Preprocessing
    class_count: int | None = None
    """C, where it is known before the first answer."""
    failures: tuple[type[Exception], ...] = (MemoryError,)
    """What the runtime raises when it fails on an image; complete from activation on."""
    gives_embeddings = False
    """Whether :meth:`infer` can return image embeddings, for a language model that shares the vision tower."""
    gpu: str | None = None
    """Name of the GPU that the runtime computes on, where it is known; set by activation."""

    @property
    def provider(self) -> str:
        """What the runtime computes with, as records and thresholds state it; known from activation on."""
        return self.runtime

    def infer(self, rgb: npt.NDArray[np.uint8], *, embeddings: bool = False) -> GuardOutput:
        """Judge N x H x W x 3 grey levels (uint8, at the contract's size); ``embeddings`` asks for those, too.

        Raises InputError for another type or shape or for embeddings that this runner does not give, BusyError
        while an earlier call runs (:attr:`exclusive`), SafeVLMError when the runtime fails and for an answer that is
        not N rows of finite probabilities that sum to 1.
        """
        self._check_active()
        self._check_input(rgb)
        if embeddings and not self.gives_embeddings:
            raise InputError(
                f"this guard on {self.runtime} gives no image embeddings: export it with --embeddings, and run it on "
                "ONNX Runtime or on a TensorRT engine built of that export"
            )
        rgb = np.ascontiguousarray(rgb)
        output = self._protected(lambda: self._run_sharing(rgb) if embeddings else self._run(rgb))
        self._check_output(output, len(rgb))
        return output

    def _protected(self, run: Callable[[], T]) -> T:
        """Run one call on what is held; what the runtime raises becomes SafeVLMError."""
        with self._call():
            try:
                with memory_advice("Judge fewer images at once, or free memory.", SafeVLMError):
                    return run()
            except SafeVLMError:
                raise
            except self.failures as error:
                reason = shortened(str(error).strip().partition("\n")[0], 300) or type(error).__name__
                raise SafeVLMError(
                    f"{self.runtime} could not run the guard: {reason}. Free memory, or export the guard again."
                ) from error

    @abc.abstractmethod
    def _run(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput: ...

    def _run_sharing(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        """Run with image embeddings; only called where :attr:`gives_embeddings`."""
        raise NotImplementedError

    def _check_input(self, rgb: npt.NDArray[np.uint8]) -> None:
        wanted = (self.preprocessing.height, self.preprocessing.width, 3)
        if rgb.dtype != np.uint8 or rgb.ndim != 4 or rgb.shape[1:] != wanted or len(rgb) == 0:
            raise InputError(
                f"a guard takes uint8 of shape N x {wanted[0]} x {wanted[1]} x 3 with N of at least 1, not "
                f"{rgb.dtype} of shape {' x '.join(map(str, rgb.shape))}: use Preprocessing.apply"
            )

    def _check_output(self, output: GuardOutput, count: int) -> None:
        classes = self.class_count or output.probs.shape[-1]
        for name, values in (("probs", output.probs), ("logits", output.logits)):
            if values.shape != (count, classes) or values.dtype != np.float32:
                raise SafeVLMError(
                    f"{self.runtime} returned {name} of {values.dtype} {values.shape}, not float32 "
                    f"{(count, classes)}: the guard's file does not fit its manifest; export it again"
                )
            if not np.isfinite(values).all():
                raise SafeVLMError(
                    f"{self.runtime} returned {name} that are not finite numbers for "
                    f"{int((~np.isfinite(values).all(axis=1)).sum())} of {count} images: no verdict can be "
                    "given; try the fp32 file of the bundle"
                )
        if output.embeddings is not None and not np.isfinite(output.embeddings).all():
            raise SafeVLMError(f"{self.runtime} returned image embeddings that are not finite numbers")
        sums = output.probs.sum(axis=1)
        if (np.abs(sums - 1) > SUM_TOLERANCE).any() or (output.probs < 0).any():
            raise SafeVLMError(
                f"{self.runtime} returned rows that are not probabilities (sums {sums.min():.4g} to "
                f"{sums.max():.4g}, minimum {output.probs.min():.4g}). Export the guard again"
            )


class FileRunner(GuardRunner):
    """A guard runner that can also run a file as it stands, one that is a part of a guard (:attr:`role`) included."""

    role: Role = "guard"

    def run_file(self, inputs: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.float32]]:
        """Return all outputs by name: of N images as :meth:`infer` takes them, of hidden states N x T x D by a head.

        Raises those of :meth:`infer`; SafeVLMError for outputs that are not N rows of finite float32.
        """
        self._check_active()
        if self.role != "head":
            self._check_input(inputs)
        elif inputs.dtype != np.float32 or inputs.ndim != 3 or len(inputs) == 0 or not np.isfinite(inputs).all():
            raise InputError(
                f"a guard's head takes finite hidden states, float32 N x T x D, not {inputs.dtype} of shape "
                f"{' x '.join(map(str, inputs.shape))}"
            )
        contiguous = np.ascontiguousarray(inputs)
        found = self._protected(lambda: self._run_file(contiguous))
        for name, values in found.items():
            if values.dtype != np.float32 or len(values) != len(inputs) or not np.isfinite(values).all():
                raise SafeVLMError(
                    f"{self.runtime} returned {name} of {values.dtype} {values.shape} for {len(inputs)} inputs that "
                    "are not finite numbers in float32, one row per input: try the fp32 file of the bundle"
                )
        return found

    @abc.abstractmethod
    def _run_file(self, inputs: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.float32]]: ...
