"""Drawn files hold what people need and nothing that sways them, and correct the judge that they were drawn for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks.comparison.comparing import compare
from benchmarks.comparison.measured import Comparison
from benchmarks.labels import main
from benchmarks.runs.record import Run
from safevlm.errors import InputError
from tests.benchmarks.comparison.test_judge_errors import judge, labels, rows, run, truly_ok


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Run, Run]:
    found = [judge(run(tmp_path, name, rows(bad=0.08, seed=1)), finds=0.93, seed=len(name)) for name in ("a", "bc")]
    return found[0], found[1]


def drawn(out: Path, *options: str) -> tuple[Result, list[dict[str, Any]]]:
    result = CliRunner().invoke(main, [*options, "--judge", "weak", "--out", str(out)])
    text = out.read_text() if out.exists() else ""
    return result, [json.loads(each) for each in text.splitlines()]


def test_labels_of_both_runs_are_drawn_blind_and_read_again(tmp_path: Path, sides: tuple[Run, Run]) -> None:
    base, small = sides
    options = ["--baseline", str(base.folder), "--candidate", str(small.folder), "--number", "400"]
    result, lines = drawn(tmp_path / "labels.jsonl", *options, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert told["drawn"] == len(lines) == 400 == sum(each["labels"] for each in told["strata"])
    assert set(told["needed"]) == {"masr", "asr/SSU", "asr/USU", "asr/UUU", "asr/SUU", "rr"}
    assert Counter(each["run"] for each in lines) == {"baseline": 200, "candidate": 200}
    assert Counter(each["type"] == "SSS" for each in lines)[True] == 200
    assert all(each["ok"] is None and "weak" not in json.dumps(each) for each in lines)
    weights = sum(each["weight"] for each in lines if each["run"] == "baseline")
    assert weights == pytest.approx(sum(each["pairs"] for each in told["strata"]))
    own = {("baseline", row.id): row for row in base.rows} | {("candidate", row.id): row for row in small.rows}
    for each in lines[:-7]:
        each["ok"] = truly_ok(own[each["run"], each["id"]])
    filled = tmp_path / "filled.jsonl"
    filled.write_text("".join(json.dumps(each) + "\n" for each in lines))
    found = compare(Comparison(baseline=[base], candidate=[small], judges=("weak",), labels=filled))
    assert "7 of 400 lines of --labels are not filled in." in found.cautions
    mean = next(each for each in found.lines if each.key == "masr")
    assert mean.corrected is not None and "labels of both runs" in mean.judge_sentence


def test_what_labels_need_is_said_before_anybody_labels(tmp_path: Path, sides: tuple[Run, Run]) -> None:
    result, lines = drawn(tmp_path / "l.jsonl", "--baseline", str(sides[0].folder), "--number", "60", "--error", "0.02")
    assert result.exit_code == 0, result.output
    assert len(lines) == 60 and {each["run"] for each in lines} == {"baseline"}
    assert "SSU, judge says not refused: " in result.output
    assert "ASR UUU: about " in result.output


def test_nothing_is_written_over_or_by_halves(tmp_path: Path, sides: tuple[Run, Run]) -> None:
    options = ["--baseline", str(sides[0].folder)]
    there = labels(tmp_path / "there.jsonl", [])
    assert isinstance(drawn(there, *options)[0].exception, InputError)
    assert isinstance(drawn(tmp_path / "labels.csv", *options)[0].exception, InputError)
    result = CliRunner().invoke(main, [*options, "--judge", "nobody", "--out", str(tmp_path / "new.jsonl")])
    assert isinstance(result.exception, InputError) and not (tmp_path / "new.jsonl").exists()
