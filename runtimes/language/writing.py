"""How an answer is to be written, and what is known of it while it is: sampling, its end, its length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from safevlm.errors import InputError

__all__ = ["Decoding", "Writing"]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The way tokens are chosen: greedily at temperature 0, otherwise sampled; ``stop`` ends an answer before itself.

    Raises InputError for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise InputError(f"temperature is {self.temperature}; it must be 0 to 2.")
        if not 0 <= self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be 0 to 1.")
        if not all(self.stop):
            raise InputError("a stop string is empty. Leave it out.")


@dataclass(eq=False)
class Writing:
    """One answer on its way. ``check`` is called before each token and may raise to end it."""

    decoding: Decoding = field(default_factory=Decoding)
    check: Callable[[], None] = lambda: None
    tokens: int = 0
    ended: bool = False
    """Whether the model or a stop text ended it, not its limit."""

    def __post_init__(self) -> None:
        seed = self.decoding.seed
        self._random = np.random.default_rng(None if seed is None else seed % 2**64)

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """OpenAI's word for why it ended."""
        return "stop" if self.ended else "length"

    def choose(self, logits_V: npt.NDArray[Any]) -> int:
        """Return the next token of V logits."""
        self.check()
        if self.decoding.temperature == 0 or self.decoding.top_p == 0:
            return int(logits_V.argmax())
        logits = np.asarray(logits_V, np.float64)
        powers = np.exp((logits - logits.max()) / self.decoding.temperature)
        order = np.argsort(-powers, kind="stable")
        shares = powers[order] / powers.sum()
        sums = np.cumsum(shares)
        kept = min(int(np.searchsorted(sums, self.decoding.top_p)) + 1, len(sums))
        at = int(np.searchsorted(sums[:kept], self._random.random() * sums[kept - 1], side="right"))
        return int(order[min(at, kept - 1)])
