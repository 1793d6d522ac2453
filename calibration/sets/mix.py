"""Choose calibration samples by declared shares of unsafe pairs, safe pairs and plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibration.sets.conversations import KINDS, Conversations, Kind, Sample
from calibration.sets.same_picture import pixels_sha256
from safevlm.errors import InputError

__all__ = ["Mix", "choose", "read_mix", "samples_sha256"]

DEFAULT_SHARES: Mapping[Kind, float] = {"unsafe": 0.4, "safe": 0.4, "text": 0.2}


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How many samples are chosen, of which kinds, by which seed. Shares are relative to each other."""

    samples: int = 128
    shares: Mapping[Kind, float] = field(default_factory=lambda: dict(DEFAULT_SHARES))
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"--samples {self.samples} is too small. Give at least 1; 128 is usual.")
        if not self.shares or min(self.shares.values()) < 0 or not 0 < sum(self.shares.values()) < float("inf"):
            raise InputError(
                f"--mix {dict(self.shares)} is not allowed. Give shares of at least 0, one of them above 0."
            )

    def counts(self) -> dict[Kind, int]:
        """Return how many samples of each kind are wanted, by largest remainder."""
        total = sum(self.shares.values())
        exact = {kind: self.samples * self.shares.get(kind, 0.0) / total for kind in KINDS}
        counts = {kind: int(share) for kind, share in exact.items()}
        for kind in sorted(exact, key=lambda kind: counts[kind] - exact[kind])[: self.samples - sum(counts.values())]:
            counts[kind] += 1
        return counts


def read_mix(text: str) -> dict[Kind, float]:
    """Read ``unsafe=0.4,safe=0.4,text=0.2``. Raises InputError for another form or an unknown kind."""
    shares: dict[Kind, float] = {}
    for part in text.split(","):
        name, sign, value = part.partition("=")
        kind = next((kind for kind in KINDS if kind == name.strip()), None)
        try:
            share = float(value)
        except ValueError:
            share = float("nan")
        if kind is None or not sign or not 0 <= share < float("inf") or kind in shares:
            raise InputError(
                f"--mix {text}: {part.strip()!r} is not allowed. Give shares of {', '.join(KINDS)}, as in "
                "unsafe=0.4,safe=0.4,text=0.2."
            )
        shares[kind] = share
    return shares


def choose(conversations: Conversations, mix: Mix = Mix()) -> tuple[Sample, ...]:
    """Return the samples that ``mix`` asks for, in their source's order; the same for the same arguments.

    Raises InputError when there are too few of a kind.
    """
    rng = np.random.default_rng(mix.seed)
    chosen: list[int] = []
    for kind, wanted in mix.counts().items():
        there = [number for number, sample in enumerate(conversations.samples) if sample.kind == kind]
        if len(there) < wanted:
            have = {kind: sum(sample.kind == kind for sample in conversations.samples) for kind in KINDS}
            raise InputError(
                f"{conversations.source}: {wanted} samples of kind {kind} are needed, but it has {len(there)} "
                f"({', '.join((f'{name} {count}' for name, count in have.items()))}). Give more samples, or "
                "change --mix or --samples."
            )
        chosen += [there[place] for place in rng.permutation(len(there))[:wanted]]
    return tuple(conversations.samples[number] for number in sorted(chosen))


def samples_sha256(samples: Iterable[Sample], answers: Sequence[str | None]) -> str:
    """Return the SHA-256 of what is calibrated on: kind, question, answer, and the image's pixels."""
    digest = hashlib.sha256()
    for sample, answer in zip(samples, answers, strict=True):
        picture = sample.picture()
        pixels = None if picture is None else pixels_sha256(picture)
        digest.update(json.dumps([sample.kind, sample.question, answer, pixels]).encode() + b"\n")
    return digest.hexdigest()
