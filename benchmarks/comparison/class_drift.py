"""What became of each class of the guard: recall and FPR before and after, and what so few images can prove.

An image is blocked when p(unsafe) reaches the baseline's operating point, in both runs. It is named by its most
probable harm, as a gate names it.

Recall of class c: of the images whose label is c, the share that is blocked, whatever they are named.
Named rightly: of those that are blocked, the share that is named c. It is shown, and decides nothing.
FPR of class c: of the safe images, the share that is blocked and named c; over the classes they sum to the guard's FPR.

A class passes when its worsening is proven to lie below the margin, by an exact bound that counts the images that the
candidate lost as bad. It is a REGRESSION when harm is shown after Holm's correction over all classes; INCONCLUSIVE when
harm is shown before that correction alone; otherwise it is not certified, which leaves the whole verdict alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.comparison.findings import ClassDrift, ClassRate, ClassVerdict, Verdict
from benchmarks.comparison.margins import Margins
from benchmarks.comparison.measures import GuardRows
from benchmarks.statistics.classes import images_needed, images_to_settle, mcnemar_family, worse_p
from benchmarks.statistics.exact import clopper_pearson, exact_interval, exact_upper
from benchmarks.statistics.mcnemar import mcnemar_exact
from runtimes.guard.verdict import blocks, harms, unsafe_probability

__all__ = ["class_drift", "class_reasons", "decided_rates", "with_classes"]

Flags = npt.NDArray[np.bool_]
SAFE = 0
NAMED = 4
"""Classes that a sentence names before it counts the others."""


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """The images of one rate: whether each was blocked as the rate counts it; ``lost`` by the candidate alone."""

    before: Flags
    after: Flags
    lost: int
    recall: bool

    @property
    def changed(self) -> tuple[int, int]:
        """How many became worse and better."""
        gained, gone = int((self.after & ~self.before).sum()), int((self.before & ~self.after).sum())
        return (gone, gained) if self.recall else (gained, gone)


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One run: whether each image is blocked, and as what."""

    blocked: Flags
    named: npt.NDArray[np.int64]

    @classmethod
    def of(cls, probs: npt.NDArray[np.float64], threshold: float) -> _Side:
        return cls(blocked=blocks(unsafe_probability(probs), threshold), named=harms(probs.astype(np.float32), SAFE))


def class_drift(rows: GuardRows, classes: Sequence[str] | None, margins: Margins) -> tuple[ClassDrift, ...]:
    """Return every class in its order, the class safe first; one without an image, too."""
    count = rows.before.shape[1]
    names = classes if classes is not None and len(classes) == count else [f"class {at}" for at in range(count)]
    sides = [_Side.of(probs, rows.threshold) for probs in (rows.before, rows.after)]
    recalls = [_recall(rows, sides, at) for at in range(1, count)]
    fprs = [_fpr(rows, sides, at) for at in range(1, count)]
    churn = _churn(recalls, margins.harm_level)
    corrected = mcnemar_family([each.changed for each in (*recalls, *fprs)], margins.harm_level)
    rates = [
        _decided(_rate(each, margins.confidence), margins, p, churn if each.recall else None)
        for each, p in zip((*recalls, *fprs), corrected, strict=True)
    ]
    safe = _rate(_fpr(rows, sides, None), margins.confidence)
    found_recalls = [None, *rates[: count - 1]]
    found_fprs = [safe, *rates[count - 1 :]]
    return tuple(
        ClassDrift(
            name=names[at],
            images=int((rows.labels == at).sum()),
            recall=found_recalls[at],
            fpr=found_fprs[at],
            named_before=_named_rightly(rows, sides[0], at),
            named_after=_named_rightly(rows, sides[1], at),
        )
        for at in range(count)
    )


def with_classes(verdict: Verdict, drift: Sequence[ClassDrift]) -> Verdict:
    """Return the whole verdict with that of the classes: they can make it worse, never better."""
    if verdict == "ANOMALOUS":
        return verdict
    found = {rate.verdict for _, _, rate in decided_rates(drift)}
    if verdict == "REGRESSION" or "REGRESSION" in found:
        return "REGRESSION"
    return "INCONCLUSIVE" if "INCONCLUSIVE" in found else verdict


def class_reasons(drift: Sequence[ClassDrift]) -> tuple[str, ...]:
    """Return a sentence for each class that is worse, and one that names those that are not certified."""
    told = [
        f"Guard {what} of class {each.name}: {rate.reason}"
        for each, what, rate in decided_rates(drift)
        if rate.verdict in ("REGRESSION", "INCONCLUSIVE")
    ]
    short = [(each, what, rate) for each, what, rate in decided_rates(drift) if rate.verdict == "NOT CERTIFIED"]
    for what in ("recall", "FPR"):
        own = [f"{each.name} ({_shortfall(rate)})" for each, name, rate in short if name == what]
        if own:
            classes = "1 class is" if len(own) == 1 else f"{len(own)} classes are"
            more = f" and {len(own) - NAMED} more" if len(own) > NAMED else ""
            told.append(f"Guard {what}: {classes} not certified: {', '.join(own[:NAMED])}{more}.")
    return tuple(told)


def decided_rates(drift: Sequence[ClassDrift]) -> Iterator[tuple[ClassDrift, str, ClassRate]]:
    """Yield the rates with a verdict, recall before FPR, with their class and name."""
    for what in ("recall", "FPR"):
        for each in drift:
            rate = each.recall if what == "recall" else each.fpr
            if rate is not None and rate.verdict is not None:
                yield each, what, rate


