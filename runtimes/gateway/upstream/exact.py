"""The exact verdict of the model behind the gateway: asked of vLLM with the guard's connector (``runtimes.vllm``).

What the standalone guard is unsure of is asked about by itself, as the only image of one user turn and for one token:
the prompt that the guard is calibrated on, which no client has a part in. vLLM keeps what it computed, so the request
itself finds its image's prefill done. Whatever is not a verdict of the expected guard is an error, and nothing is
answered.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image

from runtimes.gateway.images.judging import Judged
from runtimes.gateway.refusal import Refusal, guard_error
from runtimes.gateway.upstream.upstream import KV_PARAMS, HttpUpstream
from runtimes.guard.bundle import Bundle
from runtimes.guard.policy import Policy
from runtimes.guard.verdict import Finding, decide, stops_at_exact
from runtimes.vllm_guard.verdict import Identity, VerdictError, read_identity, read_images
from safevlm.errors import InputError

__all__ = ["ExactUpstream", "expected_guard", "image_url"]

PROBE_PIXELS = 64
PROBE_TEXT = "?"


@dataclass(frozen=True)
class Stopped:
    """What an exact verdict stops: which image of the request, by which finding, and why."""

    index: int
    finding: Finding
    reason: str


class ExactUpstream:
    """Asks an upstream for exact verdicts of one guard, ``expected``."""

    def __init__(self, upstream: HttpUpstream, expected: Identity) -> None:
        self.upstream, self.expected = upstream, expected

    async def begin(self) -> None:
        """Ask once, at the start. Raises InputError for an upstream that gives no verdicts, or another guard's."""
        try:
            listed = await self.upstream.models({})
            models = listed.body.get("data")
            model = str(models[0]["id"]) if isinstance(models, list) and models else ""
            grey = np.full((PROBE_PIXELS, PROBE_PIXELS, 3), 128, np.uint8)
            found = await self.upstream.whole(_probe(image_url(grey), model), {})
            identity = read_identity(found.body.get(KV_PARAMS))
        except (Refusal, VerdictError, KeyError, TypeError) as error:
            raise InputError(
                f"--exact upstream: {getattr(error, 'message', error)} Start the upstream first, with python -m "
                "runtimes.vllm, and give its key with --upstream-key-env or --upstream-key-file if it has one."
            ) from None
        self._require(identity)
        if found.status != httpx.codes.OK:
            raise InputError(f"--exact upstream: the upstream answered with HTTP {found.status}. See its log.")
        try:
            read_images(found.body.get(KV_PARAMS), self.expected, 1)
        except VerdictError as error:
            raise InputError(f"--exact upstream: {error} See the upstream's log.") from None

    def _require(self, found: Identity) -> None:
        if found.classes != self.expected.classes:
            raise InputError(
                "--exact upstream: the upstream's guard has other classes than the bundle's. Serve the checkpoint that "
                "the bundle was exported from."
            )
        if found.head != self.expected.head:
            raise InputError(
                f"--exact upstream: the upstream's guard head has SHA-256 {found.head[:12]}…, the bundle is of "
                f"{self.expected.head[:12]}…. Serve the checkpoint that the bundle was exported from."
            )

    async def stops(
        self, judged: Sequence[Judged], policy: Policy, model: str, headers: Mapping[str, str]
    ) -> Stopped | None:
        """Return the first image of a request that is stopped by an exact verdict on it, or on one of its tiles.

        Those are asked about that the guard is unsure of, and all where the policy wants every verdict confirmed.
        Raises Refusal where there is no verdict.
        """
        asked = [(at, url) for at, each in enumerate(judged) for url in _unsettled(each, policy)]
        rows = await asyncio.gather(*(self.probs(url, model, headers) for _, url in asked))
        for (at, _), row in zip(asked, rows, strict=True):
            found = decide(row, self.expected.classes, policy=policy, stage="exact")
            reason = stops_at_exact(found, policy, before=judged[at].finding)
            if reason is not None:
                return Stopped(at, found, reason)
        return None

    async def probs(self, url: str, model: str, headers: Mapping[str, str]) -> npt.NDArray[np.float32]:
        """Return the exact guard's C probabilities of an image, given as a data URL. Raises Refusal without them."""
        own = {name: value for name, value in headers.items() if name != "x-request-id"}
        found = await self.upstream.whole(_probe(url, model), own)
        if found.status != httpx.codes.OK:
            raise guard_error("the upstream gave no exact verdict, so the request was not answered.")
        try:
            ((row, usual),) = read_images(found.body.get(KV_PARAMS), self.expected, 1)
        except VerdictError:
            raise guard_error("the upstream gave no exact verdict, so the request was not answered.") from None
        if not usual:
            raise guard_error(
                "the upstream puts other text before the image than its guard is calibrated on, so that there is no "
                "exact verdict, and the request was not answered."
            )
        return np.asarray(row, np.float32)


def expected_guard(bundle: Bundle) -> Identity:
    """Return which guard an upstream has to have. Raises InputError for a bundle that does not say it."""
    head = bundle.manifest.source.head_sha256
    if head is None:
        raise InputError(
            f"{bundle.folder} does not say which guard head its checkpoint has, so --exact upstream cannot compare it "
            "with the upstream's. Export the bundle again: python -m export.onnx."
        )
    return Identity(head=head, classes=tuple(bundle.manifest.classes))


def _unsettled(judged: Judged, policy: Policy) -> list[str]:
    """Return what there has to be an exact verdict on, as data URLs: the image, and tiles that the guard is unsure of.

    Tiles are at the guard's size, which the model's is where both are of one checkpoint.
    """
    if judged.finding.verdict != "unsure" and not policy.confirm:
        return []
    return [judged.url, *(image_url(judged.decoded.pixels[tile]) for tile in judged.unsure_tiles)]


def image_url(rgb_HWC: npt.NDArray[np.uint8]) -> str:
    """Return H × W × 3 pixels as a data URL, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(rgb_HWC).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _probe(url: str, model: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROBE_TEXT}]
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "temperature": 0}
    return {"model": model, **asked} if model else asked
