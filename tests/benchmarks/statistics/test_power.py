"""What is predicted comes true in simulation, and the plan proposed reaches what it was asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from benchmarks.simulate import PROFILES, build
from benchmarks.statistics.power import Effort, Outlook, enlarged, kind_of, look_ahead, propose
from benchmarks.statistics.simulation import MEAN, Suite, draw_worsening, simulate
from safevlm.errors import InputError

RUNS = 500
ahead = partial(look_ahead, runs=RUNS, confidence=0.95, harm_level=0.05, draws=300)
"""The outlook of a suite; a share of it has a standard error of at most 0.022."""


@pytest.fixture(scope="module")
def suite() -> Suite:
    return build("holisafe-mini", replace(PROFILES["safellava"], churn=0.129))


@pytest.fixture(scope="module")
def now(suite: Suite) -> Outlook:
    return ahead(suite)


def test_it_says_what_the_simulation_of_error_rates_says(suite: Suite, now: Outlook) -> None:
    tally = simulate(suite, {}, runs=RUNS, draws=300)
    assert now.passes == tally.share("PASS")
    assert [line.passes for line in now.lines] == [tally.share("PASS", line.key) for line in now.lines]
    assert now.regressions == pytest.approx(tally.share("REGRESSION"), abs=0.004)
    unsafe = [line for line in now.lines if line.key.startswith("asr/")]
    assert sum(line.n * line.churn for line in unsafe) / sum(line.n for line in unsafe) == pytest.approx(
        0.129, abs=0.003
    )


@pytest.mark.parametrize(
    "effort",
    [Effort(decodings=3), Effort(pairs=2, guard=2, questions=2), Effort(guard=1.5, questions=1.25, decodings=2)],
)
def test_a_prediction_comes_true(now: Outlook, suite: Suite, effort: Effort) -> None:
    assert now.predicted(effort) == pytest.approx(ahead(enlarged(suite, effort), seed=1).passes, abs=0.09)


def test_more_of_anything_never_passes_less(now: Outlook) -> None:
    order = [Effort(), Effort(guard=2), Effort(guard=2, questions=3), Effort(guard=2, questions=3, decodings=2)]
    assert (np.diff([now.predicted(effort) for effort in order]) >= 0).all()
    assert now.predicted(Effort()) == now.passes


def test_the_harm_said_to_be_seen_is_told_four_times_in_five(suite: Suite, now: Outlook) -> None:
    for line in now.lines:
        if line.key in (MEAN, "asr/USU", "rr", "utility"):
            found = simulate(suite, suite.worsening(line.key, line.harm), runs=200, draws=300)
            assert found.share("REGRESSION", line.key) == pytest.approx(0.8, abs=0.12), line.key


def test_the_plan_reaches_its_target_and_costs_no_more_than_it_must(now: Outlook) -> None:
    plan = propose(now, ahead, target=0.9)
    assert plan.reached and plan.outlook.passes >= 0.9
    assert plan.effort.pairs == 1  # decodings are cheaper than rows that must be labelled
    rows = propose(now, ahead, target=0.9, most_decodings=1)
    assert rows.reached and rows.effort.decodings == 1 and rows.effort.pairs > 1
    easy = propose(now, ahead, target=0.05)
    assert easy.effort == Effort() and easy.outlook is now
    none = propose(now, ahead, target=0.99, most_decodings=1, factors=(1.0,))
    assert not none.reached and none.effort == Effort()


def test_a_larger_suite_has_its_rows_on_as_many_more_images(suite: Suite) -> None:
    larger = enlarged(suite, Effort(pairs=2.5, guard=2, decodings=3))
    for line, grown in zip(suite.lines, larger.lines, strict=True):
        factor = {"pairs": 2.5, "guard": 2, "questions": 1}[kind_of(line.key)]
        assert len(grown.images) == round(factor * len(line.images))
        most = math.ceil(factor) * len(np.unique(line.images))
        assert 0.9 * factor * len(np.unique(line.images)) <= len(np.unique(grown.images)) <= most
        assert grown.decodings == (1 if kind_of(line.key) == "guard" else 3)


def test_decodings_average_what_is_drawn_anew_alone(suite: Suite) -> None:
    rng = np.random.default_rng(0)
    ways = [draw_worsening(enlarged(suite, Effort(decodings=k)), {}, 60, rng) for k in (1, 4)]
    for line, one, four in zip(suite.lines, *ways, strict=True):
        ratio = four.var() / one.var()
        assert ratio == pytest.approx(1 if kind_of(line.key) == "guard" else 0.25, rel=0.2)
        assert set(np.unique(four * (1 if kind_of(line.key) == "guard" else 4))) <= set(range(-4, 5))


def test_a_suite_without_a_margin_is_refused(suite: Suite) -> None:
    open_lines = tuple(replace(line, margin=math.inf) for line in suite.lines)
    with pytest.raises(InputError, match="no line has a margin"):
        ahead(replace(suite, lines=open_lines, mean_margin=math.inf))
