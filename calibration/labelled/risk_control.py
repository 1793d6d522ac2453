"""Thresholds that keep a promise about images not seen yet, from labelled images that are like them.

An image is allowed below ``allow`` and blocked from ``block`` on. A miss is an unsafe image that is allowed; a
false block is a safe image that is blocked. With conformal risk control (Angelopoulos et al., 2022) the expected
rate is at most the level; with learn-then-test (Angelopoulos et al., 2021) it is, but for a chance of delta, by
the exact binomial tail. Both hold for any guard and any distribution, as long as images to come are exchangeable
with those fitted on.

**Under corruptions.** The promise on misses is made for each declared corruption by itself: ``allow`` is fitted to the
scores of the same images under each, and the smallest is taken (the paper's extension to multiple risks). Misses can
only fall with ``allow``, so each promise keeps holding, and with them the promise for any mixture of those corruptions
that does not depend on the image. No union bound is needed: it would promise all of them at once with
``learn_then_test``. That is not promised, nor that the rate stays below alpha for somebody who picks the corruption
image by image.

**What cannot be promised** is known from the number of images alone. Conformal risk control takes the limit from
(n / (n + 1)) (share of misses) + 1 / (n + 1) <= alpha (Theorem 1), so even a guard without a miss needs
1 / (n + 1) <= alpha. Under shift the last term is the weight of the image to come (the paper's extension to shift). A
corruption that is applied to the labelled images themselves weighs all images alike, so the bound is the same under
each.

Shapes: n images; scores are p(unsafe), float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtimes.guard.verdict import allows, blocks
from safevlm.contract.manifest import Band
from safevlm.errors import InputError

__all__ = [
    "Bands",
    "Method",
    "Promise",
    "Rates",
    "Seen",
    "check_feasible",
    "fewest",
    "fit_bands",
    "hits_allowed",
    "measure",
]

Method = Literal["conformal_risk_control", "learn_then_test"]
NEARLY_ONE = math.nextafter(1.0, 0.0)
"""The largest ``allow``: below 1 nearly everything would be."""
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Promise:
    """At most ``alpha`` of unsafe images allowed and at most ``max_fpr`` of safe images blocked.

    ``delta`` is the chance that ``learn_then_test`` takes, for each of the two by itself.
    """

    alpha: float = 0.05
    max_fpr: float = 0.05
    method: Method = "conformal_risk_control"
    delta: float = 0.1

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("max-fpr", self.max_fpr), ("delta", self.delta)):
            if not 0 < value < 1:
                raise InputError(f"--{name} {value} is not a share. Give a number above 0 and below 1, such as 0.05.")


class Seen(NamedTuple):
    """What a guard makes of n images, as they are or under a corruption: their scores and most probable harms."""

    scores: Floats
    harms: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Bands:
    """The band of each class with enough examples, and the one for all others."""

    pooled: Band
    per_class: Mapping[str, Band]

    def limits(self, harms: Sequence[str]) -> tuple[Floats, Floats]:
        """Return ``allow`` and ``block`` for images by their most probable harm, n each."""
        chosen = [self.per_class.get(harm, self.pooled) for harm in harms]
        return np.array([band.allow for band in chosen]), np.array([band.block for band in chosen])


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What bands do to images: shares in 0..1."""

    miss: float
    fpr: float
    unsure: float


def hits_allowed(n: int, level: float, promise: Promise) -> int:
    """Return how many of ``n`` images may go wrong; -1 when even none is too few to tell.

    Conformal risk control: the most k with (k + 1) / (n + 1) <= level. Learn-then-test: the most k with
    P(Binomial(n, level) <= k) <= delta.
    """
    if promise.method == "conformal_risk_control":
        return min(n, math.floor(level * (n + 1) * (1 + 1e-12))) - 1  # all n never: level is below 1
    tail, k = 0.0, -1
    while k + 1 < n:
        tail += math.exp(_log_binomial(n, k + 1, level))
        if tail > promise.delta:
            return k
        k += 1
    return k


def _log_binomial(n: int, k: int, p: float) -> float:
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return choose + k * math.log(p) + (n - k) * math.log1p(-p)


def fewest(level: float, promise: Promise) -> int:
    """Return the least number of images that a level can be promised from."""
    if promise.method == "conformal_risk_control":
        return max(1, math.ceil(1 / level * (1 - 1e-12)) - 1)
    return max(1, math.ceil(math.log(promise.delta) / math.log1p(-level) * (1 - 1e-12)))


def check_feasible(unsafe: int, safe: int, promise: Promise) -> None:
    """Raise InputError, saying how many are needed, where so few images cannot carry the promise for any guard."""
    _require(unsafe, promise.alpha, promise, "unsafe", "--alpha")
    _require(safe, promise.max_fpr, promise, "safe", "--max-fpr")


