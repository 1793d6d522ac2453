"""What a gateway allows: sizes, numbers, times."""

from __future__ import annotations

import re
from dataclasses import dataclass

from runtimes.gateway.chat.pass_keys import check_pass_keys
from runtimes.images.tiling import ViewMode, checked_mode
from safevlm.errors import InputError
from safevlm.images.image import FORMATS, MAX_PIXELS

__all__ = ["UPSTREAM_KINDS", "GatewayOptions"]

MEBIBYTE = 2**20
MOST_MEMORY = 2**46
"""Largest memory limit that a system can state, in bytes; more than any machine has."""
MOST_SECONDS = 10_000_000
"""Longest time that timers can be set to, in seconds."""
UPSTREAM_KINDS = ("unknown", "vllm", "llama-server", "openai", "tgi", "litellm")
ORIGIN = re.compile(
    r"(?:http://(?!.*:80$)|https://(?!.*:443$))(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?::[1-9][0-9]{0,4})?"
)
"""Scheme, host and port as a browser writes them."""


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
    upstream_kind: str = "unknown"
    """One of :data:`UPSTREAM_KINDS`: what is known of how the upstream reads text."""
    pass_keys: frozenset[str] = frozenset()
    """Keys of a request beyond OpenAI's that go upstream, such as ``guided_json``."""
    header_timeout: float = 15.0
    """Seconds in which a request's head must arrive, from the connection's start or the head's first byte."""
    write_timeout: float = 30.0
    """Seconds in which a client must take some of what waits to be sent to it; then it is cut off."""
    max_connections: int = 1024
    """Connections at once. A further one takes the place of the one that has waited longest without a request."""
    cors_origins: tuple[str, ...] = ()
    """Origins of pages whose scripts may read answers, such as ``https://app.example``; ``*`` alone allows all."""
    show_probabilities: bool = False
    """Whether clients are given probabilities, which let them search for the threshold."""
    view: ViewMode = "tiles"
    """How large images are treated: see ``runtimes.images.tiling``."""
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
    """Image formats to decode, as in :data:`safevlm.images.image.FORMATS`."""
    decode_timeout: float = 5.0
    """Seconds of processor time for reading and writing one image, and a quarter of what the clock may show for it."""
    decode_memory: int = 1024 * MEBIBYTE
    """Maximum memory of a decoding process for one image, in bytes, in addition to its own."""

    @property
    def max_held(self) -> int:
        """Pixels, of 3 bytes each, of all images that are held at once: those of every request being served."""
        return 16 * self.max_pixels

    def __post_init__(self) -> None:
        checked_mode(self.view)
        numbers = ("max_body", "max_images", "max_image_bytes", "max_pixels", "max_concurrent", "batch", "queue")
        for name in (*numbers, "max_connections", "decode_memory"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.decode_memory > MOST_MEMORY:
            raise InputError(f"decode_memory is {self.decode_memory}; it must be at most {MOST_MEMORY} bytes.")
        times = ("body_timeout", "guard_timeout", "idle_timeout", "total_timeout", "fetch_timeout")
        for name in (*times, "header_timeout", "write_timeout", "decode_timeout"):
            value = getattr(self, name)
            if not 0 < value <= MOST_SECONDS:  # not a number is neither
                raise InputError(f"{name} is {value}; it must be above 0 and at most {MOST_SECONDS} seconds.")
        if not 0 <= self.batch_wait < self.guard_timeout:
            raise InputError(
                f"batch_wait is {self.batch_wait}; it must be at least 0 and less than guard_timeout, in seconds."
            )
        if self.upstream_kind not in UPSTREAM_KINDS:
            raise InputError(f"--upstream-kind {self.upstream_kind} is unknown. Allowed: {', '.join(UPSTREAM_KINDS)}.")
        check_pass_keys(self.pass_keys)
        if not self.formats or not set(self.formats) <= set(FORMATS):
            raise InputError(
                f"--formats {','.join(self.formats)} is not a list of image formats. Allowed: {','.join(FORMATS)}."
            )
        for origin in self.cors_origins:
            if not ORIGIN.fullmatch(origin) and self.cors_origins != ("*",):
                raise InputError(
                    f"--cors-origin {origin[:80]} is not an origin. Write it as browsers send it, such as "
                    "https://app.example (lower case, no path, no standard port); or give * alone for all."
                )
        for host in self.hosts:
            if not host or host != host.lower() or any(sign in host for sign in "/:@ "):
                raise InputError(
                    f"--allow-host {host} is not a host name. Write it in lower case, such as images.example."
                )
