"""A guard without a model: for tests of whatever stands behind a guard."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from runtimes.guard.runner import GuardOutput, GuardRunner
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import SafeVLMError

__all__ = ["FakeRunner"]

SEED = 20


class FakeRunner(GuardRunner):
    """Answer without looking: the given ``probs``, or a fixed function of each picture's mean colour.

    ``probs`` is one row for every picture, or a row for each (the n-th picture since activation gets the
    n-th row, and the rows start over). ``failure`` is raised instead of an answer; ``not_a_number`` spoils
    every answer, which :meth:`infer` then refuses as it would a broken engine's.
    """

    runtime = "fake"

    def __init__(
        self,
        preprocessing: Preprocessing,
        class_count: int,
        *,
        probs: npt.ArrayLike | None = None,
        failure: Exception | None = None,
        not_a_number: bool = False,
    ) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.class_count = class_count
        self.failure = failure
        self.not_a_number = not_a_number
        self._judged = [0]
        self._rows = None if probs is None else np.atleast_2d(np.asarray(probs, np.float32))
        self._weights = np.random.default_rng(SEED).normal(size=(3, class_count)).astype(np.float32)

    @property
    def judged(self) -> int:
        """Images answered since the runner was activated."""
        return self._judged[0]

    def _activate(self) -> None:
        self._judged = [0]  # another list: a call of the activation before may still count in its own

    def _run(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        if self.failure is not None:
            raise self.failure
        judged = self._held(self._judged)
        logits = self._logits(rgb, judged[0])
        judged[0] += len(rgb)
        if self.not_a_number:
            logits = np.full_like(logits, np.nan)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return GuardOutput(probs=powers / powers.sum(axis=1, keepdims=True), logits=logits)

    def _logits(self, rgb: npt.NDArray[np.uint8], judged: int) -> npt.NDArray[np.float32]:
        """Return N x C logits; those of given rows are their logarithms."""
        if self._rows is None:
            colour = rgb.mean(axis=(1, 2), dtype=np.float64).astype(np.float32) / 255
            return np.asarray(4 * colour @ self._weights, np.float32)
        rows = self._rows[(judged + np.arange(len(rgb))) % len(self._rows)]
        if rows.shape[1] != self.class_count:
            raise SafeVLMError(f"the fake's rows have {rows.shape[1]} values for {self.class_count} classes")
        return np.asarray(np.log(np.maximum(rows, np.float32(1e-30))), np.float32)
