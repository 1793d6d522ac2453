"""``benchmarks.speed gate``: every way runs its course, passes are counted, figures fit together."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.shapes.random_vlm import build_random_vlm
from benchmarks.speed import __main__ as speed
from benchmarks.speed import gate as gate_speed
from benchmarks.speed.gate import GateOptions, GateSpeed, gate_table, measure_gate, summed_up
from benchmarks.speed.isolation import Outcome
from benchmarks.speed.peer import Subject
from safevlm.errors import InputError, SafeVLMError
from safevlm.terminal.commandline import run
from tests.benchmarks.shapes.test_random_guard import SMALL, small_shape
from tests.runtimes.bundles import write_bundle

HEADS = {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 1000}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gate") / "gate.json"
    quick = ["--rounds=1", "--repeats=1", "--max-new-tokens=3", "--threads=1", "--json", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.speed", "gate", "--model", "tiny-safellava", *quick]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    printed, written = json.loads(done.stdout), json.loads(out.read_text())
    assert printed == written
    return dict(printed)


PASSES = {
    ("no guard", "answer"): (0, 1, 1, True),
    ("published", "block"): (0, 1, 1, False),
    ("published", "answer"): (0, 2, 2, True),
    ("exact alone", "block"): (0, 1, 1, False),
    ("exact alone", "answer"): (0, 1, 1, True),
    ("gate", "block"): (1, 0, 0, False),
    ("gate", "unsure, block"): (1, 1, 1, False),
    ("gate", "answer"): (1, 1, 1, True),
    ("gate", "unsure, answer"): (1, 1, 1, True),
}


def test_forward_passes_of_every_way(record: dict[str, Any]) -> None:
    """The gate blocks without the language model and answers with one prefill; the published way needs two."""
    found = {}
    for row in record["rows"]:
        passes = row["passes"]
        decoded = passes["decode"]
        assert (decoded > 0) == row["course"].endswith("answer") and decoded <= 2
        found[row["way"], row["course"]] = (passes["guard"], passes["vision"], passes["prefill"], decoded > 0)
    assert found == PASSES


def test_record_says_what_where_and_how(record: dict[str, Any]) -> None:
    assert record["benchmark"] == "gate" and "benchmarks.speed gate --model" in record["command"]
    assert {"created", "machine", "versions", "settings", "how_measured"} <= set(record)
    subject = record["subject"]
    assert (subject["tap"], subject["weights"], subject["language_layers"]) == ("language_model", "checkpoint", 3)
    assert "a stand-in" in subject["head"]
    times = {(row["way"], row["course"]): row["median_ms"] for row in record["rows"]}
    for row in record["rows"]:
        if row["course"].endswith("answer"):
            added = times[row["way"], row["course"]] - times["no guard", "answer"]
            assert row["added_ms"] == pytest.approx(added)
        else:
            assert row["added_ms"] is None


def test_rounds_are_summed_up() -> None:
    passes = dict.fromkeys(("guard", "vision", "prefill", "decode"), 1)
    rounds = {("no guard", "answer"): ([10, 30, 11], [20]), ("gate", "answer"): ([12], [30, 31, 99])}
    answers: list[Mapping[str, Any]] = [
        {"way": way, "course": course, "times_ms": times, "passes": passes}
        for (way, course), both in rounds.items()
        for times in both
    ]
    without, gate = summed_up(answers)
    assert (without.median_ms, without.spread_ms, without.added_ms, without.runs) == (15.5, 9, 0, 4)
    assert (gate.median_ms, gate.spread_ms, gate.added_ms) == (21.5, 19, 6)
    model = {"height": 1, "width": 1, "prompt_tokens": 1, "language_layers": 1, "head": "x"}
    subject = Subject(name="x", random=True)
    lines = gate_table(GateSpeed(subject=subject, options=GateOptions(threads=1), model=model, rows=(without, gate)))
    assert lines[-1].split() == ["gate", "answer", "21.50", "19.00", "+6.00", "1", "1", "1", "1", "4"]
    assert "random weights" in lines[0]


@pytest.mark.parametrize("family", SMALL)
def test_a_random_model_answers(family: str) -> None:
    shape = small_shape(family)
    heads = {**HEADS, "num_hidden_layers": 9}
    vlm = build_random_vlm(type(shape)(**{**vars(shape), "language": heads}), layers=2, seed=1)
    size = vlm.preprocessing
    image = torch.zeros((1, size.height, size.width, 3), dtype=torch.uint8)
    answer = vlm.answer(image, ["Why?"], max_new_tokens=2)[0]
    assert abs(answer.guard_probs.sum() - 1) < 1e-5 and len(vlm.core.language_model.layers) == 2
    assert not any(parameter.is_meta for parameter in vlm.parameters())


def test_a_bundle_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path)
    with pytest.raises(InputError, match=r"16x16 pixels, but the model\s+112x112"):
        measure_gate(Subject(name="tiny-safegem", random=False), GateOptions(threads=1), bundle=folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "neither was given"),
        ("--model x --layers 2", "needs --shape"),
        ("--shape SafeLLaVA-7B --layers 0", "--layers 0"),
        ("--shape SafeLLaVA-7B --rounds 0", "--rounds 0 is not allowed. Give at least 1"),
        ("--shape SafeLLaVA-7B --max-new-tokens 0", "--max-new-tokens 0 is not allowed. Give at least 1"),
        ("--shape SafeLLaVA-7B --out /", "--out / is a folder"),
    ],
)
def test_bad_input(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_speed, "run_isolated", lambda *_, **__: pytest.fail("something was started"))
    with pytest.raises(SystemExit) as ended:
        run(speed.main, ["gate", *arguments.split()])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_a_failing_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, kind in ((1, SafeVLMError), (2, InputError)):
        outcome = Outcome(answers=(), problem="killed", exit_code=code)
        monkeypatch.setattr(gate_speed, "run_isolated", lambda *_, outcome=outcome, **__: outcome)
        with pytest.raises(kind, match="killed"):
            measure_gate(Subject(name="x", random=False), GateOptions(threads=1))
