"""What a bundle says of classes of which labelled images prove less than of all harm together."""

from __future__ import annotations

from pydantic import model_validator

from safevlm.contract.manifest_fields import Count, Frozen, Positive

__all__ = ["Uncertified"]


class Uncertified(Frozen):
    """A harmful class, and which claim its ``n`` labelled images cannot carry.

    ``promise_needs``: the promise on misses is not certified for this class by itself; so many images of it, without
    another miss, would do. ``drift_needs``: nor is it that this file misses at most 10 points more of it than the
    float32 file does; so many, without another one newly missed, would do. None where the claim is certified or was
    not looked at, as of the float32 file.
    """

    n: Count
    missed: Count | None = None
    """Images that the thresholds allow."""
    promise_needs: Positive | None = None
    newly_missed: Count | None = None
    """Images that this file misses and the float32 file does not."""
    drift_needs: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> Uncertified:
        if max(self.missed or 0, self.newly_missed or 0) > self.n:
            raise ValueError(
                f"missed ({self.missed}) and newly_missed ({self.newly_missed}) must not exceed n ({self.n})"
            )
        if self.promise_needs is None and self.drift_needs is None:
            raise ValueError("a class that is not certified states how many images would do")
        return self
