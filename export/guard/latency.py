"""Times of one image as a manifest states them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from safevlm.contract.manifest import Latency
from safevlm.machine import machine_name

__all__ = ["latency_of"]


def latency_of(times_ms: Sequence[float], runtime: str, gpu: str | None = None, *, provider: str) -> Latency:
    """Return the latency that single images took on this machine, and on its GPU where one ran them.

    ``provider`` is what the runtime computed with, such as ``CPUExecutionProvider``.
    """
    return Latency(
        median_ms=float(np.median(times_ms)),
        p95_ms=float(np.percentile(times_ms, 95)),
        batch=1,
        runtime=runtime,
        provider=provider,
        machine=machine_name() if gpu is None else f"{gpu}; {machine_name()}",
    )