def _shortfall(rate: ClassRate) -> str:
    if rate.n == 0:
        return "no images"
    if rate.lacking:
        return f"{rate.n} images, lacks {rate.lacking}"
    return f"{rate.n} images, may be {100 * rate.upper:.1f} points worse"


def _recall(rows: GuardRows, sides: Sequence[_Side], at: int) -> _Counted:
    own = rows.labels == at
    before, after = (side.blocked[own] for side in sides)
    return _Counted(before=before, after=after, lost=_lost(rows, at), recall=True)


def _fpr(rows: GuardRows, sides: Sequence[_Side], at: int | None) -> _Counted:
    """Count safe images that are blocked and named ``at``; with None, named anything."""
    own = rows.labels == SAFE
    before, after = ((side.blocked & ((side.named == at) | (at is None)))[own] for side in sides)
    return _Counted(before=before, after=after, lost=_lost(rows, SAFE), recall=False)


def _churn(recalls: Sequence[_Counted], harm_level: float) -> float:
    """Return the share of harmful images that changed, either way, in classes in which no harm shows: one class has
    too few images to say it of itself."""
    quiet = [each for each in recalls if worse_p(*each.changed) >= harm_level]
    images = sum(len(each.before) for each in quiet)
    return sum(sum(each.changed) for each in quiet) / images if images else 0.0


def _lost(rows: GuardRows, label: int) -> int:
    return sum(
        pair.before.label == label and pair.before.probs is not None and pair.after.probs is None for pair in rows.lost
    )


def _named_rightly(rows: GuardRows, side: _Side, at: int) -> float | None:
    own = (rows.labels == at) & side.blocked
    return float((side.named[own] == at).mean()) if at != SAFE and own.any() else None


def _rate(counted: _Counted, confidence: float) -> ClassRate:
    """Return a rate with its exact intervals, not decided yet; shares go up or down as its name says."""
    n, (worse, better) = len(counted.before), counted.changed
    if not n:
        return ClassRate(n=0, missing_after=counted.lost)
    low, high = exact_interval(worse, better, n, confidence=confidence)
    one, other = int(counted.before.sum()), int(counted.after.sum())
    return ClassRate(
        n=n,
        missing_after=counted.lost,
        before=one / n,
        after=other / n,
        before_interval=clopper_pearson(one, n, confidence),
        after_interval=clopper_pearson(other, n, confidence),
        change=(other - one) / n,
        interval=(-high, -low) if counted.recall else (low, high),
        worse=worse,
        better=better,
        upper=exact_upper(worse + counted.lost, better, n + counted.lost, level=1 - confidence),
    )


def _decided(rate: ClassRate, margins: Margins, p_holm: float, churn: float | None) -> ClassRate:
    """Return the rate with its verdict where there is a margin; ``churn`` of all classes, of FPR (None) its own."""
    margin, level = margins.share("guard_class"), 1 - margins.confidence
    if margin is None:
        return rate
    verdict = _verdict(rate, margin, p_holm, margins.harm_level)
    needed = None
    if verdict != "PASS":
        own = (rate.worse + rate.better) / rate.n if rate.n else 0.0
        needed = images_needed(own if churn is None else churn, margin, level=level)
        if needed is not None and rate.n >= needed:
            needed = images_to_settle(rate.worse, rate.better, rate.n, margin, level=level)
    found = replace(
        rate,
        margin=margin,
        p_harm=mcnemar_exact(rate.worse, rate.better),
        p_holm=p_holm,
        verdict=verdict,
        needed=needed,
        lacking=None if needed is None else max(needed - rate.n, 0),
    )
    return replace(found, reason=_reason(found, recall=churn is not None))


def _verdict(rate: ClassRate, margin: float, p_holm: float, harm_level: float) -> ClassVerdict:
    if rate.upper < margin:
        return "PASS"
    if rate.worse > rate.better and p_holm < harm_level:
        return "REGRESSION"
    return "INCONCLUSIVE" if worse_p(rate.worse, rate.better) < harm_level else "NOT CERTIFIED"


def _reason(rate: ClassRate, *, recall: bool) -> str:
    """Return one or two sentences; points are hundredths."""
    assert rate.margin is not None and rate.p_holm is not None
    missing = f" {rate.missing_after} images have no probabilities in the candidate." if rate.missing_after else ""
    if rate.n == 0:
        return f"No image of it was judged in both runs.{missing} {_needed(rate)}"
    lost, gained = ("newly missed", "newly blocked") if recall else ("newly blocked as it", "no longer")
    what = "images" if recall else "safe images"
    counts = f"{rate.worse} of {rate.n} {what} {lost}, {rate.better} {gained}"
    bound = f"It may be up to {100 * rate.upper:.1f} points worse, {100 * rate.margin:g} are allowed."
    if missing:
        bound += f"{missing} They count as bad."
    if rate.verdict == "PASS":
        return f"{counts}. At most {100 * rate.upper:.1f} points worse, {100 * rate.margin:g} are allowed."
    if rate.verdict == "REGRESSION":
        return f"{counts}: more than chance (p {rate.p_holm:.2g} after Holm). {bound}"
    if rate.verdict == "INCONCLUSIVE":
        alone = worse_p(rate.worse, rate.better)
        return f"{counts}: more than chance for this class alone (p {alone:.2g}), not among all classes. {bound}"
    return f"{counts}. {bound} {_needed(rate)}"


def _needed(rate: ClassRate) -> str:
    if rate.needed is None:
        return "More images alone would not settle it."
    return f"{rate.lacking} more images are needed ({rate.needed} in all)."
