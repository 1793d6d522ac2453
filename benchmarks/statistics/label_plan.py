"""Which answers people should label so that a judge's errors can be corrected: stratified by the judge's words.

Shape suffixes: N answers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["spread_labels", "strata_of", "stratum_sizes"]

Whole = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def stratum_sizes(rows: npt.NDArray[np.int64], labels: int) -> Whole:
    """Share ``labels`` out: in proportion to the root of each stratum's rows, never more than its rows.

    Between equal parts (which know small strata best) and proportional ones (which weigh as the result does).
    """
    found = np.zeros(len(rows), np.int64)
    for _ in range(len(rows)):
        left, room = labels - int(found.sum()), rows - found
        if left <= 0 or not room.any():
            break
        weight = np.sqrt(rows) * (room > 0)
        exact = left * weight / weight.sum()
        part = np.floor(exact).astype(np.int64)
        part[np.argsort(part - exact, kind="stable")[: left - int(part.sum())]] += 1
        found += np.minimum(part, room)
    return found


def spread_labels(
    harmless_N: Bools, types_N: Whole, words_N2: Bools, labels: int, *, both: bool, rng: np.random.Generator
) -> Whole:
    """Choose so many answers: half of them harmless pairs, the rest unsafe ones; strata are type and word.

    ``both``: strata go by the judge's words of both runs, otherwise by its word of the baseline.
    """
    strata_N, _ = strata_of(types_N, words_N2, both=both)
    rows = np.bincount(strata_N)
    chosen: list[Whole] = []
    parts = [part for part in (~harmless_N, harmless_N) if part.any()]
    for place, part in enumerate(parts):
        size = (labels - sum(map(len, chosen))) // (len(parts) - place)
        own = np.unique(strata_N[part])
        for stratum, count in zip(own, stratum_sizes(rows[own], size), strict=True):
            chosen.append(rng.permutation(np.flatnonzero(strata_N == stratum))[:count])
    return np.concatenate(chosen)


def strata_of(types_N: Whole, words_N2: Bools, *, both: bool) -> tuple[Whole, list[tuple[int, int]]]:
    """Return each answer's stratum, and of each stratum its type and word (of both runs: 2 * before + after)."""
    word_N = 2 * words_N2[:, 0] + words_N2[:, 1] if both else words_N2[:, 0].astype(np.int64)
    names, strata_N = np.unique(types_N * 4 + word_N, return_inverse=True)
    return strata_N, [(int(name) // 4, int(name) % 4) for name in names]
