"""Fit a small head to a teacher's probabilities.

Shapes: N images, P pooled features, C classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safevlm.errors import InputError
from safevlm.network.head import GuardHead
from safevlm.network.pooling import POOLINGS, Pooling

__all__ = ["Fit", "Split", "fit_head", "split_by_content"]

SMALL_HEAD = 1_000_000
"""Weights below which threads wait for each other longer than they work; much longer on a busy machine."""
SHARES = (0.7, 0.15, 0.15)
"""Shares of the images for training, validation and test."""
FLAT = 1e-5
"""A feature that varies by less than this share of its mean in the training part is left out: divided by almost
nothing, it would drown the others in float32, and any later change of it would decide every verdict."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Which images train a head, choose among heads, and judge the chosen one: index arrays."""

    train: np.ndarray[Any, np.dtype[np.int64]]
    validation: np.ndarray[Any, np.dtype[np.int64]]
    test: np.ndarray[Any, np.dtype[np.int64]]


def split_by_content(sha256: Sequence[str]) -> Split:
    """Split images by their hashes: the same image is always in the same part, whatever the others are."""
    place = np.array([int(digest[:12], 16) / 16**12 for digest in sha256])
    first, second = SHARES[0], SHARES[0] + SHARES[1]
    return Split(
        train=np.flatnonzero(place < first),
        validation=np.flatnonzero((place >= first) & (place < second)),
        test=np.flatnonzero(place >= second),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """A fitted head and its mean KL and agreement on the validation part."""

    head: GuardHead
    pooling: Pooling
    validation_kl: float
    validation_agreement: float


def fit_head(
    features: dict[Pooling, Tensor],
    teacher: Tensor,
    split: Split,
    *,
    hidden: int,
    pooling: Pooling | None = None,
    seed: int = 0,
    steps: int = 1500,
    batch: int = 256,
    rate: float = 1e-3,
) -> list[Fit]:
    """Fit one head a pooling (or the one named) and return them, the best on the validation part first.

    The loss is KL(teacher || student). Features are standardised by the training part; that is folded into the
    head's first Linear. The weights kept are those of the best validation step.
    """
    fits = [
        _fit(features[kind], teacher, split, kind, hidden=hidden, seed=seed, steps=steps, batch=batch, rate=rate)
        for kind in POOLINGS
        if pooling in (None, kind)
    ]
    return sorted(fits, key=lambda fit: fit.validation_kl)


def _fit(
    features: Tensor,
    teacher: Tensor,
    split: Split,
    pooling: Pooling,
    *,
    hidden: int,
    seed: int,
    steps: int,
    batch: int,
    rate: float,
) -> Fit:
    small = (features.shape[1] + teacher.shape[1]) * hidden < SMALL_HEAD
    with _threads(1 if small else torch.get_num_threads()):
        return _train(features, teacher, split, pooling, hidden=hidden, seed=seed, steps=steps, batch=batch, rate=rate)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    features: Tensor,
    teacher: Tensor,
    split: Split,
    pooling: Pooling,
    *,
    hidden: int,
    seed: int,
    steps: int,
    batch: int,
    rate: float,
) -> Fit:
    generator = torch.Generator().manual_seed(seed)
    train, validation = torch.from_numpy(split.train), torch.from_numpy(split.validation)
    mean = features[train].mean(dim=0)
    spread = features[train].std(dim=0)
    scale = spread.masked_fill(spread <= FLAT * mean.abs(), torch.inf)
    seen = (features - mean) / scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = GuardHead((features.shape[1], hidden, teacher.shape[1])).train()
        optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best, kept = float("inf"), {}
        for step in range(steps):
            rows = train[torch.randint(len(train), (min(batch, len(train)),), generator=generator)]
            loss = _kl(teacher[rows], head(seen[rows]))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if step % 50 == 49 or step == steps - 1:
                found = _validate(head, seen[validation], teacher[validation])
                if found < best:
                    best = found
                    kept = {name: value.clone() for name, value in head.state_dict().items()}
    if not kept:
        raise InputError(
            f"no head could be fitted ({pooling} pooling): the loss is NaN or infinite at every step, because the "
            "projector's features are too large for float32. Check the checkpoint."
        )
    head.load_state_dict(kept)
    head.eval().requires_grad_(False)
    with torch.no_grad():
        said = head(seen[validation]).argmax(dim=1)
    _fold_standardisation(head, mean, scale)
    agreement = float((said == teacher[validation].argmax(dim=1)).float().mean())
    return Fit(head=head, pooling=pooling, validation_kl=best, validation_agreement=agreement)


def _kl(teacher: Tensor, logits: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, dim=-1), teacher, reduction="batchmean")


@torch.no_grad()
def _validate(head: GuardHead, seen: Tensor, teacher: Tensor) -> float:
    head.eval()
    found = float(_kl(teacher, head(seen)))
    head.train()
    return found


def _fold_standardisation(head: GuardHead, mean: Tensor, scale: Tensor) -> None:
    """Put (x - mean) / scale into the first Linear, in float64."""
    first = head.mlp[0]
    assert isinstance(first, nn.Linear)
    weight = first.weight.double() / scale.double()
    bias = first.bias.double() - weight @ mean.double()
    first.weight = nn.Parameter(weight.float(), requires_grad=False)
    first.bias = nn.Parameter(bias.float(), requires_grad=False)
