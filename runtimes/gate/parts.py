"""What a gate is made of: guard, language model, policy, deadlines."""

from __future__ import annotations

import math
from contextlib import ExitStack

from runtimes.gate.lane import Lane
from runtimes.guard.judge import Guard
from runtimes.guard.policy import Policy
from runtimes.language.language import LanguageRunner
from safevlm.errors import InputError

__all__ = ["GateParts"]


class GateParts:
    """The parts of a :class:`~runtimes.gate.gate.Gate`, whose text says what each is."""

    def __init__(
        self,
        guard: Guard | None,
        language: LanguageRunner | None,
        policy: Policy | None = None,
        timeout: float = 30.0,
        *,
        generation_timeout: float = 300.0,
        digest: str | None = None,
        share_embeddings: bool = True,
    ) -> None:
        if guard is None and language is None:
            raise InputError("a gate needs a guard, a language model, or both. Give at least one.")
        for name, seconds in (("timeout", timeout), ("generation_timeout", generation_timeout)):
            if not (math.isfinite(seconds) and seconds > 0):
                raise InputError(f"{name} is {seconds}; it must be a number of seconds above 0.")
        self.guard = guard
        self.language = language
        self.policy = policy or Policy()
        self.timeout = timeout
        self.generation_timeout = generation_timeout
        self.share_embeddings = share_embeddings
        self.digest = digest
        if digest is None and guard is not None:
            self.digest = getattr(getattr(guard.runner, "bundle", None), "digest", None)
        if guard is not None:
            self.policy.check(guard.classes)
        self.guard_lane = Lane("guard")
        self.language_lane = Lane("language model")
        self._held = ExitStack()
