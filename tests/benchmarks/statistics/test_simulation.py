"""The verdict keeps its error rates where the truth is known, a broken rule does not, and the command tells both."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.simulate import PROFILES, build, main, measure_errors, summary
from benchmarks.statistics.decision import LineVerdict, decide
from benchmarks.statistics.paired import line_statistics, paired_statistics
from benchmarks.statistics.simulation import (
    MEAN,
    Suite,
    draw_worsening,
    keep_for_churn,
    simulate,
    spread_over,
    where_of,
)
from safevlm.errors import InputError

RUNS = 400
NOISE = 3 * math.sqrt(0.05 * 0.95 / RUNS)


@pytest.fixture(scope="module")
def suite() -> Suite:
    return build("holisafe-mini", replace(PROFILES["safellava"], wrong=0.1, wrong_churn=0.03))


def test_a_truth_at_the_margin_passes_at_most_one_time_in_twenty(suite: Suite) -> None:
    for key in (MEAN, "asr/USU", "rr", "guard_recall"):
        found = simulate(suite, suite.worsening(key, suite.margin(key)), runs=RUNS, draws=500)
        assert found.share("PASS", key) < 0.05 + NOISE
        assert found.share("PASS") < 0.05 + NOISE


def test_equal_runs_are_told_harm_at_most_one_time_in_twenty(suite: Suite) -> None:
    found = simulate(suite, {}, runs=RUNS, draws=500)
    assert found.share("REGRESSION") < 0.05 + NOISE
    assert found.share("PASS", "asr/UUU") > 0.9  # and not by never telling anything
    harmed = simulate(suite, suite.worsening(MEAN, 0.05), runs=50, draws=500)
    assert harmed.share("REGRESSION") > 0.9


def pass_unless_proven_worse(**given: Any) -> LineVerdict:
    """The mistake that the margin is there against: no significant harm is taken for no harm."""
    return "REGRESSION" if given["change"] > 0 and given["p_holm"] < given["alpha"] else "PASS"


def pass_on_the_estimate(**given: Any) -> LineVerdict:
    return "PASS" if given["change"] < given["margin"] else decide(**given)


def accuse_without_testing(**given: Any) -> LineVerdict:
    told = decide(**given)
    return "REGRESSION" if told == "INCONCLUSIVE" and given["change"] > 0 else told


def test_broken_rules_are_found_out(suite: Suite) -> None:
    at_margin = suite.worsening("rr", suite.margin("rr"))
    for rule in (pass_unless_proven_worse, pass_on_the_estimate):
        assert simulate(suite, at_margin, runs=60, draws=200, rule=rule).share("PASS", "rr") > 0.3
    assert simulate(suite, {}, runs=60, draws=200, rule=accuse_without_testing).share("REGRESSION") > 0.5


def test_without_images_the_bound_of_repeated_questions_is_too_low() -> None:
    """The clustered bound is needed: where every question about an image changes with it, Tango's alone passes."""
    base = build("holisafe-mini", PROFILES["tiny"], image_share=1.0)
    utility = next(line for line in base.lines if line.key == "utility")
    images = np.repeat(np.arange(100), 12)
    keep = keep_for_churn([0.3], [1], 0.3)
    own = Suite(lines=(replace(utility, images=images, rate=0.3, keep=keep, margin=0.1),), mean_margin=1, image_share=1)
    at = own.worsening("utility", 0.1)
    assert simulate(own, at, runs=RUNS, draws=500).share("PASS", "utility") < 0.05 + NOISE
    tango_only = simulate(
        own, at, runs=RUNS, draws=200, rule=lambda **given: decide(**{**given, "uppers": given["uppers"][:1]})
    )
    assert tango_only.share("PASS", "utility") > 0.1


def test_the_simulation_decides_by_the_statistics_of_the_report(suite: Suite) -> None:
    line = next(each for each in suite.lines if each.key == "asr/USU")
    drawn = draw_worsening(suite, {}, 3, np.random.default_rng(1))[suite.lines.index(line)]
    many = line_statistics(where_of(line), drawn, counted=True, confidence=0.95, seed=0, draws=600)
    for run in range(3):
        before, after = (drawn[:, run] < 0).astype(float), (drawn[:, run] > 0).astype(float)
        one = paired_statistics(before, after, clusters=line.images, draws=600)
        for name in ("change", "interval", "bootstrap", "worse", "better", "p_harm", "resolvable"):
            assert getattr(many[run], name) == pytest.approx(getattr(one, name), abs=1e-12)


def test_simulated_runs_have_the_rates_and_the_churn_they_are_meant_to_have() -> None:
    suite = build("holisafe", PROFILES["safellava"])
    rng = np.random.default_rng(0)
    still = draw_worsening(suite, {}, 60, rng)
    unsafe = np.concatenate([each for each, line in zip(still, suite.lines, strict=True) if line.typed])
    assert (unsafe != 0).mean() == pytest.approx(0.12, abs=0.005)
    assert unsafe.mean() == pytest.approx(0, abs=0.003)
    moved = draw_worsening(suite, suite.worsening(MEAN, 0.02), 250, rng)
    for each, line in zip(moved, suite.lines, strict=True):
        assert each.mean() == pytest.approx(0.02 if line.typed else 0, abs=0.004)


def test_the_suite_has_the_benchmarks_shape() -> None:
    suite = build("holisafe", PROFILES["safeqwen"])
    sizes = {line.key: len(line.images) for line in suite.lines}
    assert [sizes[f"asr/{kind}"] for kind in ("SSU", "USU", "UUU", "SUU")] == [718, 971, 761, 899]
    assert (sizes["rr"], sizes["guard_recall"], sizes["guard_fpr"]) == (682, 957, 834)
    mini = build("holisafe-mini", PROFILES["tiny"])
    assert sum(len(line.images) for line in mini.lines if line.key[:2] in ("as", "rr")) == 2399  # 2,400, each rounded
    large = build("holisafe-mini", PROFILES["tiny"], pairs=4031, questions=900)
    assert [len(line.images) for line in large.lines[:-1]] == [len(line.images) for line in suite.lines[:-1]]
    assert (len(large.lines[-1].images), len(np.unique(large.lines[-1].images))) == (900, 450)
    counts = np.bincount(spread_over(10, 34, np.random.default_rng(0)), minlength=10)
    assert set(counts) == {3, 4}
    with pytest.raises(InputError, match="not one of the lines"):
        suite.worsening("asr/XXX", 0.1)
    with pytest.raises(InputError, match=r"churn 0\.9"):
        keep_for_churn([0.1], [1], 0.9)


def test_the_command_prints_a_table_and_json() -> None:
    arguments = ["--suite", "holisafe-mini", "--runs", "4", "--draws", "99"]
    told = CliRunner().invoke(main, [*arguments, "--no-power"], catch_exceptions=False)
    assert told.exit_code == 0
    assert "at margin: PASS" in told.stdout and "4 comparisons each" in told.stdout
    found = json.loads(CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert set(found["power"]["rr"]) == {"1", "2", "5"}
    assert 0 <= found["unchanged"]["overall"]["PASS"] <= 1


def test_every_line_of_the_table_has_every_cell(suite: Suite) -> None:
    found = measure_errors(suite, runs=2, seed=0, draws=99, points=(2,))
    rows = [line for line in summary(suite, found, 2).splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 3 + len(suite.keys)
