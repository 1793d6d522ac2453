"""One question on its way through the gate: judged, settled by the exact verdict, answered, or failed closed."""

from __future__ import annotations

import datetime
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from runtimes.gate.judged_views import JudgedViews, judge_views
from runtimes.gate.lane import OverranError, WaitedError
from runtimes.gate.parts import GateParts
from runtimes.gate.result import GateResult
from runtimes.guard.verdict import Finding, Stage, decide, passes, stops_at_exact, stops_at_guard, worst
from runtimes.images.views import ImageSource
from runtimes.language.language import LanguageRunner
from runtimes.language.writing import Writing
from safevlm.errors import BusyError, ImageFileError, SafeVLMError
from safevlm.network.dialogue import Question, last_question

__all__ = ["GateRequest"]

Part = Literal["guard", "exact", "generate"]

_log = logging.getLogger(__name__)


class GateRequest:
    """One image and question on their way through the gate, and what is known of them so far."""

    def __init__(
        self,
        gate: GateParts,
        image: ImageSource,
        question: Question,
        max_new_tokens: int,
        on_text: Callable[[str], None] | None,
        known: npt.NDArray[np.float32] | None,
    ) -> None:
        self.gate = gate
        self.image = image
        self.asked = question
        self.question = last_question(question)
        self.max_new_tokens = max_new_tokens
        self.on_text = on_text
        self.known = known
        self.writing = Writing()
        self.gone: Callable[[], bool] = lambda: False
        self.prompt_tokens = 0
        self.part: Part = "guard"
        self.view: str | None = None
        """What was decided on, where readers show the image in several ways or it was judged in tiles."""
        self.hidden = False
        """Whether that is not what the language model is shown."""
        self.unsure_tiles: list[int] = []
        """Tiles of what it is shown that the standalone guard is unsure of."""
        self.over = False
        """Set when the request has its result: an answer that is still being written is for nobody."""
        self.ms: dict[str, float] = {}
        self.probs: dict[str, float] | None = None
        self.exact_probs: dict[str, float] | None = None
        self.created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")

    # -- the way ----------------------------------------------------------------------------------------

    def decide(self) -> GateResult:
        """Go through the stages; whatever is raised on the way is an error of ``part``."""
        gate = self.gate
        judged = self._judge()
        found = self._guard_finding(judged)
        if found is not None:
            stopped = stops_at_guard(found, gate.policy, settles=self._can_settle(), hidden=self._hidden_view())
            if stopped is not None:
                return self._blocked("guard", found, stopped)
        if gate.language is not None:
            return self._answer(gate.language, judged, found)
        assert found is not None  # a gate has a guard or a language model
        return self._allowed("guard", found, None)

    def check(self) -> None:
        """Raise when nobody waits for the answer any more."""
        if self.over or self.gone():
            raise OverranError("the answer was cut off: nobody waits for it")

    def _answer(self, language: LanguageRunner, judged: JudgedViews, found: Finding | None) -> GateResult:
        """Prefill once; judge that; go on generating from it."""
        lane, exact = self.gate.language_lane, None
        with ExitStack() as turn:
            with self._timed("exact"):
                left = turn.enter_context(lane.turn(self.gate.timeout))
                self.check()
                for at in range(1, len(judged.views.pixels)) if found is None else self._tiles_to_settle():
                    refusal = self._other_view(language, judged, at, left, found)
                    if refusal is not None:
                        return refusal
                if found is None or self._tiles_to_settle():
                    self._decided_on(judged, 0)
                prefilled = lane.run(lambda: language.prefill(*self._input(language, judged)), left).get()
                self.prompt_tokens = prefilled.tokens
                if prefilled.exact_probs is not None or found is None:
                    exact = self._exact_finding(language, prefilled.exact_probs)
            refusal = None if exact is None else self._refusal(found, exact, judged)
            if refusal is not None:
                return refusal
            with self._timed("generate"):
                seconds = self.gate.generation_timeout
                answer = lane.run(lambda: self._generate(language, prefilled.handle), seconds).get()
                if not isinstance(answer, str):
                    raise SafeVLMError(f"runtime {language.runtime} answered with {type(answer).__name__}, not text")
        if exact is not None and (found is None or found.verdict == "unsure"):
            return self._allowed("exact", exact, answer)
        assert found is not None  # without a guard there is an exact verdict, or an error
        return self._allowed("guard", found, answer)

    def _other_view(
        self, language: LanguageRunner, judged: JudgedViews, at: int, seconds: float, found: Finding | None
    ) -> GateResult | None:
        """Return the block that the exact verdict on a view or tile demands which is not to be answered about."""
        pixels = judged.views.pixels[at]
        prefilled = self.gate.language_lane.run(lambda: language.prefill(pixels, self.question, None), seconds).get()
        return self._refusal(found, self._exact_finding(language, prefilled.exact_probs), judged, at)

    def _generate(self, language: LanguageRunner, handle: Any) -> str:
        pieces = []
        with closing(language.stream(handle, self.max_new_tokens, self.writing)) as stream:
            for piece in stream:
                self.check()
                if self.on_text is not None:
                    self.on_text(piece)
                pieces.append(piece)
        return "".join(pieces)

    def _refusal(self, found: Finding | None, exact: Finding, judged: JudgedViews, at: int = 0) -> GateResult | None:
        """Return the block that the exact verdict on a view demands, or None."""
        hidden = judged.views.name(at) if judged.views.is_hidden(at) else None
        stopped = stops_at_exact(exact, self.gate.policy, before=found, hidden=hidden)
        if stopped is None:
            return None
        self._decided_on(judged, at)
        return self._blocked("exact", exact, stopped, review=found is not None and found.review)

    def _hidden_view(self) -> str | None:
        return self.view if self.hidden else None

    # -- its parts --------------------------------------------------------------------------------------

    def _judge(self) -> JudgedViews:
        lane = self.gate.guard_lane
        size = None if self.gate.language is None else self.gate.language.preprocessing
        with self._timed("guard"), lane.turn(self.gate.timeout) as left:
            judged = lane.run(
                lambda: judge_views(self.image, self.gate.guard, size, share=self._share(), known=self.known), left
            ).get()
        self.ms = dict(judged.ms)
        return judged

    def _share(self) -> bool:
        """Whether the language model can take image embeddings from the guard."""
        return self.gate.share_embeddings and self.gate.language is not None and self.gate.language.takes_embeddings

    def _input(
        self, language: LanguageRunner, judged: JudgedViews
    ) -> tuple[npt.NDArray[np.uint8], Question, npt.NDArray[np.float32] | None]:
        """Return the picture at the language model's size, which is the guard's very pixels where sizes agree."""
        size, guard = language.preprocessing, self.gate.guard
        if size is None:
            return np.array(judged.views.image, dtype=np.uint8), self.asked, None
        if guard is not None and guard.runner.preprocessing != size:
            return size.apply(judged.views.image), self.asked, None
        return judged.views.pixels[0], self.asked, judged.embeddings

    def _can_settle(self) -> bool:
        """Say whether there is an exact verdict on all of the usual view that the guard is unsure of.

        One on a tile can be had where guard and language model read the same pixels.
        """
        guard, language = self.gate.guard, self.gate.language
        if language is None or language.classes is None:
            return False
        return not self.unsure_tiles or (guard is not None and guard.runner.preprocessing == language.preprocessing)

    def _tiles_to_settle(self) -> list[int]:
        return self.unsure_tiles if self._can_settle() else []

    def _guard_finding(self, judged: JudgedViews) -> Finding | None:
        guard = self.gate.guard
        if guard is None:
            return None
        findings = [decide(row, guard.classes, guard.thresholds, policy=self.gate.policy) for row in judged.probs]
        at = worst(findings, judged.views.own)
        self.unsure_tiles = [tile for tile in range(1, judged.views.own) if findings[tile].verdict == "unsure"]
        self._decided_on(judged, at)
        self.probs = dict(zip(guard.classes, map(float, judged.probs[at]), strict=True))
        return findings[at]

    def _decided_on(self, judged: JudgedViews, at: int) -> None:
        self.view, self.hidden = judged.views.name(at), judged.views.is_hidden(at)

    def _exact_finding(self, language: LanguageRunner, probs: npt.NDArray[np.float32] | None) -> Finding:
        if probs is None or language.classes is None:
            raise SafeVLMError(f"runtime {language.runtime} gave no exact verdict, and no other verdict is available")
        found = decide(probs, language.classes, policy=self.gate.policy, stage="exact")
        self.exact_probs = dict(zip(language.classes, map(float, probs), strict=True))
        return found

    @contextmanager
    def _timed(self, part: Part) -> Iterator[None]:
        """Note the milliseconds of a part, and that errors from here on are its."""
        self.part, begun = part, time.perf_counter()
        try:
            yield
        finally:
            self.ms[part] = (time.perf_counter() - begun) * 1000

    # -- the result -------------------------------------------------------------------------------------

    def failed(self, cause: Exception) -> GateResult:
        """Return the block that an error is."""
        where = {"guard": "the guard", "exact": "the prefill", "generate": "the generation"}[self.part]
        reason = f"{where} failed ({type(cause).__name__})"
        busy = isinstance(cause, (BusyError, WaitedError))
        if isinstance(cause, WaitedError):
            reason = f"{'the guard' if self.part == 'guard' else 'the language model'} was busy with other images"
        elif isinstance(cause, OverranError):
            reason = f"{where} did not finish in time"
        elif isinstance(cause, BusyError):
            reason = f"{'the guard' if self.part == 'guard' else 'the language model'} is busy with an earlier image"
        elif isinstance(cause, ImageFileError):
            reason = "the image cannot be read"
        if isinstance(cause, SafeVLMError):
            _log.info("blocked: %s", reason)
        else:  # a bug: where it was raised, without the message, which may quote the question
            _log.error("blocked: %s\n%s", reason, "".join(traceback.format_tb(cause.__traceback__)))
        error = f"{type(cause).__name__}: {cause}"
        return self._result("block", "error", reason, error=error, error_in=self.part, busy=busy)

    def _blocked(self, stage: Stage, finding: Finding, reason: str, *, review: bool = False) -> GateResult:
        return self._result("block", stage, reason, finding=finding, review=review or finding.review)

    def _allowed(self, stage: Stage, finding: Finding, answer: str | None) -> GateResult:
        reason = passes(finding, stage)
        return self._result("allow", stage, reason, finding=finding, answer=answer, **self._usage(answer))

    def _usage(self, answer: str | None) -> dict[str, Any]:
        if answer is None:
            return {}
        written = self.writing
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written.tokens,
            "finish_reason": written.finish_reason,
        }

    def _result(
        self, verdict: Literal["allow", "block"], stage: Literal["guard", "exact", "error"], reason: str, **more: Any
    ) -> GateResult:
        return GateResult(
            verdict=verdict,
            stage=stage,
            reason=reason,
            created=self.created,
            image=os.fspath(self.image) if isinstance(self.image, (str, os.PathLike)) else None,
            question=self.question,
            probs=self.probs,
            exact_probs=self.exact_probs,
            policy=self.gate.policy,
            bundle=self.gate.digest,
            view=self.view,
            view_mode=None if self.gate.guard is None else self.gate.guard.view,
            **more,
        )
