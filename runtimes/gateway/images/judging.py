"""Judge the images of a request: bytes to pixels to verdicts, and the images that replace them upstream."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtimes.gateway.chat.requests import ImageReference
from runtimes.gateway.images.batching import Batching
from runtimes.gateway.images.decoder import DecoderSettings
from runtimes.gateway.images.decoding import Decoded, Decoders
from runtimes.gateway.images.remote import fetch_image
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import guard_error, overloaded
from runtimes.gateway.serving.metrics import Metrics
from runtimes.guard.judge import Guard
from runtimes.guard.policy import Policy
from runtimes.guard.verdict import Finding, decide, worst
from safevlm.errors import SafeVLMError

__all__ = ["Judged", "Judging"]


@dataclass(frozen=True, eq=False)
class Judged:
    """One image as it was judged, its C probabilities, and what the policy makes of them.

    Where readers show the image in several ways, ``view`` names the one that these are of, the worst; ``hidden`` says
    that it is another than what is shown.
    """

    decoded: Decoded
    probs: npt.NDArray[np.float32]
    finding: Finding
    view: str | None = None
    hidden: bool = False
    bundle: str | None = None
    """Hash of the bundle whose guard it was."""
    unsure_tiles: tuple[int, ...] = ()
    """Which of the usual view's tiles the guard is unsure of."""

    @property
    def url(self) -> str:
        """The very file that was judged, as a data URL."""
        return self.decoded.url

    @property
    def picture(self) -> Image.Image:
        """The image in that file, for a model in this process."""
        assert self.decoded.image is not None  # it was asked for
        return self.decoded.image

    def stated(self, index: int) -> dict[str, Any]:
        """Return its description for clients."""
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
    """The way of an image; an asynchronous context manager around the guard's queue and the processes that decode.

    ``with_image``: what was judged is also shown in this process, and not only sent on.
    """

    def __init__(
        self, guard: Guard, policy: Policy, options: GatewayOptions, metrics: Metrics, *, with_image: bool = False
    ) -> None:
        policy.check(guard.classes)
        self.guard, self.policy, self.options, self.metrics = guard, policy, options, metrics
        self.batching = Batching(guard.runner, options, metrics)
        settings = DecoderSettings(
            preprocessing=guard.runner.preprocessing,
            mode=guard.view,
            formats=options.formats,
            max_pixels=options.max_pixels,
            seconds=options.decode_timeout,
            memory=options.decode_memory,
            with_image=with_image,
        )
        self.decoders = Decoders(settings, options.queue)
        self._held = 0
        self._freed: deque[int] = deque()

    async def __aenter__(self) -> Judging:
        await self.decoders.__aenter__()
        await self.batching.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.batching.__aexit__(*error)
        await self.decoders.__aexit__()

    async def judge(self, images: Sequence[ImageReference]) -> list[Judged]:
        """Judge all images of a request, those together that can be.

        Raises Refusal, when one cannot be fetched, read or judged: then none is answered about.
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
                decoded = await self.decoders.decode(content, image.where)
            self._hold(decoded)
        finally:
            self.batching.coming -= 1
        rows = await self._rows(decoded)
        try:
            findings = [decide(row, self.guard.classes, self.guard.thresholds, policy=self.policy) for row in rows]
        except SafeVLMError:
            raise guard_error("the guard gave no verdict, so the request was not answered.") from None
        at = worst(findings, decoded.own)
        bundle = getattr(getattr(self.guard.runner, "bundle", None), "digest", None)
        unsure = tuple(tile for tile in range(1, decoded.own) if findings[tile].verdict == "unsure")
        return Judged(decoded, rows[at], findings[at], decoded.name(at), decoded.is_hidden(at), bundle, unsure)

    async def _rows(self, decoded: Decoded) -> list[npt.NDArray[np.float32]]:
        """Judge all views and tiles, so many at a time that the images of one request do not fill the queue."""
        at_once = max(1, min(self.options.batch, self.options.queue // self.options.max_images))
        rows: list[npt.NDArray[np.float32]] = []
        for start in range(0, len(decoded.pixels), at_once):
            some = decoded.pixels[start : start + at_once]
            rows += await asyncio.gather(*(self.batching.judge(pixels) for pixels in some))
        return rows

    def _hold(self, decoded: Decoded) -> None:
        """Count decoded images for as long as they live: small files of large images must not fill the memory."""
        while self._freed:
            self._held -= self._freed.popleft()
        size = decoded.size
        if self._held + size > self.options.max_held:
            raise overloaded(
                f"too many images are being judged: {self.options.max_held} pixels are the maximum. Try again in a "
                "second."
            )
        self._held += size
        weakref.finalize(decoded, self._freed.append, size).atexit = False  # called in whichever thread lets go of it
