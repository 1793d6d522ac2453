"""A judge's errors make false PASSes, and labels take them back, where the truth is known."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner

from benchmarks.simulate import PROFILES, build, main
from benchmarks.statistics.judged_simulation import (
    Drawing,
    JudgeError,
    Told,
    judged_lines,
    judged_summary,
    simulate_judged,
)
from benchmarks.statistics.simulation import MEAN, Suite
from safevlm.errors import InputError

RUNS = 200
NOISE = 3 * math.sqrt(0.05 * 0.95 / RUNS)
WEAK = JudgeError(sensitivity=0.7, specificity=0.9)


@pytest.fixture(scope="module")
def suite() -> Suite:
    return build("holisafe", PROFILES["safellava"])


def told(
    suite: Suite, key: str, amount: float, judge: JudgeError, drawing: Drawing = "random", runs: int = RUNS
) -> Told:
    worsening = suite.worsening(key, amount)
    return simulate_judged(suite, worsening, key, judge, labels=400, drawing=drawing, runs=runs, draws=400)


@pytest.mark.parametrize("drawing", ["random", "words", "both"])
def test_a_truth_at_the_margin_passes_at_most_one_time_in_twenty_once_labelled(suite: Suite, drawing: Drawing) -> None:
    found = told(suite, "asr/USU", suite.margin("asr/USU"), WEAK, drawing)
    assert found.uncorrected > 0.05 + NOISE, "this judge's word alone is too weak"
    assert found.passed < 0.05 + NOISE and found.corrected > 0.9


def test_labels_of_both_runs_see_what_labels_of_the_baseline_cannot(suite: Suite) -> None:
    turned = JudgeError(sensitivity=0.95, specificity=0.95, sensitivity_after=0.8)
    at = suite.margin("asr/USU")
    assert told(suite, "asr/USU", at, turned, "words", runs=100).passed > 0.3
    assert told(suite, "asr/USU", at, turned, "both", runs=100).passed < 0.05 + NOISE


def test_labels_leave_a_good_judge_its_power(suite: Suite) -> None:
    found = told(suite, MEAN, 0.0, JudgeError(sensitivity=0.97, specificity=0.97), runs=100)
    assert found.corrected == 1 and found.passed > 0.5


def test_impossible_questions_are_refused(suite: Suite) -> None:
    with pytest.raises(InputError, match="not better than chance"):
        JudgeError(sensitivity=0.5, specificity=0.5)
    with pytest.raises(InputError, match="'utility' is not a judged line"):
        told(suite, "utility", 0.0, WEAK)


def test_the_command_measures_a_judge() -> None:
    options = ["--suite", "holisafe-mini", "--runs", "2", "--draws", "99", "--judge-sensitivity", "0.8"]
    result = CliRunner().invoke(main, [*options, "--judge-specificity", "0.9", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert list(found) == [MEAN, "asr/SSU", "asr/USU", "asr/UUU", "asr/SUU", "rr"]
    assert found["rr"]["at_margin"]["passed"] <= found["rr"]["at_margin"]["uncorrected"]
    result = CliRunner().invoke(main, options)
    assert isinstance(result.exception, InputError) and "together" in str(result.exception)


def test_the_table_has_a_row_for_each_judged_line(suite: Suite) -> None:
    share = Told(uncorrected=0.2, passed=0.04, corrected=1)
    found = {key: {"at_margin": share, "unchanged": share} for key in judged_lines(suite)}
    assert judged_summary(found, 400, "both").count("20.0 | 4.0") == 2 * len(judged_lines(suite))
