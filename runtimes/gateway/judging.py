"""Judge the images of a request: files to pixels to verdicts, and the files that go on in their place."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.errors import SafeVLMError
from models.image import open_image
from runtimes.gateway.batching import Batching
from runtimes.gateway.decoding import Decoded, Decoding
from runtimes.gateway.metrics import Metrics
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import guard_error, overloaded
from runtimes.gateway.remote import fetch_image
from runtimes.gateway.requests import ImageReference
from runtimes.judge import Guard
from runtimes.policy import Finding, Policy, find
from runtimes.verdict import worst

__all__ = ["Judged", "Judging"]


@dataclass(frozen=True, eq=False)
class Judged:
    """One image: the file that was judged and goes on, its C probabilities, and what the policy makes of them.

    Where readers show the client's file in several ways, or it was judged in tiles, ``view`` names what these are of,
    the worst; ``hidden`` says that it is not in the file that goes on.
    """

    content: bytes
    kind: str
    """The file's media type."""
    probs: npt.NDArray[np.float32]
    finding: Finding
    view: str | None = None
    hidden: bool = False
    bundle: str | None = None
    """Hash of the bundle whose guard it was."""

    @property
    def url(self) -> str:
        """The file as a data URL."""
        return f"data:{self.kind};base64,{base64.b64encode(self.content).decode('ascii')}"

    def picture(self) -> Image.Image:
        """Return the file's RGB image."""
        return open_image(self.content)

    def stated(self, index: int) -> dict[str, Any]:
        """Return what a client is told of it."""
        finding = self.finding
        view = {} if self.view is None else {"view": self.view}
        return {
            "index": index,
            "verdict": finding.verdict,
            "label": finding.label,
            "harm": finding.harm,
            "p_unsafe": round(finding.p_unsafe, 6),
            "review": finding.review,
            **view,
        }


class Judging:
    """The way of an image; an asynchronous context manager around the guard's queue and the processes that decode."""

    def __init__(self, guard: Guard, policy: Policy, options: GatewayOptions, metrics: Metrics) -> None:
        policy.check(guard.classes)
        self.guard, self.policy, self.options, self.metrics = guard, policy, options, metrics
        self.batching = Batching(guard.runner, options, metrics)
        self.decoding = Decoding(guard.runner.preprocessing, guard.view, options)
        self._held = 0

    async def __aenter__(self) -> Judging:
        await self.decoding.__aenter__()
        await self.batching.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.batching.__aexit__(*error)
        await self.decoding.__aexit__(*error)

    async def judge(self, images: Sequence[ImageReference]) -> list[Judged]:
        """Judge all images of a request, those together that can be.

        Errors: Refusal, when one cannot be fetched, read or judged: then none is answered about.
        """
        tasks = [asyncio.create_task(self._one(image)) for image in images]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, image: ImageReference) -> Judged:
        self.batching.coming += 1
        try:
            content = image.content
            if content is None:
                assert image.url is not None
                content = await fetch_image(image.url, image.where, self.options)
            with self.metrics.decode.time():
                decoded = await self.decoding.decode(content, image.where)
        finally:
            self.batching.coming -= 1
        with self._hold(decoded.pixels.nbytes):
            rows = await self._rows(decoded)
        try:
            findings = [find(row, self.guard.classes, self.policy, "guard", self.guard.thresholds) for row in rows]
        except SafeVLMError:
            raise guard_error("the guard gave no verdict; nothing was answered.") from None
        at = worst(findings, decoded.own)
        view = decoded.names[at] if len(decoded.names) > 1 else None
        bundle = getattr(getattr(self.guard.runner, "bundle", None), "digest", None)
        hidden = at >= decoded.own
        return Judged(decoded.content, decoded.kind, rows[at], findings[at], view, hidden, bundle)

    async def _rows(self, decoded: Decoded) -> list[npt.NDArray[np.float32]]:
        """Judge all views and tiles, so many at a time that the images of one request do not fill the queue."""
        at_once = max(1, min(self.options.batch, self.options.queue // self.options.max_images))
        rows: list[npt.NDArray[np.float32]] = []
        for start in range(0, len(decoded.pixels), at_once):
            some = decoded.pixels[start : start + at_once]
            rows += await asyncio.gather(*(self.batching.judge(pixels) for pixels in some))
        return rows

    @contextmanager
    def _hold(self, size: int) -> Iterator[None]:
        """Count pixels while they wait for the guard: many images must not fill the memory."""
        if self._held + size > self.options.max_held:
            raise overloaded(f"the images being judged have {self.options.max_held} bytes; try again in a second.")
        self._held += size
        try:
            yield
        finally:
            self._held -= size