def fit_bands(
    scores: Floats,
    unsafe: Flags,
    harms: Sequence[str],
    promise: Promise,
    *,
    per_class: bool = True,
    under: Sequence[Seen] = (),
) -> Bands:
    """Fit bands to n labelled images: their scores, whether they are unsafe, their most probable harm.

    A class whose group (the images of which it is the most probable harm) has enough unsafe images gets a band
    of its own, the others share one: the promise on misses holds inside every group, and so for all images. For
    that, ``learn_then_test`` takes an equal part of delta for each group: the chance that any group breaks its
    promise is then at most delta (union bound). The promise on safe images is made for all of them together.
    ``allow`` is the largest and ``block`` (fitted to all safe images) the least threshold that keeps its promise.
    Where the guard is so good that they cross, no image need be unsure, and one threshold between them serves as
    both: the one with the fewest errors.

    ``under`` is what the guard makes of the same images under each corruption that the promise on misses covers, too.
    An image's group is then that of its harm under the corruption. The promise on safe images is for them as they are.

    Raises InputError saying how many images are needed.
    """
    check_feasible(int(unsafe.sum()), int((~unsafe).sum()), promise)
    block = _block(scores[~unsafe], promise)
    ways = [(each.scores, np.array(each.harms)) for each in (Seen(scores, harms), *under)]
    alone = _classes_alone([names[unsafe].tolist() for _, names in ways], promise) if per_class else []
    each = _for_each(promise, len(alone) + 1)

    def band(inside: Callable[[NDArray[np.str_]], Flags]) -> Band:
        groups = [inside(names) for _, names in ways]
        found = [seen[unsafe & group] for (seen, _), group in zip(ways, groups, strict=True)]
        return _band(found, scores[~unsafe & groups[0]], block, each)

    return Bands(
        pooled=band(lambda names: ~np.isin(names, alone)),
        per_class={name: band(lambda names, name=name: names == name) for name in alone},  # type: ignore[misc]
    )


def _classes_alone(ways: Sequence[Sequence[str]], promise: Promise) -> list[str]:
    """Return the classes with enough unsafe images, the most of them that leave enough for the shared band.

    ``ways`` are the most probable harms of the unsafe images, as they are and under each corruption: enough in each.
    """
    counts = [Counter(harms) for harms in ways]
    fewest_of = {name: min(count[name] for count in counts) for name in counts[0]}
    alone = sorted(fewest_of, key=lambda name: (-fewest_of[name], name))
    while alone:
        needed = fewest(promise.alpha, _for_each(promise, len(alone) + 1))
        rest = min(count.total() - sum(count[name] for name in alone) for count in counts)
        if min(fewest_of[alone[-1]], rest) >= needed:
            break
        alone.pop()
    return sorted(alone)


def _for_each(promise: Promise, groups: int) -> Promise:
    """Return the promise to be kept in each of so many groups, for it to hold in all of them at once."""
    return replace(promise, delta=promise.delta / groups)


def _require(n: int, level: float, promise: Promise, kind: str, option: str) -> None:
    needed = fewest(level, promise)
    if n < needed:
        raise InputError(
            f"{n} {kind} images are too few for {option} {level} by {promise.method}: at least {needed} are needed, "
            "and more make the thresholds less strict. Label more images, or relax the option."
        )


def _band(unsafe_scores: Sequence[Floats], safe_scores: Floats, block: float, promise: Promise) -> Band:
    """Return the band of a group from its unsafe images' scores, as they are first and then under each corruption."""
    allow = min(float(np.sort(each)[hits_allowed(len(each), promise.alpha, promise)]) for each in unsafe_scores)
    if allow >= block:
        allow = block = _between(block, allow, unsafe_scores[0], safe_scores)
    return Band(allow=min(allow, NEARLY_ONE), block=block, n_unsafe=len(unsafe_scores[0]))


def _between(low: float, high: float, unsafe_scores: Floats, safe_scores: Floats) -> float:
    """Return the threshold in low..high with the fewest errors on the images at hand, the nearest to 0.5 of those.

    Every one of them keeps both promises: lower ones miss less, higher ones block less.
    """
    scores = np.unique(np.concatenate([unsafe_scores, safe_scores]))
    steps = np.concatenate([[low, high, 0.5], scores, (scores[1:] + scores[:-1]) / 2])
    steps = steps[(steps >= low) & (steps <= high)]
    missed = np.searchsorted(np.sort(unsafe_scores), steps) / max(1, len(unsafe_scores))
    blocked = 1 - np.searchsorted(np.sort(safe_scores), steps) / max(1, len(safe_scores))
    return float(steps[np.lexsort((np.abs(steps - 0.5), missed + blocked))[0]])


def _block(safe_scores: Floats, promise: Promise) -> float:
    """Return the least threshold that at most the permitted number of safe images reach.

    Raises InputError where too many safe images are scored 1, so that only a threshold which never blocks would do.
    """
    wrong = hits_allowed(len(safe_scores), promise.max_fpr, promise)
    highest = np.sort(safe_scores)[::-1]
    if wrong < len(highest) and highest[wrong] >= 1:
        raise InputError(
            f"{int((safe_scores >= 1).sum())} of {len(safe_scores)} safe images have a p(unsafe) of 1, so no "
            f"threshold from 0 to 1 keeps --max-fpr {promise.max_fpr}. Check the labels, or raise --max-fpr."
        )
    return float(np.nextafter(highest[wrong], 2.0)) if wrong < len(highest) else 0.0


def measure(bands: Bands, scores: Floats, unsafe: Flags, harms: Sequence[str]) -> Rates:
    """Return what bands do to n images; a rate over no image is 0."""
    allow, block = bands.limits(harms)
    allowed, blocked = allows(scores, allow), blocks(scores, block)
    unsure: NDArray[Any] = ~allowed & ~blocked
    return Rates(miss=_share(allowed[unsafe]), fpr=_share(blocked[~unsafe]), unsure=_share(unsure))


def _share(flags: Flags) -> float:
    return float(flags.mean()) if len(flags) else 0.0
