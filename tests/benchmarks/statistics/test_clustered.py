"""Images are drawn and swapped as a whole: against slow loops, other people's bootstrap, and exhaustive swapping."""

from __future__ import annotations

import itertools
import time

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import bootstrap

from benchmarks.statistics.tango import tango_bound, tango_interval
from safevlm.errors import InputError
from tests.benchmarks.statistics.one_run import cluster_bootstrap, cluster_sign_flip

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]


def data(seed: int, n: int = 240, clusters: int = 70, change: float = 0.05) -> tuple[Floats, Whole, Whole]:
    """Return differences that images share in part, strata, clusters."""
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, clusters, n)
    shared = rng.random(clusters)[cluster]
    draw = np.where(rng.random(n) < 0.5, shared, rng.random(n))
    return (draw < 0.15 + change).astype(float) - (draw > 0.85), rng.integers(0, 3, n), cluster


WEIGHTS = {0: 0.25, 1: 0.5, 2: 0.25}


def statistic(differences: Floats, strata: Whole) -> float:
    return sum(weight * float(differences[strata == s].mean()) for s, weight in WEIGHTS.items())


def test_the_interval_is_that_of_a_slow_loop_over_images() -> None:
    differences, strata, clusters = data(1)
    members = [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
    rng = np.random.default_rng(9)
    drawn = []
    for _ in range(4000):
        rows = np.concatenate([members[c] for c in rng.integers(0, len(members), len(members))])
        drawn.append(statistic(differences[rows], strata[rows]))
    found = cluster_bootstrap(differences, strata, clusters, WEIGHTS)
    assert found.estimate == pytest.approx(statistic(differences, strata))
    assert found.standard_error == pytest.approx(np.std(drawn), rel=0.05)
    # BCa moves percentiles by little where changes are many: within a tenth of the width
    width = float(np.subtract(*np.percentile(drawn, [97.5, 2.5])))
    assert found.interval == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=width / 10)
    assert found.upper == found.interval[1]


@pytest.mark.parametrize("worse", [6, 40])
def test_one_sample_an_image_gives_scipys_bca_interval(worse: int) -> None:
    differences = np.concatenate([np.ones(worse), -np.ones(3), np.zeros(400 - worse - 3)])
    reference = bootstrap((differences,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0))
    found = cluster_bootstrap(differences, np.zeros(400), np.arange(400), [1.0])
    ends = reference.confidence_interval
    assert found.interval == pytest.approx((ends.low, ends.high), abs=0.0026)  # a step of one sample is 0.0025
    assert found.standard_error == pytest.approx(reference.standard_error, rel=0.04)


def test_asking_the_same_again_about_each_image_is_no_more_data() -> None:
    differences, strata, clusters = data(2)
    once = cluster_bootstrap(differences, strata, clusters, WEIGHTS, seed=3)
    again = cluster_bootstrap(*(np.repeat(each, 4) for each in (differences, strata, clusters)), WEIGHTS, seed=3)
    assert again.interval == pytest.approx(once.interval, abs=1e-12)
    alone = cluster_bootstrap(np.repeat(differences, 4), np.repeat(strata, 4), np.arange(4 * len(strata)), WEIGHTS)
    assert alone.standard_error < 0.65 * once.standard_error  # what forgetting the images would claim


def test_order_and_names_do_not_matter_and_the_seed_decides() -> None:
    differences, strata, clusters = data(3)
    first = cluster_bootstrap(differences, strata, clusters, WEIGHTS, seed=5)
    order = np.random.default_rng(0).permutation(len(strata))
    named = np.array([f"image {c:03d}" for c in clusters])
    assert cluster_bootstrap(
        differences[order], strata[order], named[order], WEIGHTS, seed=5
    ).interval == pytest.approx(first.interval, abs=1e-12)
    assert cluster_bootstrap(differences, strata, clusters, WEIGHTS, seed=6).interval != first.interval
    assert cluster_sign_flip(differences, strata, clusters, WEIGHTS, seed=5) == cluster_sign_flip(
        differences[order], strata[order], named[order], WEIGHTS, seed=5
    )


def test_worse_and_better_are_mirrored() -> None:
    differences, strata, clusters = data(4)
    low, high = cluster_bootstrap(differences, strata, clusters, WEIGHTS).interval
    assert cluster_bootstrap(-differences, strata, clusters, WEIGHTS).interval == pytest.approx((-high, -low), abs=2e-3)


def test_no_change_has_the_width_that_tango_gives_it() -> None:
    for n in (1, 5, 285):
        found = cluster_bootstrap(np.zeros(n), np.zeros(n), np.arange(n), [1.0])
        assert found.upper == pytest.approx(tango_interval(0, 0, n)[1])
        assert found.bound == pytest.approx(tango_bound(0, 0, n))
    one_image = cluster_bootstrap(np.zeros(1000), np.zeros(1000), np.zeros(1000), [1.0])
    assert one_image.upper == pytest.approx(
        tango_interval(0, 0, 1)[1]
    )  # a thousand questions about one image prove little


