"""What ``runtimes.check --verify`` says of a bundle's engines: each compared anew with its ONNX file, here and now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from runtimes.guard.bundle import Bundle
from runtimes.guard.engines.proof import Proof
from runtimes.guard.tensorrt_runner import TensorRTRunner, misplaced
from safevlm.contract.manifest import GuardFile
from safevlm.errors import InputError, SafeVLMError

__all__ = ["Verified", "verify_engines"]


@dataclass(frozen=True)
class Verified:
    """An engine, what came of it, and the figures of the comparison or why there are none."""

    file: str
    outcome: Literal["verified", "refused", "skipped"]
    """``skipped`` is an engine that was built for something else than this device."""
    proof: Proof | None = None
    reason: str | None = None

    @property
    def told(self) -> str:
        """One line."""
        if self.proof is None:
            return f"{self.outcome:<8} {self.reason}"
        where = self.proof.compared
        return f"{self.outcome:<8} {self.file}: {self.proof.figures} ({where.gpu_name}, {where.module} {where.version})"

    def to_json(self) -> dict[str, object]:
        """Return the object that ``runtimes.check --verify --json`` prints."""
        stated: dict[str, object] = {"file": self.file, "outcome": self.outcome, "reason": self.reason}
        if self.proof is None:
            return stated
        parity, where = self.proof.parity, self.proof.compared
        return stated | {
            "gpu": where.gpu_name,
            "driver": where.driver,
            "module": where.module,
            "version": where.version,
            **parity.model_dump(),
        }


def verify_engines(bundle: Bundle, precision: str | None = None) -> Iterator[Verified]:
    """Compare every engine of a bundle, of one precision if it is given, with its ONNX file, and keep the proof.

    Raises BundleError when there is none.
    """
    bundle.file(precision, kind="engine")
    for file in bundle.files("engine"):
        if precision in (None, file.precision):
            yield _verify(bundle, file)


def _verify(bundle: Bundle, file: GuardFile) -> Verified:
    try:
        other = misplaced(file)
    except InputError as error:
        other = str(error)
    if other is not None:
        return Verified(file.path, "skipped", reason=f"{file.path}: {other}")
    try:
        with TensorRTRunner(bundle, file, verify=True) as runner:
            return Verified(file.path, "verified", runner.proof)
    except SafeVLMError as error:
        return Verified(file.path, "refused", reason=getattr(error, "reason", f"{file.path}: {error}"))
