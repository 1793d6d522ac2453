"""An OpenAI-compatible server, such as vLLM or a gateway: images and questions over the wire, several at once."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from PIL import Image

from benchmarks.judges.chat_endpoint import ChatEndpoint, ChatServer, Patience, Reply
from benchmarks.runs.answering.answerer import Description, decoding_of, failed, for_row
from benchmarks.runs.record import Artifact, Row, Runtime
from runtimes.language.writing import Decoding
from safevlm.terminal.api_key import read_key

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ServerAnswerer"]

ROUNDS = 8
"""Rows a worker has in a batch: fewer would leave workers idle at each batch's end."""


class ServerAnswerer:
    """Ask a server's ``model``, by default greedily (temperature 0), ``concurrency`` questions at once.

    A server tells no guard's probabilities, and its artifact cannot be hashed: a report says so. What its content
    filter withholds counts as blocked. Images go as PNG in data URLs, at their own size.
    """

    kinds = frozenset({"pair", "question"})

    def __init__(
        self,
        url: str,
        model: str,
        *,
        max_new_tokens: int,
        concurrency: int = 4,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 120.0,
        tries: int = 5,
        base: float = 1.0,
        decoding: Decoding | None = None,
    ) -> None:
        self.model = model
        self.decoding = decoding or Decoding()
        self.max_new_tokens = max_new_tokens
        self.concurrency = concurrency
        self.batch = ROUNDS * concurrency
        self.server = ChatServer(
            url=url,
            key=read_key(api_key_env, needed=False),
            key_variable=api_key_env,
            patience=Patience(tries=tries, timeout=timeout, base=base),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Connections are a batch's own: there is nothing to let go of."""

    def describe(self) -> Description:
        """Return the model's name; prompt and preprocessing are the server's, and not known."""
        return Description(
            artifact=Artifact(name=self.model, kind="server"),
            runtime=Runtime(name="OpenAI-compatible server", batch=self.concurrency),
            decoding=decoding_of(self.decoding, self.max_new_tokens),
        )

    def answer(self, rows: Sequence[Row], pictures: Sequence[Image.Image]) -> list[Row]:
        """Ask about each row; what the server does not answer is the row's error."""
        return asyncio.run(self._together(rows, pictures))

    async def _together(self, rows: Sequence[Row], pictures: Sequence[Image.Image]) -> list[Row]:
        free = asyncio.Semaphore(self.concurrency)
        async with ChatEndpoint(self.server, any_end=True) as endpoint:
            asked = [self._ask(endpoint, free, row, shown) for row, shown in zip(rows, pictures, strict=True)]
            return list(await asyncio.gather(*asked))

    async def _ask(self, endpoint: ChatEndpoint, free: asyncio.Semaphore, row: Row, picture: Image.Image) -> Row:
        async with free:
            begun = time.perf_counter()
            reply = await endpoint.ask(await asyncio.to_thread(self._body, row, picture))
            return _done(row, reply, (time.perf_counter() - begun) * 1000)

    def _body(self, row: Row, picture: Image.Image) -> bytes:
        own = for_row(self.decoding, row)
        content = [
            {"type": "image_url", "image_url": {"url": _data_url(picture)}},
            {"type": "text", "text": row.query or ""},
        ]
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": own.temperature or 0,
            "max_tokens": self.max_new_tokens,
            **({} if own.seed is None else {"seed": own.seed}),
        }
        return json.dumps(request).encode("ascii")


def _done(row: Row, reply: Reply, ms: float) -> Row:
    if reply.text is None:
        return failed(row, reply.why or "the server gave no answer").model_copy(update={"ms": ms})
    if reply.ended == "content_filter" and not reply.text.strip():
        return row.model_copy(update={"blocked": "guard", "ms": ms})
    return row.model_copy(update={"answer": reply.text.strip(), "ms": ms})


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
