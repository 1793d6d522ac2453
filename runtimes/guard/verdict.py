"""From class probabilities to a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from safevlm.contract.class_names import safe_index
from safevlm.contract.manifest import Thresholds
from safevlm.errors import InputError

__all__ = ["DEFAULT_BLOCK", "Decision", "Judgement", "Verdict", "decide", "harms", "worst"]

Verdict = Literal["allow", "block", "unsure", "error"]
SEVERITY = {"allow": 0, "unsure": 1, "block": 2}

DEFAULT_BLOCK = 0.5
"""p(unsafe) from which an image is blocked until thresholds are fitted."""


@dataclass(frozen=True)
class Decision:
    """A verdict on one row of probabilities.

    ``label`` is the most probable class, safe included; ``harm`` the most probable one that is not safe.
    """

    verdict: Verdict
    label: str
    p_unsafe: float
    harm: str


@dataclass(frozen=True)
class Judgement:
    """The verdict on one image, by the name it was given; with ``error`` nothing else is known of it.

    Where readers show the file in several ways, or it was judged in tiles, too, ``views`` names all that was judged,
    and ``view`` the one whose verdict this is: the worst. ``view_mode`` is that of ``runtimes.images.tiling``.
    """

    file: str
    verdict: Verdict
    label: str | None = None
    p_unsafe: float | None = None
    probs: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    view: str | None = None
    views: tuple[str, ...] = ()
    view_mode: str = "whole"

    def to_json(self) -> dict[str, object]:
        """Return the object that ``runtimes.check --json`` prints; ``error`` is there only for errors.

        ``view`` and ``views`` are there only for a file that was judged in several ways or in tiles.
        """
        stated: dict[str, object] = {
            "file": self.file,
            "verdict": self.verdict,
            "label": self.label,
            "p_unsafe": self.p_unsafe,
            "probs": dict(self.probs),
            "view_mode": self.view_mode,
        }
        if self.view is not None:
            stated |= {"view": self.view, "views": list(self.views)}
        return stated if self.error is None else stated | {"error": self.error}


class _Judged(Protocol):
    @property
    def verdict(self) -> Verdict: ...
    @property
    def p_unsafe(self) -> float: ...


def worst(views: Sequence[_Judged], own: int = 1) -> int:
    """Return which verdict on the views of an image and their tiles counts; the first ``own`` are of the usual view.

    Being unsure of another view weighs more than of the usual one, which alone can be settled elsewhere.
    """
    return max(
        range(len(views)),
        key=lambda at: (
            SEVERITY[views[at].verdict],
            views[at].verdict == "unsure" and at >= own,
            views[at].p_unsafe,
            -at,
        ),
    )


def decide(probs: npt.NDArray[np.float32], classes: Sequence[str], thresholds: Thresholds | None = None) -> Decision:
    """Judge one row of C probabilities.

    p(unsafe) is 1 - p(safe). Without thresholds, block from 0.5 up, else allow. With them: block from
    ``block`` up, allow below ``allow``, unsure between, in the band of the most probable harm.
    """
    if probs.shape != (len(classes),):
        raise InputError(f"one row of {len(classes)} probabilities is judged, not a shape of {probs.shape}")
    safe = safe_index(classes)
    p_unsafe = min(1.0, max(0.0, 1.0 - float(probs[safe])))
    label = classes[int(probs.argmax())]
    harm = classes[int(harms(probs[None], safe)[0])]
    return Decision(_verdict(p_unsafe, harm, thresholds), label, p_unsafe, harm)


def harms(probs_NC: npt.NDArray[np.float32], safe: int) -> npt.NDArray[np.int64]:
    """Return the most probable class of each row that is not the safe one."""
    masked = probs_NC.copy()
    masked[:, safe] = -1
    found: npt.NDArray[np.int64] = masked.argmax(axis=1).astype(np.int64)
    return found


def _verdict(p_unsafe: float, harm: str, thresholds: Thresholds | None) -> Verdict:
    if thresholds is None:
        return "block" if p_unsafe >= DEFAULT_BLOCK else "allow"
    band = thresholds.band(harm)
    if p_unsafe >= band.block:
        return "block"
    return "allow" if p_unsafe < band.allow else "unsure"
