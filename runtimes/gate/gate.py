"""The gate: an image passes the guard before a language model answers about it.

::

    image ─► standalone guard ─┬─ block ──────────────────────────────► refused, the language model never ran
                               ├─ unsure ─► prefill ─► exact verdict ─┬─ block ─► refused before a token
                               └─ allow ──► prefill ─► exact verdict ─┴─ allow ─► answer from that prefill

The exact verdict falls out of the prefill that the answer needs, so it costs no pass of its own (but where a system
text or earlier turns stand before the image, see ``runtimes.language.language``: text cannot change it); the policy's
``confirm`` says whether it may still block what the guard allowed. Without a standalone guard (a bundle that says
``standalone: false``) every image is judged by the exact verdict.

The gate fails closed. Whatever a guard or language runner raises, a deadline that passes, an answer that is no row of
probabilities, an image that cannot be read: the verdict is block, the stage ``error``, and the reason in the result.
What the guard judged is what the language model is shown: one decode, flattened to upright RGB, never the file. Where
other readers show the file in another way (see ``safevlm.images.views``), that is judged, too, and may block. A large
image is judged in tiles, too, as the guard's ``view`` says (see ``runtimes.images.tiling``), and shown no larger than
these resolve; a tile that the guard is unsure of needs an exact verdict of its own. Without a standalone guard the
language model is shown the very pixels of its exact verdict, so that there is nothing to see in tiles.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from runtimes.gate.parts import GateParts
from runtimes.gate.request import GateRequest
from runtimes.gate.result import GateResult
from runtimes.images.views import ImageSource
from runtimes.language.writing import Decoding, Writing
from safevlm.errors import InputError, QuestionError
from safevlm.network.dialogue import Question

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Gate", "GateResult"]

MAX_NEW_TOKENS = 256

_log = logging.getLogger(__name__)


class Gate(GateParts):
    """A guard, a language model, or both, behind one question; a context manager around them.

    >>> with Gate(Guard.open("build/guard"), TorchLanguageRunner(open_checkpoint("tiny-safellava"))) as gate:
    ...     gate.ask("holiday.jpg", "What is this?").answer

    ``timeout`` bounds, in seconds each, judging with the standalone guard and the prefill with its exact verdict,
    waiting for other requests included; ``generation_timeout`` bounds the answer. ``digest`` is the bundle's, by
    default that of the guard's own. ``share_embeddings`` lets a guard that gives image embeddings spare the language
    model its vision tower: right only where both are of one checkpoint.

    Raises InputError when there is nothing to judge with, a time is not above 0, or the policy names a class that
    the guard does not know; on entering, too, when guard and language model have different classes.
    """

    def __enter__(self) -> Self:
        with ExitStack() as held:
            for part in (self.guard, self.language):
                if part is not None:
                    held.enter_context(part)
            self._check_classes()
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lane in (self.guard_lane, self.language_lane):
            lane.close()
        self._held.close()

    @property
    def stuck(self) -> int:
        """How many calls of guard and language model overran their time and are still running."""
        return self.guard_lane.stuck + self.language_lane.stuck

    def ask(
        self,
        image: ImageSource,
        question: Question,
        *,
        max_new_tokens: int | None = None,
        decoding: Decoding | None = None,
        gone: Callable[[], bool] = lambda: False,
        on_text: Callable[[str], None] | None = None,
        probs: npt.NDArray[np.float32] | None = None,
    ) -> GateResult:
        """Judge an image and, if it passes, answer the question about it, or the last turn of a dialogue.

        ``probs`` are what the standalone guard said of this very picture before. ``on_text`` is told the pieces of the
        answer as they are written, from another thread, and nothing of an image that is blocked; what it raises ends
        the answer as an error; so does ``gone``, asked before every token. ``max_new_tokens`` is 256 by default, fewer
        where the context ends. Never raises on account of image, guard or language model: see the module's text.

        Raises QuestionError, before anything is judged, for a question that the language model cannot be asked.
        """
        request = GateRequest(self, image, question, max_new_tokens or MAX_NEW_TOKENS, on_text, probs)
        request.writing = Writing(decoding or Decoding(), request.check)
        request.gone = gone
        begun = time.perf_counter()
        try:
            if self.language is not None:
                self.language.check_question(question, max_new_tokens)
            result = request.decide()
        except QuestionError:
            raise
        except Exception as error:  # of any kind, a bug of the gate's own included: it fails closed
            result = request.failed(error)
        finally:
            request.over = True
        return replace(result, ms={**request.ms, "total": (time.perf_counter() - begun) * 1000})

    def _check_classes(self) -> None:
        if self.language is None:
            return
        exact = self.language.classes
        if self.guard is None and exact is None:
            raise InputError(
                f"runtime {self.language.runtime} cannot read the exact verdict, and no standalone guard is given, so "
                "nothing would be judged. Give a bundle with a standalone guard."
            )
        if exact is None:
            return
        if self.guard is not None and self.guard.classes != exact:
            differ = sorted(set(self.guard.classes) ^ set(exact)) or ["their order"]
            raise InputError(
                f"guard and language model have different classes ({', '.join(differ[:6])}): they belong to "
                "different checkpoints. Give the checkpoint that the bundle was exported from."
            )
        self.policy.check(exact)
