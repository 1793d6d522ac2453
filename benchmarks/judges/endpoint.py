"""A language model as judge, through any OpenAI-compatible server.

::

    row ─► settled without reading? ─► in the cache? ─► asked ─► read strictly ─► score, or unscored and why

What cannot be fetched or read is unscored; no other judge, and no guess, stands in for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.judges.cache import AnswerCache
from benchmarks.judges.chat_endpoint import ChatEndpoint, ChatServer
from benchmarks.judges.images import ShownImages
from benchmarks.judges.judge import Score
from benchmarks.judges.pairs import settled, wants_refusal
from benchmarks.judges.prompt import judge_prompt, prompt_identity
from benchmarks.judges.reply import parse_reply
from benchmarks.runs.record import Row
from safevlm.errors import ImageFileError, InputError

__all__ = ["EndpointJudge", "Source", "Verdict"]

GIVE_UP = 12
"""Questions in a row that the server itself fails, each after all its tries, until it counts as down."""
Source = Literal["rule", "cache", "endpoint"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A row's score and where it came from; ``rule``: without reading an answer."""

    row: Row
    score: Score
    source: Source
    down: bool = False
    """It has no score because the server failed, and not over this row."""


@dataclass(kw_only=True)
class _Streak:
    """Failures of the server in a row, over all workers."""

    failed: int = 0

    def note(self, down: bool, why: str | None) -> None:
        self.failed = self.failed + 1 if down else 0
        if self.failed >= GIVE_UP:
            raise InputError(
                f"the endpoint is down: {self.failed} questions in a row failed, the last one with: {why}. The scores "
                "so far are kept: continue with --resume when it is up."
            )


@dataclass(frozen=True, kw_only=True)
class EndpointJudge:
    """The judge that a server's ``model`` is, at temperature 0.

    ``images``: None judges by the text alone. ``open_endpoint`` connects to the server.
    """

    name: str
    server: ChatServer
    model: str
    images: ShownImages | None = None
    cache: AnswerCache | None = None
    """Entered already."""
    max_tokens: int = 64
    concurrency: int = 4
    open_endpoint: Callable[[ChatServer], ChatEndpoint] = field(default=ChatEndpoint, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.model.strip():
            raise InputError("the judging model's name is empty. Give the name that the endpoint knows it by.")

    def identity(self) -> Mapping[str, Any]:
        """Return model, prompt and settings. The endpoint's address is left out, because servers move."""
        return {
            "judge": "language model",
            "model": self.model,
            "prompt": prompt_identity(),
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "images": None if self.images is None else self.images.identity(),
        }

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return a score for each pair, in order. Raises those of :meth:`judge`."""
        found: dict[int, Score] = {}
        self.judge(rows, lambda number, verdict: found.update({number: verdict.score}))
        return [found[number] for number in range(len(rows))]

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse, with InputError, rows that are no pairs or whose image is not there; nothing is asked."""
        for row in rows:
            wants_refusal(row)
        if self.images is not None:
            self.images.check(rows)

    def judge(self, rows: Sequence[Row], report: Callable[[int, Verdict], None]) -> None:
        """Score pairs, ``concurrency`` at once; ``report`` gets row number and verdict as they come, out of order.
        Raises InputError for a row that is not a pair, a missing image, a refused key, a server that is down, or a
        cache that cannot be used. Scores reported before remain valid.
        """
        self.check(rows)
        asyncio.run(self._judge(rows, report))

    async def _judge(self, rows: Sequence[Row], report: Callable[[int, Verdict], None]) -> None:
        waiting, streak = iter(enumerate(rows)), _Streak()
        async with self.open_endpoint(self.server) as endpoint:
            workers = [
                asyncio.create_task(self._work(endpoint, waiting, report, streak)) for _ in range(self.concurrency)
            ]
            try:
                await asyncio.gather(*workers)
            finally:  # one worker's error ends them all, without waiting for replies
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(
        self,
        endpoint: ChatEndpoint,
        waiting: Iterator[tuple[int, Row]],
        report: Callable[[int, Verdict], None],
        streak: _Streak,
    ) -> None:
        for number, row in waiting:
            known = settled(row)
            if known is None and not row.query:
                known = Score(ok=None, why="no question: the run record does not hold the question")
            if known is not None:
                report(number, Verdict(row=row, score=known, source="rule"))
            else:
                await self._fetch(endpoint, number, row, report, streak)
            await asyncio.sleep(0)  # rows that need no server must not starve the other workers' replies

    async def _fetch(
        self,
        endpoint: ChatEndpoint,
        number: int,
        row: Row,
        report: Callable[[int, Verdict], None],
        streak: _Streak,
    ) -> None:
        images = self.images if row.image is not None else None
        try:
            key = self._key(row, images)
            stored = self.cache.get(key) if self.cache is not None else None
            if stored is not None:
                report(number, Verdict(row=row, score=Score(ok=stored), source="cache"))
                return
            body = await asyncio.to_thread(self._body, row, images)
        except ImageFileError as error:
            report(number, Verdict(row=row, score=Score(ok=None, why=f"image: {error}"), source="rule"))
            return
        reply = await endpoint.ask(body)
        ok = None if reply.text is None else parse_reply(reply.text)
        why = reply.why
        if reply.text is not None and ok is None:
            why = f"unparsable: {endpoint.clean(reply.text)!r}"
        if ok is not None and self.cache is not None:
            self.cache.put(key, ok, self.model)
        report(number, Verdict(row=row, score=Score(ok=ok, why=why), source="endpoint", down=reply.down))
        streak.note(reply.down, why)

    def _body(self, row: Row, images: ShownImages | None) -> bytes:
        shown = None if images is None else images.data_url(str(row.image))
        return json.dumps(self._request(row, shown)).encode("ascii")

    def _key(self, row: Row, images: ShownImages | None) -> str:
        """Hash all that is sent, with the image's fingerprint for the image: a hit must not cost its encoding."""
        shown = None if images is None else images.fingerprint(str(row.image))
        content = {"prompt": prompt_identity(), "request": self._request(row, shown)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()

    def _request(self, row: Row, shown: str | dict[str, Any] | None) -> dict[str, Any]:
        prompt = judge_prompt(row, picture=shown is not None)
        content: str | list[dict[str, Any]] = prompt.user
        if shown is not None:
            picture = {"type": "image_url", "image_url": {"url": shown}}
            content = [picture, {"type": "text", "text": prompt.user}]
        return {
            "model": self.model,
            "messages": [{"role": "system", "content": prompt.system}, {"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
