"""A verdict belongs to its image: whatever hangs, fails or runs at the same time, in every runner there is."""

from __future__ import annotations

import ast
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.gate.lane import Lane, OverranError
from runtimes.guard.activation import Turn
from safevlm.errors import BusyError, SafeVLMError
from tests.runtimes.guard.hanging_runners import SECONDS, SUBJECTS, Hang, Place, Subject, open_subject, same

ROOT = Path(__file__).resolve().parents[3]
SHARED = {"OnnxRuntimeRunner"}
"""Whose calls may run at the same time."""
Folder = Callable[[str], Path]


@pytest.fixture
def hang() -> Iterator[Hang]:
    hang = Hang()
    yield hang
    hang.released.set()


@pytest.fixture
def place(hang: Hang, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gguf_folder: Folder) -> Place:
    return Place(hang=hang, monkeypatch=monkeypatch, folder=tmp_path, gguf_folder=gguf_folder)


each_runner = pytest.mark.parametrize("name", SUBJECTS)
each_step = pytest.mark.parametrize(
    ("name", "step"), [(name, step) for name, (_, all_) in SUBJECTS.items() for step in all_]
)


class Late:
    """A call that a lane leaves behind at a step that hangs, and what it comes to once it is released."""

    def __init__(self, subject: Subject, hang: Hang, step: str, at: int, nth: int = 0) -> None:
        self.lane = Lane("runner")
        self.found: Any = None
        hang.arm(step, nth)
        self._released = hang.released

        def call() -> None:
            self.found = subject.outcome(at)

        outcome = self.lane.run(call, 0.01)
        assert hang.reached.wait(SECONDS), f"{step} was never reached"
        assert isinstance(outcome.error, OverranError) and self.lane.stuck == 1
        self._thread = self.lane._left_behind[0].thread

    def release(self) -> Any:
        self._released.set()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        return self.found


@each_step
def test_a_call_that_hangs_is_left_alone(name: str, step: str, place: Place, hang: Hang) -> None:
    """Nothing else runs on what it uses, and it still gets its own answer: nobody overwrote its image."""
    with open_subject(name, place) as subject:
        late = Late(subject, hang, step, 0)
        for at in (1, 2):
            if name in SHARED:
                assert same(subject.ask(at), subject.right[at])
            else:
                with pytest.raises(BusyError, match="busy with an earlier call, which may hang"):
                    subject.ask(at)
        assert same(late.release(), subject.right[0])
        for at in (2, 0, 1):
            assert same(subject.ask(at), subject.right[at])


@each_step
def test_a_runner_that_is_entered_again_shares_nothing_with_a_call_that_hangs(
    name: str, step: str, place: Place, hang: Hang, caplog: pytest.LogCaptureFixture
) -> None:
    with open_subject(name, place) as subject:
        once = subject.held()
        late = Late(subject, hang, step, 0)
        with caplog.at_level(logging.WARNING):
            subject.runner.deactivate()
        assert "a call is still running; what it uses is freed when it ends" in caplog.text
        assert subject.held() == once, "freed under a call that uses it"
        with pytest.raises(SafeVLMError, match="not active"):
            subject.ask(1)
        subject.runner.activate()
        assert subject.held() == 2 * once
        assert same(subject.ask(1), subject.right[1])
        found = late.release()
        assert isinstance(found, SafeVLMError) and "deactivated during the call" in str(found)
        assert subject.held() == once, "freed by the last call that used it"
        for at in (2, 1, 0):
            assert same(subject.ask(at), subject.right[at])
    assert subject.held() == 0


@each_step
def test_a_call_that_fails_half_way_leaves_nothing_for_the_next(name: str, step: str, place: Place, hang: Hang) -> None:
    with open_subject(name, place) as subject:
        for nth in (0, 1, 2):
            hang.arm(step, nth, fails=True)
            last = len(subject.images) - 1  # what was asked about before: its prompt must not seem to be there still
            order = (0, last, 1, 0, last)
            outcomes = [subject.outcome(at) for at in order]
            for at, found in zip(order, outcomes, strict=True):
                assert isinstance(found, Exception) or same(found, subject.right[at])
            assert [str(found) for found in outcomes if isinstance(found, Exception)] == [f"{step} failed"]


