"""The events of a streamed chat completion as those of a streamed Response, each with its number."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from typing import Any

from runtimes.gateway.answers import FIELD
from runtimes.gateway.refusal import Refusal, upstream_error
from runtimes.gateway.responses.answer import (
    INCOMPLETE,
    Call,
    Delta,
    begun,
    call_item,
    ended,
    new_id,
    part_of,
    read,
    said_item,
    usage,
)
from runtimes.gateway.responses.model import ResponseBody

__all__ = ["response_events"]


async def response_events(
    asked: ResponseBody, chunks: AsyncIterable[bytes], stated: dict[str, Any] | None
) -> AsyncIterator[bytes]:
    """Yield the events that stand for a stream of chat events; ``stated`` is our field, where it came as a header."""
    written: _Written | None = None
    try:
        async for data in _datas(chunks):
            body = None if data == b"[DONE]" else json.loads(data)
            if written is None:
                found = body.get(FIELD) if isinstance(body, dict) else None
                written = _Written(asked, stated if found is None else found)
                for each in written.begin():
                    yield each
            if body is None:
                for each in written.end():
                    yield each
                return
            if isinstance(body, dict) and isinstance(body.get("error"), dict):
                for each in written.fail(body["error"]):
                    yield each
                return
            for each in written.take(body):
                yield each
        raise upstream_error("the upstream's stream ended before it was complete.")
    except Refusal as refusal:
        written = written or _Written(asked, stated)
        for each in written.fail(refusal.body()["error"]):
            yield each


async def _datas(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Yield what each event says, however the events are cut."""
    rest = b""
    async for chunk in chunks:
        *events, rest = (rest + bytes(chunk)).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                yield event[len(b"data: ") :]


class _Item:
    """An item of the output that is being written, with its parts' texts."""

    def __init__(self, kind: str, at: int, call: Call | None = None) -> None:
        self.name, self.at, self.call = new_id(kind), at, call
        self.parts: list[tuple[str, list[str]]] = []
        """Type and pieces of each part; a call has one, its arguments."""


