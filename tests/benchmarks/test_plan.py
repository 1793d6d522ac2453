"""The plan of a baseline: its own rates and images, churn measured or declared, and what contradicts itself refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.comparison.expected import declared_suite, measured_suite
from benchmarks.comparison.margins import Margins
from benchmarks.plan import main
from benchmarks.runs.record import Row, Run
from benchmarks.statistics.simulation import draw_worsening
from safevlm.errors import InputError
from tests.benchmarks.runs.sample_runs import HELP, changed, pair_rows, probabilities, question_rows, stored

EACH = 200
ROWS = [*pair_rows(EACH, 80), *question_rows(200)]


def noisy(seed: int, rate: float = 0.3, keep: float = 0.7) -> list[Row]:
    """Return rows that are bad with this chance, of which a part is the same for all seeds."""
    fixed, own = np.random.default_rng(99), np.random.default_rng(seed)
    kept, shared, drawn = fixed.random(len(ROWS)) < keep, fixed.random(len(ROWS)), own.random(len(ROWS))
    bad = {row.id for row, k, s, d in zip(ROWS, kept, shared, drawn, strict=True) if (s if k else d) < rate}
    rows = changed(ROWS, lambda row: row.id in bad and row.type not in (None, "SSS"), answer=HELP)
    return changed(rows, lambda row: row.id in bad and row.kind == "question", answer="It is blue.")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    return [stored(folder / str(seed), noisy(seed)) for seed in (1, 2)]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [*map(str, arguments), "--runs", "60"])


def test_the_churn_measured_is_the_churn_simulated(runs: Sequence[Run]) -> None:
    suite = measured_suite(runs[:1], runs[1:], judge=None, margins=Margins())
    drawn = draw_worsening(suite, {}, 200, np.random.default_rng(0))
    rows = [{row.id: row for row in run.rows} for run in runs]
    for kind, key in (("SSU", "asr/SSU"), ("USU", "asr/USU")):
        own = [name for name, row in rows[0].items() if row.type == kind]
        at = next(at for at, line in enumerate(suite.lines) if line.key == key)
        changes = np.mean([rows[0][name].answer != rows[1][name].answer for name in own])
        assert 0.05 < changes == pytest.approx((drawn[at] != 0).mean(), abs=0.01)
        assert len(np.unique(suite.lines[at].images)) == 80 and len(suite.lines[at].images) == EACH
    still = next(at for at, line in enumerate(suite.lines) if line.key == "guard/recall")
    assert (drawn[still] != 0).mean() < 0.02  # a line that did not change is planned with one sample that does
    assert {line.key for line in suite.lines} >= {"rr", "guard/fpr", "utility/holisafe"}


def test_a_declared_churn_is_that_of_all_unsafe_pairs(runs: Sequence[Run]) -> None:
    for suite in (
        declared_suite(runs[:1], (0.129, 0.01, 0.05), judge=None, margins=Margins()),
        measured_suite(runs[:1], runs[1:], judge=None, margins=Margins(), churn=0.129),
    ):
        drawn = draw_worsening(suite, {}, 200, np.random.default_rng(0))
        unsafe = np.concatenate([each for each, line in zip(drawn, suite.lines, strict=True) if line.typed])
        assert (unsafe != 0).mean() == pytest.approx(0.129, abs=0.006)


def test_a_measure_that_was_left_out_decides_nothing(runs: Sequence[Run]) -> None:
    margins = Margins.model_validate({"type": False, "guard_recall": False})
    suite = measured_suite(runs[:1], runs[1:], judge=None, margins=margins)
    keys = {line.key: line.margin for line in suite.lines}
    assert keys["asr/SSU"] == np.inf and "guard/recall" not in keys  # the types stay for their mean


def test_the_command_prints_lines_options_and_a_plan(runs: Sequence[Run]) -> None:
    told = invoke("--baseline", runs[0].folder, "--rerun", runs[1].folder)
    assert told.exit_code == 0, told.output
    assert "overall" in told.output and "sampled decodings" in told.output
    assert "plan: " in told.output or "no plan within these limits" in told.output
    found = json.loads(invoke("--baseline", runs[0].folder, "--churn", 0.129, "--json").stdout)
    assert found["confidence"] == 0.95 and found["comparisons"] == 60
    assert {line["key"] for line in found["now"]["lines"]} >= {"masr", "rr", "utility/holisafe"}
    assert found["plan"]["pass"] >= 0.9 or not found["plan"]["reached"]
    assert invoke("--suite", "holisafe-mini").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--baseline", "{0}"), "Give --rerun, or declare --churn"),
        (("--rerun", "{0}"), "need --baseline"),
        (("--baseline", "{0}", "--rerun", "{0}"), "shows no churn"),
        (("--baseline", "{0}", "--baseline", "{1}", "--churn", "0.1"), "Give each suite once"),
        (("--baseline", "{0}", "--suite", "holisafe", "--churn", "0.1"), "Leave out --suite"),
        (("--baseline", "{0}", "--rerun", "{1}", "--guard-churn", "0.1"), "measured where --rerun is given"),
        (("--baseline", "{0}", "--churn", "0.9"), "churn 0.9 is not possible"),
    ],
)
def test_what_contradicts_itself_is_refused(runs: Sequence[Run], arguments: Sequence[str], told: str) -> None:
    done = invoke(*(each.format(*(run.folder for run in runs)) for each in arguments))
    assert isinstance(done.exception, InputError) and told in str(done.exception)


def test_a_rerun_of_something_else_is_refused(runs: Sequence[Run], tmp_path: Path) -> None:
    other = stored(tmp_path / "few", ROWS[:500])
    guardless = stored(tmp_path / "odd", changed(ROWS, lambda row: row.kind == "pair", probs=probabilities(0)))
    with pytest.raises(InputError, match=r"--rerun: .*Give a second run of the baseline"):
        measured_suite(runs[:1], [other], judge=None, margins=Margins())
    assert measured_suite(runs[:1], [guardless], judge=None, margins=Margins()).lines
