"""A function in a process of its own: its answers, its end and its memory."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.speed.isolation import Outcome, peak_rss, run_isolated

FUNCTIONS = """
import os, signal, subprocess, sys, time
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

def hang(request):
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100000)"])
    print("hanging")
    sys.stdout.flush()
    yield {"grandchild": grandchild.pid}
    time.sleep(100000)

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


class UntilItAnswered(subprocess.Popen[bytes]):
    """A child whose deadline comes as soon as it has answered, whatever the clock says."""

    def communicate(self, input: bytes | None = None, timeout: float | None = None) -> Any:  # noqa: A002
        assert self.stdin is not None and isinstance(self.args, list) and timeout is not None
        self.stdin.write(input or b"")
        self.stdin.close()
        while b"\n" not in Path(self.args[-1]).read_bytes():
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(self.args, timeout)


def test_at_a_deadline_all_that_it_started_ends_and_answers_are_kept(
    functions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", UntilItAnswered)
        hung = run_isolated(functions + "hang", {}, threads=1, deadline=600)
    assert hung.late and hung.problem == "not done after 600 s" and hung.exit_code == 1 and "hanging" in hung.said
    (answer,) = hung.answers
    until = time.monotonic() + 600  # it was killed: how soon it is gone is the machine's affair
    while is_running(answer["grandchild"]):
        assert time.monotonic() < until
        time.sleep(0.01)
    done = run_isolated(functions + "refuse", {"word": "a"}, threads=1, deadline=600)
    assert not done.late and done.problem == "no such word"


def is_running(pid: int) -> bool:
    """Say whether a process still runs: one that was killed may wait as a zombie for whoever inherits it."""
    status = Path("/proc", str(pid), "stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_memory_is_the_process_own(functions: str) -> None:
    held = np.ones(400 * 2**20, dtype=np.uint8)  # ru_maxrss of the child would begin here
    answer, after = run_isolated(functions + "memory", {}, threads=3).answers
    assert peak_rss() > held.nbytes > answer["peak"] + 200 * 2**20
    assert answer["peak"] > 5 * 2**20
    assert answer["threads"] == "3"
    assert after["loading"] > answer["peak"] + 190 * 2**20 and after["loaded"] < after["loading"] - 150 * 2**20
