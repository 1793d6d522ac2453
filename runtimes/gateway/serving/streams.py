"""Answers in pieces: events of ours, and the response that lets go of where they come from."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi.responses import StreamingResponse

from runtimes.gate.result import GateResult
from runtimes.gateway.answers import DONE, chunk, error_event, usage, usage_chunk
from runtimes.gateway.refusal import Refusal, guard_error, overloaded, upstream_error
from runtimes.gateway.serving.serving import shutting_down
from runtimes.gateway.upstream.embedded import AnswerPart

__all__ = ["EventsResponse", "answer_events", "failure", "noted", "refusal_events", "rest"]


class EventsResponse(StreamingResponse):
    """Server-sent events whose source is closed however their sending ends, even before its first."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterable[bytes],
        close: Callable[[], Awaitable[None]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", **(headers or {})})
        self._close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send what the source yields; cut off by the server's end, say so in an event."""
        begun = ended = False

        async def sending(message: Any) -> None:
            nonlocal begun, ended
            begun, ended = True, message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await super().__call__(scope, receive, sending)
        except asyncio.CancelledError:
            if begun and not ended:
                await sending({"type": "http.response.body", "body": error_event(shutting_down()), "more_body": False})
            raise
        finally:
            if self._close is not None:
                await self._close()

    async def stream_response(self, send: Any) -> None:
        """Send the events; the last is sent as such, so that this request is over when its reader has it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        ended = False
        async for piece in self.body_iterator:
            ended = piece == DONE
            await send({"type": "http.response.body", "body": piece, "more_body": not ended})
        if not ended:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def refusal_events(
    model: str, text: str, stated: dict[str, Any], *, include_usage: bool = False
) -> AsyncIterator[bytes]:
    """Yield a refusal as a stream."""
    name = f"chatcmpl-{uuid.uuid4().hex}"
    yield chunk(name, model, {"role": "assistant", "content": text, "refusal": text}, stated=stated)
    yield chunk(name, model, {}, ended="content_filter", stated=stated)
    if include_usage:
        yield usage_chunk(name, model, usage(0, 0))
    yield DONE


async def answer_events(
    model: str,
    first: AnswerPart,
    told: AsyncIterator[AnswerPart],
    stated: dict[str, Any],
    *,
    include_usage: bool = False,
) -> AsyncIterator[bytes]:
    """Yield an answer that has begun with ``first``; a failure on the way is an event of its own."""
    name = f"chatcmpl-{uuid.uuid4().hex}"
    result = first.result
    yield chunk(name, model, {"role": "assistant", "content": first.piece or ""}, stated=stated)
    while result is None:
        each = await told.__anext__()
        result = each.result
        if each.piece is not None:
            yield chunk(name, model, {"content": each.piece})
    if result.error is not None or result.verdict == "block":
        yield error_event(failure(result))
        return
    yield chunk(name, model, {}, ended=result.finish_reason or "stop")
    if include_usage:
        yield usage_chunk(name, model, usage(result.prompt_tokens, result.completion_tokens))
    yield DONE


async def noted(events: AsyncIterable[bytes], notes: dict[str, Any]) -> AsyncIterator[bytes]:
    """Pass on an answer's events; the access line of one whose end does not come says that it failed."""
    outcome, notes["outcome"] = notes["outcome"], "stream_failed"
    async for each in events:
        if each == DONE:
            notes["outcome"] = outcome
        yield each


async def rest(told: AsyncIterator[AnswerPart], pieces: list[str]) -> AnswerPart:
    """Collect the pieces that follow and return what ends them."""
    async for each in told:
        if each.result is not None:
            return each
        pieces.append(each.piece or "")
    raise upstream_error("the answer had no end.")


def failure(result: GateResult) -> Refusal:
    """Return the refusal for a gate's error."""
    if result.busy:
        return overloaded(f"{result.reason}; the request was not answered. Try again in a second.")
    if result.error_in == "generate":
        return upstream_error("the language model failed; the answer is incomplete.")
    return guard_error("the image could not be judged, so the request was not answered.")
