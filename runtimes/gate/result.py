"""What the gate decided about one request, and why: one object, one JSON line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from runtimes.guard.policy import Policy
from runtimes.guard.verdict import Finding

__all__ = ["GateResult"]


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """A decision. There are no pixels in it.

    ``stage`` decided: the standalone ``guard``, the ``exact`` verdict of the language model's prefill, or an
    ``error``, which always blocks. ``finding`` is that stage's (None after an error). ``ms`` has the milliseconds
    of ``decode``, ``guard``, ``exact`` (the prefill, question included) and ``generate``, as far as they were
    begun, and ``total``, which waiting is part of.
    """

    verdict: Literal["allow", "block"]
    stage: Literal["guard", "exact", "error"]
    reason: str
    """One sentence. It holds nothing of the question."""
    created: str
    """ISO 8601, UTC."""
    image: str | None
    """The file that was given, None for bytes and opened pictures."""
    question: str
    answer: str | None = None
    finish_reason: Literal["stop", "length"] | None = None
    """Why the answer ended; None without one."""
    prompt_tokens: int = 0
    """Image tokens included; 0 where the runtime does not count."""
    completion_tokens: int = 0
    finding: Finding | None = None
    probs: Mapping[str, float] | None = None
    """Of the standalone guard, by class."""
    exact_probs: Mapping[str, float] | None = None
    review: bool = False
    """The policy wants a person to look at this block."""
    error: str | None = None
    """What was raised, with its message; one of the language model's may quote the question."""
    error_in: Literal["guard", "exact", "generate"] | None = None
    busy: bool = False
    """The error is that a runner was still at an earlier call: the same request may fare better later."""
    policy: Policy = field(default_factory=Policy)
    bundle: str | None = None
    """SHA-256 of the bundle's manifest, None without a bundle."""
    view: str | None = None
    """Which of the views or tiles of the image was decided on; None where there is only one."""
    view_mode: str | None = None
    """How large images are treated (see ``runtimes.images.tiling``); None without a standalone guard."""
    ms: Mapping[str, float] = field(default_factory=dict)

    def refusal(self) -> str:
        """Return what is shown in place of an answer: one sentence, with the class where there is one."""
        if self.stage == "error" or self.finding is None:
            return f"I can't answer about this image: {self.reason}."
        return refusal_text(self.finding.harm or self.finding.label)

    def to_json(self, *, text: bool = False) -> dict[str, Any]:
        """Return what is logged; with ``text`` question, answer and whatever may quote them, too."""
        finding = self.finding
        stated: dict[str, Any] = {
            "created": self.created,
            "image": self.image,
            "verdict": self.verdict,
            "stage": self.stage,
            "reason": self.reason,
            "label": None if finding is None else finding.label,
            "harm": None if finding is None else finding.harm,
            "p_unsafe": None if finding is None else finding.p_unsafe,
            "limits": None if finding is None else finding.limits.model_dump(),
            "limits_from": None if finding is None else finding.limits_from,
            "review": self.review,
            "probs": _rounded(self.probs),
            "exact_probs": _rounded(self.exact_probs),
            "policy": self.policy.model_dump(exclude_none=True),
            "bundle": self.bundle,
            "view_mode": self.view_mode,
            "ms": {name: round(value, 3) for name, value in self.ms.items()},
        }
        if self.view is not None:
            stated["view"] = self.view
        if self.error is not None:
            quotable = text or self.error_in == "guard"  # the guard never sees the question
            stated["error"] = self.error if quotable else self.error.partition(":")[0]
            stated["error_in"] = self.error_in
        return stated | {"question": self.question, "answer": self.answer} if text else stated

    def to_json_line(self, *, text: bool = False) -> str:
        """Return :meth:`to_json` as one line of ASCII JSON, without a line end."""
        return json.dumps(self.to_json(text=text), allow_nan=False)


def refusal_text(harm: str | None) -> str:
    """Return what is said in place of an answer about an image that shows ``harm``."""
    if harm is None:
        return "I can't help with this image."
    return f"I can't help with this image: it is classified as {harm.replace('_', ' ')}."


def _rounded(probs: Mapping[str, float] | None) -> dict[str, float] | None:
    """Six digits: more than float32's softmax means, and a line of readable length."""
    return None if probs is None else {name: round(value, 6) for name, value in probs.items()}
