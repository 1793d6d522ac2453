"""A language model in the gateway's own process: any of our runners, behind the gate with its exact verdict."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from runtimes.gate.gate import Gate
from runtimes.gate.result import GateResult
from runtimes.gateway.chat.asked import Asked
from runtimes.gateway.images.judging import Judged
from runtimes.gateway.refusal import overloaded
from runtimes.gateway.serving.metrics import Metrics
from safevlm.errors import QuestionError

__all__ = ["Embedded", "AnswerPart"]

WAITING = 32
"""Requests that may wait for the language model, which answers one at a time."""
ENDING_SECONDS = 5.0
"""What a call gets to notice that nobody waits for it any more."""


class _Gone(Exception):  # noqa: N818  # control flow: nobody reads the answer any more
    """The client has left."""


@dataclass(frozen=True)
class AnswerPart:
    """A piece of an answer as it comes, or, last, what was decided and answered."""

    piece: str | None = None
    result: GateResult | None = None


class Embedded:
    """A gate whose language model answers here; an asynchronous context manager, the gate is entered already."""

    def __init__(self, gate: Gate, name: str, metrics: Metrics) -> None:
        assert gate.language is not None
        self.gate, self.name, self.metrics = gate, name, metrics
        self.settles = gate.language.classes is not None
        """Whether an exact verdict settles what the standalone guard is unsure of."""
        self._threads = ThreadPoolExecutor(WAITING, "gateway language model")
        self._asking: set[concurrent.futures.Future[None]] = set()

    async def __aenter__(self) -> Embedded:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let the waiting threads end, and the call that runs, if it does so soon."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(concurrent.futures.wait, self._asking, ENDING_SECONDS)

    async def check(self, asked: Asked) -> None:
        """Raise Refusal, 400, for a question that the model cannot be asked; nothing is read or judged for that."""
        language = self.gate.language
        assert language is not None
        try:
            await asyncio.to_thread(language.check_question, asked.turns, asked.max_new_tokens)
        except QuestionError as error:
            raise asked.refusal(error) from None

    async def answer(self, judged: Judged, asked: Asked) -> AsyncGenerator[AnswerPart, None]:
        """Yield the answer's pieces and the result; closed early, the answer is no longer written.

        Raises Refusal, 503, when too many wait for the model.
        """
        if len(self._asking) >= WAITING:
            raise overloaded(f"{WAITING} requests are waiting for the language model. Try again in a second.")
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[AnswerPart] = asyncio.Queue()
        gone = False

        def on_text(piece: str) -> None:
            if gone:
                raise _Gone
            loop.call_soon_threadsafe(told.put_nowait, AnswerPart(piece=piece))

        def ask() -> None:
            if gone:
                return
            result = self.gate.ask(
                judged.picture,
                asked.turns,
                max_new_tokens=asked.max_new_tokens,
                decoding=asked.decoding,
                gone=lambda: gone,
                on_text=on_text,
                probs=judged.probs,
            )
            if not gone:
                loop.call_soon_threadsafe(told.put_nowait, AnswerPart(result=result))

        running = self._threads.submit(ask)
        self._asking.add(running)
        running.add_done_callback(self._asking.discard)
        try:
            while True:
                found = await told.get()
                if found.result is not None and found.result.error is not None:
                    self.metrics.upstream.labels("failed").inc()
                yield found
                if found.result is not None:
                    return
        finally:
            gone = True
            running.cancel()
