"""What a gateway allows: sizes, numbers, times."""

from __future__ import annotations

import math
from dataclasses import dataclass

from models.errors import InputError
from models.image import MAX_PIXELS

__all__ = ["GatewayOptions"]

MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """Limits in bytes, pixels and seconds; what goes beyond is refused before it costs anything.

    A request's images are judged ``batch`` at a time with those of other requests, after waiting ``batch_wait`` for
    more; ``queue`` may wait. ``body_timeout`` bounds the sending of a request, ``idle_timeout`` the silence of an
    upstream, ``total_timeout`` its whole answer. ``hosts`` are those that image URLs may name, exactly.
    """

    max_body: int = 32 * MEBIBYTE
    max_images: int = 8
    max_image_bytes: int = 16 * MEBIBYTE
    max_pixels: int = MAX_PIXELS
    max_concurrent: int = 64
    max_reply: int = 16 * MEBIBYTE
    body_timeout: float = 30.0
    guard_timeout: float = 30.0
    idle_timeout: float = 60.0
    total_timeout: float = 600.0
    fetch_timeout: float = 10.0
    batch: int = 8
    batch_wait: float = 0.005
    queue: int = 64
    require_image: bool = False
    hosts: frozenset[str] = frozenset()
    private_hosts: bool = False
    """Whether allowed hosts may resolve to addresses that are not public."""
    show_probabilities: bool = False
    """Whether clients are given probabilities, which let them search for the threshold."""

    @property
    def max_held(self) -> int:
        """Pixels, of 3 bytes each, of all pictures that are held at once: those of every request being served."""
        return 16 * self.max_pixels

    def __post_init__(self) -> None:
        for name in ("max_body", "max_images", "max_image_bytes", "max_pixels", "max_concurrent", "batch", "queue"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: at least 1 is needed.")
        for name in ("body_timeout", "guard_timeout", "idle_timeout", "total_timeout", "fetch_timeout"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}: a number of seconds above 0 is needed.")
        if not 0 <= self.batch_wait < self.guard_timeout:
            raise InputError(f"batch_wait is {self.batch_wait}: 0 to less than guard_timeout, in seconds, is allowed.")
        for host in self.hosts:
            if not host or host != host.lower() or any(sign in host for sign in "/:@ "):
                raise InputError(
                    f"--allow-host {host}: a host's name in lower case is allowed, such as images.example."
                )
