"""Judge the images of a request: bytes to pictures to verdicts, and what goes on in their place."""

from __future__ import annotations

import asyncio
import base64
import io
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.errors import ImageFileError, SafeVLMError
from models.machine import core_count
from runtimes.gateway.batching import Batching
from runtimes.gateway.metrics import Metrics
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import bad_request, guard_error, overloaded
from runtimes.gateway.remote import fetch_image
from runtimes.gateway.requests import ImageReference
from runtimes.judge import Guard
from runtimes.policy import Finding, Policy, find
from runtimes.verdict import worst
from runtimes.views import ImageViews, read_views

__all__ = ["Judged", "Judging"]


@dataclass(frozen=True, eq=False)
class Judged:
    """One image: the upright RGB image that was judged, its C probabilities, and what the policy makes of them.

    Where readers show the image in several ways, ``view`` names the one that these are of, the worst; ``hidden`` says
    that it is another than the picture.
    """

    picture: Image.Image
    probs: npt.NDArray[np.float32]
    finding: Finding
    view: str | None = None
    hidden: bool = False

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
    """The way of an image; an asynchronous context manager around the guard's queue and the threads that decode."""

    def __init__(self, guard: Guard, policy: Policy, options: GatewayOptions, metrics: Metrics) -> None:
        policy.check(guard.classes)
        self.guard, self.policy, self.options, self.metrics = guard, policy, options, metrics
        self.batching = Batching(guard.runner, options, metrics)
        self._threads = ThreadPoolExecutor(max(2, core_count()), "gateway image")
        self._held = 0
        self._freed: deque[int] = deque()

    async def __aenter__(self) -> Judging:
        await self.batching.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.batching.__aexit__(*error)
        self._threads.shutdown(wait=False)

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

    async def png_urls(self, judged: Sequence[Judged]) -> list[str]:
        """Return the judged pictures as data URLs: what the guard saw is what the language model is shown."""
        loop = asyncio.get_running_loop()
        return list(await asyncio.gather(*(loop.run_in_executor(self._threads, _png, each.picture) for each in judged)))

    async def _one(self, image: ImageReference) -> Judged:
        self.batching.coming += 1
        try:
            content = image.content
            if content is None:
                assert image.url is not None
                content = await fetch_image(image.url, image.where, self.options)
            loop = asyncio.get_running_loop()
            views = await loop.run_in_executor(self._threads, self._decoded, content, image.where)
            self._hold(views.image)
        finally:
            self.batching.coming -= 1
        rows = [await self.batching.judge(pixels) for pixels in views.pixels]  # one at a time: one place in the queue
        try:
            findings = [find(row, self.guard.classes, self.policy, "guard", self.guard.thresholds) for row in rows]
        except SafeVLMError:
            raise guard_error("the guard gave no verdict; nothing was answered.") from None
        at = worst(findings, views.own)
        return Judged(views.image, rows[at], findings[at], views.name(at), hidden=views.is_hidden(at))

    def _hold(self, picture: Image.Image) -> None:
        """Count a decoded picture for as long as it lives: small files of large pictures must not fill the memory."""
        while self._freed:
            self._held -= self._freed.popleft()
        size = picture.width * picture.height
        if self._held + size > self.options.max_held:
            raise overloaded(f"the pictures being judged have {self.options.max_held} pixels; try again in a second.")
        self._held += size
        weakref.finalize(picture, self._freed.append, size).atexit = False  # called in whichever thread lets go of it

    def _decoded(self, content: bytes, where: str) -> ImageViews:
        try:
            size, most, mode = self.guard.runner.preprocessing, self.options.max_pixels, self.guard.view
            return read_views(content, size, where, max_pixels=most, mode=mode)
        except ImageFileError as error:
            reason = str(error).removeprefix("the given bytes: ")
            raise bad_request(f"{where}: {reason}", code="invalid_image", param=where) from None


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