def test_a_stratum_that_a_draw_lacks_makes_no_nan() -> None:
    differences = np.array([1.0, 0.0, 0.0, -1.0, 0.5])
    found = cluster_bootstrap(differences, [0, 0, 1, 1, 2], [0, 1, 2, 3, 4], [0.3, 0.3, 0.4])
    assert np.isfinite([*found.interval, found.standard_error]).all()
    assert -1 <= found.interval[0] <= found.estimate <= found.upper <= 1
    never = cluster_bootstrap(np.zeros(60), np.arange(60), np.arange(60), np.full(60, 1 / 60))
    assert never.interval == pytest.approx((-1.0, 1.0))  # 60 strata of one image each: no draw has them all


def test_swapping_is_exhaustive_swapping() -> None:
    for seed in range(4):
        differences, strata, clusters = data(seed, n=40, clusters=10, change=0.2)
        p = cluster_sign_flip(differences, strata, clusters, WEIGHTS, draws=20_000)
        seen = abs(statistic(differences, strata))
        names = np.unique(clusters)
        as_far = [
            abs(statistic(differences * np.array(signs)[np.searchsorted(names, clusters)], strata)) >= seen - 1e-12
            for signs in itertools.product((1, -1), repeat=len(names))
        ]
        assert p == pytest.approx(np.mean(as_far), abs=0.015)


def test_swapping_keeps_its_level_where_questions_share_an_image() -> None:
    rng = np.random.default_rng(7)
    clusters = np.repeat(np.arange(60), 5)
    found = []
    for _ in range(400):
        differences = np.repeat(rng.choice([-1.0, 0.0, 1.0], 60, p=[0.1, 0.8, 0.1]), 5)
        found.append(cluster_sign_flip(differences, np.zeros(300), clusters, [1.0], draws=199))
    assert np.mean(np.array(found) <= 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    forgot = [cluster_sign_flip(d, np.zeros(300), np.arange(300), [1.0], draws=199) for d in _shared(rng)]
    assert np.mean(np.array(forgot) <= 0.05) > 0.15  # as 300 samples it is not kept, and this test can tell


def _shared(rng: np.random.Generator) -> list[Floats]:
    return [np.repeat(rng.choice([-1.0, 0.0, 1.0], 60, p=[0.1, 0.8, 0.1]), 5) for _ in range(150)]


def test_nothing_changed_has_p_1_and_the_smallest_p_is_not_0() -> None:
    assert cluster_sign_flip(np.zeros(20), np.zeros(20), np.arange(20), [1.0]) == 1.0
    assert cluster_sign_flip(np.ones(50), np.zeros(50), np.arange(50), [1.0], draws=999) == 1 / 1000


def test_scores_between_0_and_1_have_an_interval_that_covers() -> None:
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(80), 3)
    covered = []
    for seed in range(200):
        differences = np.clip(np.repeat(rng.normal(0.02, 0.1, 80), 3) + rng.normal(0, 0.1, 240), -1, 1)
        zeros = np.zeros(len(differences))
        low, high = cluster_bootstrap(differences, zeros, clusters, [1.0], draws=400, seed=seed).interval
        covered.append(low <= 0.02 <= high)
    assert 0.90 < np.mean(covered) < 0.995


def test_4031_samples_on_1791_images_take_less_than_2_seconds() -> None:
    rng = np.random.default_rng(0)
    differences = rng.choice([-1.0, 0.0, 1.0], 4031, p=[0.06, 0.88, 0.06])
    began = time.process_time()
    cluster_bootstrap(differences, rng.integers(0, 5, 4031), rng.integers(0, 1791, 4031), np.full(5, 0.2))
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("differences", "strata", "clusters", "weights", "told"),
    [
        ([0.0], [0, 0], [0, 1], [1.0], "1 differences for 2 samples"),
        ([], [], [], [], "each sample needs one of both"),
        ([0.0, 0.0], [0, 1], [0, 1], {0: 1.0}, "stratum 1 has no weight"),
        ([0.0, 0.0], [0, 1], [0, 1], [1.0], "each stratum needs one"),
    ],
)
def test_what_does_not_fit_is_refused(
    differences: list[float], strata: list[int], clusters: list[int], weights: object, told: str
) -> None:
    with pytest.raises(InputError, match=told):
        cluster_bootstrap(differences, strata, clusters, weights)  # type: ignore[arg-type]


def test_an_interval_of_one_draw_is_refused() -> None:
    with pytest.raises(InputError, match="Give at least two"):
        cluster_bootstrap([0.0], [0], [0], [1.0], draws=1)