class _Written:
    """A Response as it is written: what was begun, what is open, and the number of the next event."""

    def __init__(self, asked: ResponseBody, stated: dict[str, Any] | None) -> None:
        self.response = begun(asked, stated)
        self.output: list[dict[str, Any]] = []
        self._number = 0
        self._open: _Item | None = None
        self._calls: dict[int, _Item] = {}
        self._reason: str | None = None
        self._usage: dict[str, Any] | None = None

    def begin(self) -> Iterator[bytes]:
        """Yield what comes first."""
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def take(self, body: Any) -> Iterator[bytes]:
        """Yield what a chunk adds. Raises Refusal for one that is none."""
        chunk = read(body)
        self.response["model"] = chunk.model or self.response["model"]
        self._usage = usage(chunk.usage) or self._usage
        for choice in chunk.choices[:1]:
            self._reason = choice.finish_reason or self._reason
            yield from self._said(choice.delta or Delta())

    def end(self) -> Iterator[bytes]:
        """Yield what ends an answer that is whole, or as whole as the upstream makes it."""
        if not self.output and self._open is None and not self._calls:
            yield from self._opened("msg", "output_text")
        yield from self._closed()
        done = ended(self.response, self.output, self._reason, self._usage)
        yield self._event(f"response.{done['status']}", response=done)

    def fail(self, error: dict[str, Any]) -> Iterator[bytes]:
        """Yield what ends an answer that failed."""
        if self._number == 0:
            yield from self.begin()
        message = str(error.get("message") or "the answer is incomplete.")
        code = error.get("code")
        yield self._event("error", code=code if code is None else str(code), message=message, param=error.get("param"))
        told = {"code": "server_error", "message": message}
        output = [each for each in self.output if each]
        failed = {**self.response, "status": "failed", "error": told, "output": output}
        yield self._event("response.failed", response=failed)

    # -- parts ------------------------------------------------------------------------------------------

    def _said(self, delta: Delta) -> Iterator[bytes]:
        if delta.thought:
            yield from self._more("rs", "reasoning_text", delta.thought)
        if delta.text:
            yield from self._more("msg", "output_text", delta.text)
        if delta.refusal:
            yield from self._more("msg", "refusal", delta.refusal)
        for call in delta.tool_calls or ():
            yield from self._called(call)

    def _more(self, kind: str, part: str, text: str) -> Iterator[bytes]:
        item = self._open
        if item is None or not item.name.startswith(f"{kind}_"):
            yield from self._closed()
            yield from self._opened(kind, part)
        elif item.parts[-1][0] != part:
            yield from self._part_done(item)
            yield self._part_begun(item, part)
        item = self._open
        assert item is not None
        item.parts[-1][1].append(text)
        logprobs: dict[str, Any] = {"logprobs": []} if part == "output_text" else {}
        yield self._event(f"response.{part}.delta", **self._at(item), delta=text, **logprobs)

    def _opened(self, kind: str, part: str) -> Iterator[bytes]:
        item = self._open = _Item(kind, len(self.output))
        self.output.append({})
        empty = self._item(item, "in_progress")
        yield self._event("response.output_item.added", output_index=item.at, item={**empty, "content": []})
        yield self._part_begun(item, part)

    def _part_begun(self, item: _Item, part: str) -> bytes:
        item.parts.append((part, []))
        return self._event("response.content_part.added", **self._at(item), part=part_of(part, ""))

    def _part_done(self, item: _Item) -> Iterator[bytes]:
        part, pieces = item.parts[-1]
        text = "".join(pieces)
        said = {"refusal": text} if part == "refusal" else {"text": text}
        logprobs: dict[str, Any] = {"logprobs": []} if part == "output_text" else {}
        yield self._event(f"response.{part}.done", **self._at(item), **said, **logprobs)
        yield self._event("response.content_part.done", **self._at(item), part=part_of(part, text))

    def _called(self, call: Call) -> Iterator[bytes]:
        item = self._calls.get(call.index)
        if item is None:
            yield from self._message_closed()
            item = self._calls[call.index] = _Item("fc", len(self.output), call)
            item.call = Call(id=call.id or new_id("call"), function=call.function)
            item.parts.append(("function_call_arguments", []))
            self.output.append({})
            yield self._event("response.output_item.added", output_index=item.at, item=self._item(item, "in_progress"))
        piece = call.function.arguments or ""
        if piece:
            item.parts[0][1].append(piece)
            yield self._event(
                "response.function_call_arguments.delta", item_id=item.name, output_index=item.at, delta=piece
            )

    def _closed(self) -> Iterator[bytes]:
        """Close all that is open."""
        yield from self._message_closed()
        for item in self._calls.values():
            text = "".join(item.parts[0][1])
            yield self._event(
                "response.function_call_arguments.done",
                item_id=item.name,
                output_index=item.at,
                arguments=text,
                name=item.call.function.name if item.call else None,
            )
            yield self._done(item)
        self._calls.clear()

    def _message_closed(self) -> Iterator[bytes]:
        if self._open is not None:
            yield from self._part_done(self._open)
            yield self._done(self._open)
            self._open = None

    def _done(self, item: _Item) -> bytes:
        self.output[item.at] = self._item(item, "incomplete" if self._reason in INCOMPLETE else "completed")
        return self._event("response.output_item.done", output_index=item.at, item=self.output[item.at])

    def _item(self, item: _Item, status: str) -> dict[str, Any]:
        parts = [(kind, "".join(pieces)) for kind, pieces in item.parts]
        if item.call is not None:
            function = item.call.function.model_copy(update={"arguments": parts[0][1]})
            return call_item(item.name, status, item.call.model_copy(update={"function": function}))
        return said_item(item.name, status, parts)

    def _at(self, item: _Item) -> dict[str, Any]:
        return {"item_id": item.name, "output_index": item.at, "content_index": len(item.parts) - 1}

    def _event(self, kind: str, **more: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._number, **more}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(body)}\n\n".encode("ascii")