@each_runner
def test_many_threads_get_their_own_answers_or_none(name: str, place: Place, hang: Hang) -> None:
    """Threads ask at once about random images, calls are left behind, and the runner is entered again in between."""
    rng = np.random.default_rng(3)
    steps = SUBJECTS[name][1]
    with open_subject(name, place) as subject:
        wrong: list[int] = []

        def ask(all_: list[int], go: threading.Barrier) -> None:
            go.wait(SECONDS)
            for at in all_:
                found = subject.outcome(at)
                if not isinstance(found, Exception) and not same(found, subject.right[at]):
                    wrong.append(at)

        for number in range(4):
            late = Late(subject, hang, str(rng.choice(steps)), int(rng.integers(len(subject.right))))
            go = threading.Barrier(5)
            plans = [[int(at) for at in rng.integers(len(subject.right), size=6)] for _ in range(4)]
            threads = [threading.Thread(target=ask, args=(plan, go), daemon=True) for plan in plans]
            for thread in threads:
                thread.start()
            go.wait(SECONDS)
            if number % 2:
                subject.runner.deactivate()
                subject.runner.activate()
            late.release()
            for thread in threads:
                thread.join(SECONDS)
            assert not any(thread.is_alive() for thread in threads)
            assert not wrong, "an image got another one's verdict"
            at = int(rng.integers(len(subject.right)))
            assert same(subject.ask(at), subject.right[at]), "it serves again once nothing hangs"
    assert subject.held() == 0


@each_runner
def test_an_answer_is_the_caller_s_own(name: str, place: Place) -> None:
    with open_subject(name, place) as subject:
        first = subject.ask(0)
        copies = [np.copy(each) if isinstance(each, np.ndarray) else each for each in first]
        for at in (1, 2):
            subject.ask(at)
        assert all(np.array_equal(one, copy) for one, copy in zip(first, copies, strict=True) if one is not None)
        for each in first:
            if isinstance(each, np.ndarray):
                each[:] = 0
        assert same(subject.ask(0), subject.right[0]), "what a caller does with its answer is not seen by the next"


def test_a_turn_is_waited_for_by_calls_that_have_time_and_by_no_other() -> None:
    turn, lanes = Turn("the tower"), [Lane("first"), Lane("second")]
    inside, go = threading.Event(), threading.Event()

    def hold() -> None:
        with turn.taken():
            inside.set()
            assert go.wait(SECONDS)

    def take() -> str:
        with turn.taken():
            return "taken"

    outcomes: dict[str, Any] = {}

    def on(lane: Lane, call: Callable[[], Any]) -> threading.Thread:
        thread = threading.Thread(target=lambda: outcomes.update({lane.name: lane.run(call, SECONDS)}), daemon=True)
        thread.start()
        return thread

    threads = [on(lanes[0], hold)]
    assert inside.wait(SECONDS)
    with pytest.raises(BusyError, match="the tower is busy"):
        take()
    threads.append(on(lanes[1], take))
    go.set()
    for thread in threads:
        thread.join(SECONDS)
    assert outcomes["second"].get() == "taken"
    inside.clear()
    go.clear()
    assert isinstance(lanes[0].run(hold, 0.01).error, OverranError) and inside.wait(SECONDS)
    assert isinstance(lanes[1].run(take, SECONDS).error, BusyError), "nobody waits for a call that is overdue"
    go.set()


def test_every_runner_there_is_is_tested_here() -> None:
    """Found by their base classes in the sources, so that nothing needs to be imported."""
    bases: dict[str, set[str]] = {}
    for package in ("benchmarks", "calibration", "export", "quantize", "runtimes"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    named = {ast.unparse(base).rpartition(".")[2].partition("[")[0] for base in node.bases}
                    bases.setdefault(node.name, set()).update(named)
    found = {"Activated"}
    while more := {name for name, named in bases.items() if named & found} - found:
        found |= more
    contracts = {"Activated", "GuardRunner", "FileRunner", "LanguageRunner"}
    without_verdict = {"VisionTower"}  # of the benchmarks
    assert found - contracts - without_verdict == set(SUBJECTS), "a new runner needs a stand-in in hanging_runners.py"
