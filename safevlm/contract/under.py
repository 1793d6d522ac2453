"""What thresholds promise under corruptions of the image, as ``manifest.json`` states it."""

from __future__ import annotations

from safevlm.contract.manifest_fields import Frozen, Name, Probability, unique

__all__ = ["UnderCorruption", "broken_promise"]


class UnderCorruption(Frozen):
    """A corruption that the promise on misses covers, at a strength (``jpeg:50``), and the rates found under it.

    Of safe images nothing is promised under it.
    """

    corruption: Name
    miss_rate: Probability
    fpr: Probability
    unsure_rate: Probability


def broken_promise(under: tuple[UnderCorruption, ...], alpha: float) -> str | None:
    """Name the first corruption under which more was missed than ``alpha``. Raises ValueError where one is repeated."""
    unique(tuple(each.corruption for each in under))
    return next(
        (f"a rate of {each.miss_rate} misses under {each.corruption}" for each in under if each.miss_rate > alpha), None
    )
