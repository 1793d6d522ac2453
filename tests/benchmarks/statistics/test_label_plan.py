"""Labels are shared out whole, over all strata, and never more than there are answers."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.statistics.label_plan import spread_labels, strata_of, stratum_sizes


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=8), st.integers(0, 900))
def test_sizes_add_up_and_fit(rows: list[int], labels: int) -> None:
    found = stratum_sizes(np.array(rows), labels)
    assert (found >= 0).all() and (found <= rows).all()
    assert found.sum() == min(labels, sum(rows))


def test_small_strata_get_more_than_their_share_and_half_goes_to_harmless_pairs() -> None:
    rng = np.random.default_rng(0)
    types = np.repeat([0, 1, 2], [300, 900, 400])
    words = rng.random((1600, 2)) < 0.1
    chosen = spread_labels(types == 2, types, words, 200, both=True, rng=rng)
    assert len(np.unique(chosen)) == 200 and (types[chosen] == 2).sum() == 100
    strata, names = strata_of(types, words, both=True)
    assert len(names) == 12
    taken, there = np.bincount(strata[chosen], minlength=12), np.bincount(strata)
    shares = taken / there
    assert shares[names.index((1, 3))] > 2 * shares[names.index((1, 0))] > 0
