"""A runtime that is not one of ours, onnx's evaluator in plain Python, as CONTRIBUTING says to add one.

In the tree the class is ``ReferenceRunner`` in ``runtimes/guard/reference_runner.py``, and its entries stand in
``runtimes/guard/select.py``. Run as a script, this is ``python -m runtimes.check`` with the entries made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx.reference import ReferenceEvaluator

from runtimes.guard.bundle import Bundle
from runtimes.guard.runner import GuardOutput, GuardRunner
from runtimes.guard.select import ONNX_RUNTIMES, RUNTIMES, on_file
from safevlm.contract.manifest import GuardFile


class ReferenceRunner(GuardRunner):
    """Run an ONNX file of a bundle: the default one, or ``file``."""

    runtime = "reference"

    def __init__(self, bundle: Bundle, file: GuardFile | None = None, threads: int | None = None) -> None:
        super().__init__()
        self.bundle, self.file, self.threads = bundle, file or bundle.file(), threads
        self.preprocessing = bundle.manifest.preprocessing
        self.class_count = len(bundle.manifest.classes)
        self._session: Any = None

    def _activate(self) -> None:
        self._session = ReferenceEvaluator(str(self.bundle.path(self.file)))

    def _run(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        probs, logits = self._held(self._session).run(["probs", "logits"], {"rgb": rgb})
        return GuardOutput(probs=probs, logits=logits)

    def _deactivate(self) -> None:
        self._session = None


def enter() -> None:
    """Make the entries of ``runtimes/guard/select.py``."""
    ONNX_RUNTIMES["reference"] = ReferenceRunner
    RUNTIMES["reference"] = on_file(ReferenceRunner)


if __name__ == "__main__":
    enter()
    from runtimes.check import main
    from safevlm.terminal.commandline import run

    run(main)
