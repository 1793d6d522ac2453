"""One guard with its policy, as long as it judges: a gateway has one at a time, and a new one when it is reloaded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from runtimes.gateway.gateway import Gateway
from runtimes.gateway.images.judging import Judging
from runtimes.gateway.serving.metrics import Metrics
from runtimes.guard.judge import Guard
from runtimes.guard.policy import Policy

__all__ = ["Judge"]


class Judge:
    """The guard of a gateway, opened and closed; closing waits for those who are being judged."""

    def __init__(self, gateway: Gateway, metrics: Metrics) -> None:
        assert gateway.gate.guard is not None
        self.gate = gateway.gate
        self.guard: Guard = gateway.gate.guard
        self.policy: Policy = gateway.gate.policy
        self.digest = gateway.gate.digest
        self.judging = Judging(self.guard, self.policy, gateway.options, metrics, with_image=gateway.upstream is None)
        self._held = ExitStack()
        self._judging = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def stuck(self) -> bool:
        """Whether the guard cannot be asked."""
        return not self.judging.batching.working or self.gate.stuck > 0

    async def open(self) -> None:
        """Open the guard and start the processes that decode. Raises SafeVLMError."""
        with ExitStack() as held:
            held.enter_context(self.gate)
            await self.judging.__aenter__()
            self._held = held.pop_all()

    async def close(self) -> None:
        """Wait for those who are being judged, and let go of everything."""
        await self._idle.wait()
        await self.judging.__aexit__()
        await asyncio.to_thread(self._held.close)

    @contextmanager
    def held(self) -> Iterator[Judging]:
        """Keep it open for what is judged within."""
        self._judging += 1
        self._idle.clear()
        try:
            yield self.judging
        finally:
            self._judging -= 1
            if not self._judging:
                self._idle.set()
