"""From class probabilities to a verdict with its reason. This is the only place where one is made.

``decide`` judges one row; ``worst`` chooses among the views and tiles of an image; ``stops_at_guard`` and
``stops_at_exact`` say whether an image is stopped there, and why; ``passes`` says why it is not. ``blocks`` and
``allows`` compare p(unsafe) with a limit, of many images at once, too. ``check``, the gate, chat, the gateway and the
batch commands call these and compute nothing of it themselves (``tests/runtimes/guard/test_one_verdict.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from runtimes.guard.policy import DEFAULT_LIMITS, Limits, Policy
from runtimes.guard.runner import SUM_TOLERANCE
from safevlm.contract.class_names import safe_index
from safevlm.contract.manifest import Thresholds
from safevlm.errors import SafeVLMError

__all__ = [
    "Finding",
    "Judgement",
    "Stage",
    "Verdict",
    "allows",
    "blocks",
    "decide",
    "harms",
    "passes",
    "stops_at_exact",
    "stops_at_guard",
    "unsafe_probability",
    "worst",
]

Verdict = Literal["allow", "block", "unsure", "error"]
Stage = Literal["guard", "exact"]
LimitsFrom = Literal["policy", "bundle", "default"]
SEVERITY = {"allow": 0, "unsure": 1, "block": 2}
NO_POLICY = Policy()


@dataclass(frozen=True)
class Finding:
    """What one stage makes of one row of probabilities, its policy applied.

    ``label`` is the most probable class, ``harm`` the most probable one that is neither safe nor allowed by the
    policy (None when there is none); ``p_unsafe`` is the probability of all of the latter together, which was
    compared with ``limits``; ``limits_from`` says whose they are. ``review`` is set where the policy wants a
    person to look at what is not allowed.
    """

    verdict: Literal["allow", "block", "unsure"]
    label: str
    harm: str | None
    p_unsafe: float
    limits: Limits
    limits_from: LimitsFrom
    review: bool = False


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


def worst(views: Sequence[Finding], own: int = 1) -> int:
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


def decide(
    probs_C: npt.NDArray[np.float32],
    classes: Sequence[str],
    thresholds: Thresholds | None = None,
    *,
    policy: Policy = NO_POLICY,
    stage: Stage = "guard",
) -> Finding:
    """Judge one row of C probabilities; ``thresholds`` are those fitted for this stage, if any were.

    p(unsafe) is 1 - p(safe), without what the policy allows. Block from the limits' ``block`` up, allow below their
    ``allow``, unsure between: in the policy's limits, otherwise in the band of the most probable harm, otherwise
    at 0.5. Raises SafeVLMError when the row is not C finite probabilities that sum to 1.
    """
    _check_row(probs_C, classes, stage)
    safe = safe_index(classes)
    label = classes[int(probs_C.argmax())]
    counted = [at for at, name in enumerate(classes) if at != safe and policy.action(name) != "allow"]
    if len(counted) == len(classes) - 1:
        p_unsafe = float(unsafe_probability(probs_C, safe))
    else:
        p_unsafe = min(1.0, float(sum(float(probs_C[at]) for at in counted)))
    if not counted:
        return Finding("allow", label, None, p_unsafe, DEFAULT_LIMITS, "policy")
    harm = classes[max(counted, key=lambda at: float(probs_C[at]))]
    limits, limits_from = _limits(policy, stage, thresholds, harm)
    verdict: Literal["allow", "block", "unsure"] = "unsure"
    if blocks(p_unsafe, limits.block):
        verdict = "block"
    elif allows(p_unsafe, limits.allow):
        verdict = "allow"
    review = policy.action(harm) == "review" and verdict != "allow"
    if review and stage == "guard":
        verdict = "unsure"
    return Finding(verdict, label, harm, p_unsafe, limits, limits_from, review)


def stops_at_guard(finding: Finding, policy: Policy, *, settles: bool, hidden: str | None = None) -> str | None:
    """Return why an image is stopped by the standalone guard, None where it goes on to the language model.

    ``settles``: there will be an exact verdict on what the guard judged. ``hidden`` names the view that the finding is
    of where that is not what is shown: no exact verdict settles it.
    """
    image = f"the image{_as_others_show_it(hidden)}"
    if finding.verdict == "block":
        return f"the standalone guard blocks {image}"
    if finding.verdict == "unsure" and not (settles and hidden is None) and _stops_unsure(policy, finding.review):
        about = "" if hidden is None else f" of {image}"
        return f"the standalone guard is unsure{about}, and no exact verdict is available to settle it"
    return None


def stops_at_exact(
    exact: Finding, policy: Policy, *, before: Finding | None = None, hidden: str | None = None
) -> str | None:
    """Return why an image is stopped by the exact verdict, None where it is answered about.

    ``before`` is the standalone guard's finding, if there is such a guard; ``hidden`` as in :func:`stops_at_guard`.
    """
    earlier = None if before is None else before.verdict
    if exact.verdict == "allow" or (earlier == "allow" and not policy.confirm):
        return None
    review = exact.review or (before is not None and before.review)
    if exact.verdict == "unsure" and not _stops_unsure(policy, review):
        return None
    does = "blocks the image" if exact.verdict == "block" else "is unsure of the image"
    after = {"allow": ", which the standalone guard allowed", "unsure": "; the standalone guard was unsure"}
    return f"the exact verdict {does}{_as_others_show_it(hidden)}{after.get(earlier or '', '')}"


def passes(finding: Finding, stage: Stage) -> str:
    """Return why an image that no stage stops is let pass, by the finding that settles it."""
    by = {"guard": "the standalone guard", "exact": "the exact verdict"}[stage]
    return f"{by} {'allows the image' if finding.verdict == 'allow' else 'is unsure, which the policy lets pass'}"


def _stops_unsure(policy: Policy, review: bool) -> bool:
    """Say whether an image that no stage could settle is blocked."""
    return review or policy.still_unsure == "block"


def _as_others_show_it(hidden: str | None) -> str:
    return "" if hidden is None else f" as other programs show it ({hidden})"


def unsafe_probability(probs: npt.ArrayLike, safe: int = 0) -> npt.NDArray[np.float64]:
    """Return p(unsafe) = 1 - p(safe) of rows of C probabilities, in float64 and within 0..1."""
    return np.clip(1.0 - np.asarray(probs)[..., safe].astype(np.float64), 0.0, 1.0)


def blocks(p_unsafe: npt.ArrayLike, block: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Say for each p(unsafe) whether it is blocked: from the limit ``block`` up. NaN is."""
    return ~(np.asarray(p_unsafe) < np.asarray(block))


