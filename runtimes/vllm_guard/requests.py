"""Which images of which requests a step of vLLM's scheduler completes: bookkeeping, without vLLM.

A request's prompt is computed in one step or several (chunked prefill), may begin behind blocks that are known (prefix
caching), and starts over when it is preempted. Its images are judged once, in the step that completes the prompt: from
then on the states of all its image positions are in the cache.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Image", "Request", "Requests", "Work"]


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image of a prompt: its tokens' positions.

    ``usual``: whether it stands behind the very tokens that it does in a prompt of one user turn, which is what the
    guard is calibrated on; elsewhere the text before it has a part in the verdict. ``problem`` says why it cannot be
    judged at all.
    """

    positions: tuple[int, ...]
    identifier: str
    usual: bool = True
    problem: str | None = None


@dataclass(kw_only=True)
class Request:
    """A request under way: ``blocks`` are its blocks of hidden states, ``computed`` how many tokens are in them."""

    images: tuple[Image, ...]
    length: int
    blocks: list[int]
    computed: int
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    """Names its verdict, so that no other request's is ever taken for it."""
    problem: str | None = None
    """Why no verdict on this request can be right."""
    judged: bool = False
    """Whether the worker was asked to judge."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker has to do for a request in one step.

    ``fresh`` are the image positions that this step computes. ``judge`` holds the positions of each image where the
    prompt is complete, otherwise None.
    """

    request_id: str
    nonce: str
    blocks: tuple[int, ...]
    fresh: tuple[int, ...]
    judge: tuple[tuple[int, ...], ...] | None


class Requests:
    """The requests under way, by id."""

    def __init__(self) -> None:
        self._known: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._known)

    def begin(self, request_id: str, request: Request) -> None:
        """Take a request that is scheduled for the first time, or again as if for the first time after a preemption.

        The latter keeps its name and, where it has been judged, is not judged again; one with other images does not
        keep anything.
        """
        earlier = self._known.get(request_id)
        if earlier is not None and earlier.images == request.images and earlier.length == request.length:
            request.nonce, request.judged = earlier.nonce, earlier.judged
        elif earlier is not None:
            request.problem = request.problem or "its prompt changed while it was served"
        self._known[request_id] = request

    def resume(self, request_id: str, blocks: Sequence[int] | None, computed: int, *, replaced: bool) -> None:
        """Note where a request that is scheduled again stands: further blocks, or others after a preemption."""
        request = self._known.get(request_id)
        if request is None:
            return
        if replaced:
            request.blocks = list(blocks or ())
        elif blocks is not None:
            request.blocks.extend(blocks)
        request.computed = computed

    def step(self, request_id: str, count: int) -> Work | None:
        """Return what the worker has to do when the next ``count`` tokens are computed, None for nothing."""
        request = self._known.get(request_id)
        if request is None:
            return None
        start, end = request.computed, request.computed + count
        request.computed = end
        if request.judged or not request.images or request.problem is not None:
            return None
        fresh = tuple(at for image in request.images for at in image.positions if start <= at < end)
        complete = end >= request.length
        if not fresh and not complete:
            return None
        request.judged = complete
        judge = tuple(image.positions for image in request.images) if complete else None
        return Work(request_id=request_id, nonce=request.nonce, blocks=tuple(request.blocks), fresh=fresh, judge=judge)

    def finish(self, request_id: str) -> Request | None:
        """Forget a request and return it; None for one that was never scheduled."""
        return self._known.pop(request_id, None)
