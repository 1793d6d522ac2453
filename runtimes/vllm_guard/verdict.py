"""What is said of a request in ``kv_transfer_params``: written by the connector, read by the gateway.

::

    {"safe_vlm": {"version": 1, "head": SHA-256, "classes": [...],
                  "images": [{"usual": true, "label": "safe", "probs": {"safe": 0.98, ...}},
                             {"error": "..."}]}}

or, where nothing can be said of a whole request, ``"error"`` in place of ``"images"``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safevlm.errors import SafeVLMError

__all__ = ["FIELD", "VERSION", "Identity", "VerdictError", "image_stated", "read_images", "stated"]

FIELD = "safe_vlm"
VERSION = 1
SUM_TOLERANCE = 1e-3


class VerdictError(SafeVLMError):
    """A server's answer holds no verdict that may be believed."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Whose verdicts they are: the head's SHA-256 and its classes in order."""

    head: str
    classes: tuple[str, ...]


def is_row(probs: Any, count: int) -> bool:
    """Say whether this is one row of ``count`` probabilities."""
    return (
        isinstance(probs, (list, tuple))
        and len(probs) == count
        and all(type(p) in (int, float) and math.isfinite(p) and 0 <= p <= 1 for p in probs)
        and abs(math.fsum(probs) - 1) <= SUM_TOLERANCE
    )


def image_stated(probs: Any, classes: Sequence[str], *, usual: bool) -> dict[str, Any]:
    """Return what is said of one image; an error where the worker's numbers are not probabilities."""
    if not is_row(probs, len(classes)):
        return {"error": "the hidden states of this image were not computed"}
    label = classes[max(range(len(classes)), key=lambda at: probs[at])]
    return {"usual": usual, "label": label, "probs": dict(zip(classes, probs, strict=True))}


def stated(identity: Identity, images: Sequence[Mapping[str, Any]] | None, error: str | None = None) -> dict[str, Any]:
    """Return a request's ``kv_transfer_params``: its images in the order of the prompt, or an error."""
    said: dict[str, Any] = {"version": VERSION, "head": identity.head, "classes": list(identity.classes)}
    said |= {"error": error} if images is None else {"images": [dict(each) for each in images]}
    return {FIELD: said}


def read_identity(params: Any) -> Identity:
    """Return whose verdicts an answer holds. Raises VerdictError where it holds none."""
    said = params.get(FIELD) if isinstance(params, Mapping) else None
    if not isinstance(said, Mapping):
        raise VerdictError("the upstream gives no exact verdicts; serve the model with python -m runtimes.vllm.")
    if said.get("version") != VERSION:
        raise VerdictError(f"the upstream's exact verdicts have version {said.get('version')!r}; {VERSION} is known.")
    head, classes = said.get("head"), said.get("classes")
    if not isinstance(head, str) or not isinstance(classes, list) or not all(isinstance(n, str) for n in classes):
        raise VerdictError("the upstream's exact verdicts do not say whose they are.")
    return Identity(head=head, classes=tuple(classes))


def read_images(params: Any, expected: Identity, count: int) -> list[tuple[list[float], bool]]:
    """Return of each of ``count`` images its probabilities in the classes' order, and whether it stands as usual.

    Raises VerdictError for anything else than that many verdicts of the expected guard.
    """
    found = read_identity(params)
    if found != expected:
        raise VerdictError("the upstream's exact verdicts are of another guard than at the start.")
    said = params[FIELD]
    images = said.get("images")
    if not isinstance(images, list) or len(images) != count:
        raise VerdictError(f"the upstream gives no exact verdicts on {count} images: {str(said.get('error'))[:200]}.")
    return [_read_image(each, expected) for each in images]


def _read_image(image: Any, expected: Identity) -> tuple[list[float], bool]:
    probs = image.get("probs") if isinstance(image, Mapping) else None
    if not isinstance(probs, Mapping) or tuple(probs) != expected.classes:
        why = image.get("error") if isinstance(image, Mapping) else None
        raise VerdictError(f"the upstream gives no exact verdict on an image: {str(why)[:200]}.")
    row = list(probs.values())
    if not is_row(row, len(expected.classes)):
        raise VerdictError("the upstream's exact verdict is not a row of probabilities.")
    return row, image.get("usual") is True
