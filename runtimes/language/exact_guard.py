"""A guard behind the language model that judges images by themselves: a prefill of each, and no answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from runtimes.guard.runner import GuardOutput, GuardRunner
from runtimes.language.torch_language import TorchLanguageRunner
from safevlm.contract.preprocessing import Preprocessing

__all__ = ["ExactGuardRunner"]


class ExactGuardRunner(GuardRunner):
    """Judge with the exact verdict of a language runner, which takes turns between this and its answers.

    For whoever needs a verdict before there is a question: the gateway. It costs a prefill of the image.
    """

    runtime = "torch"

    def __init__(self, language: TorchLanguageRunner, preprocessing: Preprocessing, classes: Sequence[str]) -> None:
        super().__init__()
        self.language = language
        self.preprocessing = preprocessing
        self.class_count = len(classes)

    def _activate(self) -> None:
        self.language.activate()

    def _deactivate(self) -> None:
        self.language.deactivate()

    def _run(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        return self.language.judge(rgb)
