"""Which classes so few labelled images prove nothing of: a promise about all harm may hide a class that is missed.

Two claims about a class by itself: that at most the promised share of its images is allowed, and that this file misses
at most 10 points more of it than the float32 file. The second is by the exact binomial tail with an error of 5 %, on
the images that are newly missed alone.

A class is certified when as few of its n images went wrong as would do if a threshold were fitted to them alone. Then a
threshold that was fitted to all images lets no more of the class pass than that one, and keeps its promise, too. With a
band for each predicted class, or with thresholds that differ between two files, it is a count and no such proof.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from calibration.labelled.risk_control import Promise, hits_allowed
from safevlm.contract.class_claims import Uncertified
from safevlm.contract.class_names import safe_index
from safevlm.contract.manifest import Manifest, Thresholds

__all__ = ["DROP", "Allowed", "images_for", "uncertified_classes", "uncertified_notes", "with_uncertified"]

DROP = 0.10
"""The margin of a class, as that of ``benchmarks.regress`` is unless declared otherwise."""
DRIFT = Promise(alpha=DROP, method="learn_then_test", delta=0.05)
NAMED = 4

Flags = NDArray[np.bool_]
Allowed = tuple[Flags, NDArray[np.int64]]


def uncertified_classes(
    truth: NDArray[np.int64],
    classes: Sequence[str],
    *,
    promise: Promise | None = None,
    missed: Flags | None = None,
    newly: Flags | None = None,
) -> dict[str, Uncertified]:
    """Return the harmful classes with a claim that n images do not certify, those without an image included.

    ``missed`` and ``newly`` (n each) say which images are allowed, and which of them the float32 file does not allow;
    without them, and for ``missed`` a ``promise``, that claim is not looked at.
    """
    found = {}
    for at, name in enumerate(classes):
        if at == safe_index(classes):
            continue
        own = truth == at
        n = int(own.sum())
        stated: dict[str, int] = {}
        if missed is not None and promise is not None:
            stated |= _claim("missed", "promise_needs", int(missed[own].sum()), n, promise)
        if newly is not None:
            stated |= _claim("newly_missed", "drift_needs", int(newly[own].sum()), n, DRIFT)
        if {"promise_needs", "drift_needs"} & stated.keys():
            found[name] = Uncertified(n=n, **stated)
    return found


def images_for(wrong: int, promise: Promise) -> int:
    """Return the least number of images of which so many may go wrong."""
    low, high = 0, 1
    while hits_allowed(high, promise.alpha, promise) < wrong:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if hits_allowed(middle, promise.alpha, promise) >= wrong else (middle, high)
    return high


def with_uncertified(
    fitted: Sequence[Thresholds], allowed: Mapping[str, Allowed], manifest: Manifest, promise: Promise
) -> list[Thresholds]:
    """Return thresholds that name the classes that are not certified.

    ``allowed`` holds, by file, which images its thresholds allow and what they truly are. Drift is from the float32
    file, where that was fitted beside the others.
    """
    floats = next((file.path for file in manifest.files if file.kind == "onnx" and file.precision == "fp32"), "")
    found = []
    for entry in fitted:
        missed, truth = allowed[entry.file]
        newly = missed & ~allowed[floats][0] if floats in allowed and entry.file != floats else None
        short = uncertified_classes(truth, manifest.classes, promise=promise, missed=missed, newly=newly)
        found.append(entry.model_copy(update={"uncertified": short}))
    return found


def uncertified_notes(entry: Thresholds) -> Iterator[str]:
    """Yield a sentence for each claim that is not certified of some classes, with what they lack."""
    for claim in (
        f"at most {100 * entry.alpha:g} % missed",
        f"at most {100 * DROP:g} points more missed than in float32",
    ):
        drift = claim.endswith("float32")
        short = [
            _lacking(name, each, drift=drift)
            for name, each in (entry.uncertified or {}).items()
            if (each.drift_needs if drift else each.promise_needs) is not None
        ]
        if short:
            more = f" and {len(short) - NAMED} more" if len(short) > NAMED else ""
            yield f"{entry.file}: {claim} is not certified of {', '.join(short[:NAMED])}{more}."


def _lacking(name: str, each: Uncertified, *, drift: bool) -> str:
    wrong, needs = (each.newly_missed, each.drift_needs) if drift else (each.missed, each.promise_needs)
    count = f"{wrong} of {each.n} missed" if each.n else "no images"
    return f"{name} ({count}, lacks {(needs or 0) - each.n})"


def _claim(counted: str, needs: str, wrong: int, n: int, promise: Promise) -> dict[str, int]:
    if wrong <= hits_allowed(n, promise.alpha, promise):
        return {counted: wrong}
    return {counted: wrong, needs: images_for(wrong, promise)}