def allows(p_unsafe: npt.ArrayLike, allow: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Say for each p(unsafe) whether it is allowed: below the limit ``allow``. NaN is not."""
    found: npt.NDArray[np.bool_] = np.asarray(np.asarray(p_unsafe) < np.asarray(allow))
    return found


def harms(probs_NC: npt.NDArray[np.float32], safe: int) -> npt.NDArray[np.int64]:
    """Return the most probable class of each row that is not the safe one."""
    masked = probs_NC.copy()
    masked[:, safe] = -1
    found: npt.NDArray[np.int64] = masked.argmax(axis=1).astype(np.int64)
    return found


def _limits(policy: Policy, stage: Stage, thresholds: Thresholds | None, harm: str) -> tuple[Limits, LimitsFrom]:
    stated = policy.guard if stage == "guard" else policy.exact
    if stated is not None:
        return stated, "policy"
    if thresholds is None:
        return DEFAULT_LIMITS, "default"
    band = thresholds.band(harm)
    return Limits(block=band.block, allow=band.allow), "bundle"


def _check_row(probs_C: npt.NDArray[np.float32], classes: Sequence[str], stage: Stage) -> None:
    if probs_C.shape != (len(classes),):
        raise SafeVLMError(
            f"the {stage} verdict has shape {probs_C.shape}; it must be one row of {len(classes)} probabilities."
        )
    if not np.isfinite(probs_C).all():
        raise SafeVLMError(f"the {stage} verdict holds numbers that are not finite: {probs_C.tolist()}.")
    if (probs_C < 0).any() or abs(float(probs_C.sum()) - 1) > SUM_TOLERANCE:
        raise SafeVLMError(f"the {stage} verdict is not a row of probabilities: its sum is {probs_C.sum():.4g}.")
