"""A function in a process of its own: its answers, its end and its memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed.isolation import Outcome, peak_rss, run_isolated

FUNCTIONS = """
import os, signal
from benchmarks.speed.isolation import peak_rss, restart_peak
from safevlm.errors import InputError

def memory(request):
    yield {"peak": peak_rss(), "threads": os.environ["OMP_NUM_THREADS"]}
    block = b"x" * (200 << 20)
    loading = peak_rss()
    del block
    restart_peak()
    yield {"loading": loading, "loaded": peak_rss()}

def refuse(request):
    yield {"first": request["word"]}
    raise InputError("no such word")

def die(request):
    yield {"first": 1}
    os.kill(os.getpid(), signal.SIGKILL)

def fail(request):
    print("noise")
    raise RuntimeError("a bug")
    yield
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "isolated_functions.py").write_text(FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "isolated_functions:"


def test_how_a_process_ends_is_told(functions: str) -> None:
    refused = run_isolated(functions + "refuse", {"word": "ä"}, threads=1)
    assert refused == Outcome(answers=({"first": "ä"},), problem="no such word", exit_code=2)
    died = run_isolated(functions + "die", {}, threads=1)
    assert died.answers == ({"first": 1},) and died.exit_code == 1
    assert died.problem is not None and "SIGKILL" in died.problem and "memory" in died.problem
    failed = run_isolated(functions + "fail", {}, threads=1)
    assert failed.exit_code == 1 and failed.problem == "the process ended with code 1: RuntimeError: a bug"


def test_memory_is_the_process_own(functions: str) -> None:
    held = np.ones(400 * 2**20, dtype=np.uint8)  # ru_maxrss of the child would begin here
    answer, after = run_isolated(functions + "memory", {}, threads=3).answers
    assert peak_rss() > held.nbytes > answer["peak"] + 200 * 2**20
    assert answer["peak"] > 5 * 2**20
    assert answer["threads"] == "3"
    assert after["loading"] > answer["peak"] + 190 * 2**20 and after["loaded"] < after["loading"] - 150 * 2**20
