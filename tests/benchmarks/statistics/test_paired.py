"""One line's statistics are those of its parts, and dependence within images is never ignored."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.statistics.mcnemar import mcnemar_exact
from benchmarks.statistics.paired import paired_statistics
from benchmarks.statistics.tango import tango_bound, tango_interval
from safevlm.errors import InputError
from tests.benchmarks.statistics.one_run import cluster_bootstrap, cluster_sign_flip

RNG = np.random.default_rng(0)
IMAGES = np.array([f"image {i:02d}" for i in RNG.integers(0, 80, 300)])
TYPES = np.array(["SSU", "USU", "UUU"])[RNG.integers(0, 3, 300)]
BEFORE = (RNG.random(300) < 0.2).astype(float)
AFTER = np.where(RNG.random(300) < 0.15, 1 - BEFORE, BEFORE)


def test_a_share_has_tangos_interval_the_bootstrap_beside_it_and_the_larger_p() -> None:
    found = paired_statistics(BEFORE, AFTER, clusters=IMAGES)
    worse, better = int((AFTER > BEFORE).sum()), int((AFTER < BEFORE).sum())
    assert (found.worse, found.better) == (worse, better)
    assert (found.before, found.after) == pytest.approx((BEFORE.mean(), AFTER.mean()))
    assert found.change == pytest.approx((worse - better) / 300)
    assert found.interval == tango_interval(worse, better, 300)
    zeros = np.zeros(300, dtype=np.int64)
    assert found.bootstrap == pytest.approx(cluster_bootstrap(AFTER - BEFORE, zeros, IMAGES, [1.0]).interval)
    swapped = cluster_sign_flip(AFTER - BEFORE, zeros, IMAGES, [1.0])
    assert found.p_harm == max(swapped, mcnemar_exact(worse, better))
    assert found.method.startswith("Tango")
    images = cluster_bootstrap(AFTER - BEFORE, zeros, IMAGES, [1.0]).bound
    assert found.uppers == pytest.approx((tango_bound(worse, better, 300), images))
    assert found.uppers[0] < found.interval[1] and found.uppers[1] < found.bootstrap[1]  # one-sided, so nearer


def test_a_mean_over_types_weighs_types_alike_and_has_the_bootstraps_interval() -> None:
    found = paired_statistics(BEFORE, AFTER, clusters=IMAGES, strata=TYPES)
    kinds = np.unique(TYPES)
    assert found.before == pytest.approx(np.mean([BEFORE[kind == TYPES].mean() for kind in kinds]))
    assert found.after == pytest.approx(np.mean([AFTER[kind == TYPES].mean() for kind in kinds]))
    assert found.change == pytest.approx(found.after - found.before)
    codes = np.searchsorted(kinds, TYPES)
    assert found.interval == found.bootstrap
    assert found.interval == pytest.approx(cluster_bootstrap(AFTER - BEFORE, codes, IMAGES, [1 / 3] * 3).interval)
    assert "bootstrap" in found.method


def test_scores_that_are_no_yes_or_no_have_the_bootstraps_interval() -> None:
    found = paired_statistics(BEFORE * 0.5, AFTER * 0.75, clusters=IMAGES)
    assert found.interval == found.bootstrap
    assert found.worse == int((AFTER * 0.75 > BEFORE * 0.5).sum())


def test_questions_that_repeat_an_image_prove_and_accuse_less() -> None:
    repeated = [np.repeat(each, 5) for each in (BEFORE, AFTER)]
    own = paired_statistics(*repeated, clusters=np.repeat(np.arange(300), 5))
    alone = paired_statistics(*repeated, clusters=np.arange(1500))
    assert own.interval == alone.interval  # Tango knows of no images, the others do
    assert own.bootstrap[1] > alone.bootstrap[1]
    assert own.p_harm >= alone.p_harm
    assert own.resolvable > 1.5 * alone.resolvable


@pytest.mark.parametrize("strata", [None, TYPES])
def test_equal_runs_have_p_1_and_prove_what_so_many_images_can(strata: np.ndarray | None) -> None:  # type: ignore[type-arg]
    found = paired_statistics(BEFORE, BEFORE, clusters=IMAGES, strata=strata)
    assert (found.change, found.worse, found.better, found.p_harm) == (0, 0, 0, 1)
    assert found.interval[1] > 0
    least = tango_bound(0, 0, 80) / (1 if strata is None else 2)
    assert min(found.uppers[1], found.resolvable) >= least


def test_the_same_seed_gives_the_same_and_confidence_widens() -> None:
    one = paired_statistics(BEFORE, AFTER, clusters=IMAGES, strata=TYPES, seed=1)
    assert one == paired_statistics(BEFORE, AFTER, clusters=IMAGES, strata=TYPES, seed=1)
    assert one != paired_statistics(BEFORE, AFTER, clusters=IMAGES, strata=TYPES, seed=2)
    wide = paired_statistics(BEFORE, AFTER, clusters=IMAGES, strata=TYPES, confidence=0.99, seed=1)
    assert wide.interval[0] < one.interval[0] < one.interval[1] < wide.interval[1]


def test_what_is_no_badness_is_refused() -> None:
    with pytest.raises(InputError, match=r"from 0 \(good\) to 1 \(bad\)"):
        paired_statistics([0.0, np.nan], [0.0, 1.0], clusters=[0, 1])
    with pytest.raises(InputError, match="each sample needs one number in both runs"):
        paired_statistics([0.0, 1.0], [0.0], clusters=[0, 1])
    with pytest.raises(InputError, match="each sample needs one of both"):
        paired_statistics([0.0, 1.0], [0.0, 1.0], clusters=[0])
    with pytest.raises(InputError, match="each sample needs one of both"):
        paired_statistics([], [], clusters=[])
