"""The gate: who decides, what is run how often, and that every failure blocks."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes.gate.gate import Gate
from runtimes.guard.fake_runner import FakeRunner
from runtimes.guard.judge import Guard
from runtimes.guard.policy import Limits, Policy
from runtimes.guard.runner import GuardOutput
from runtimes.language.language import LanguageRunner, Prefilled
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import InputError, SafeVLMError
from tests.runtimes.bundles import CLASSES, GREEN, PREPROCESSING, RED, picture, write_bundle

ROOT = Path(__file__).resolve().parents[3]
SAFE, UNSURE, WEAPON = [0.99, 0.005, 0.005], [0.5, 0.3, 0.2], [0.01, 0.98, 0.01]
BAND = Limits(block=0.9, allow=0.1)
POLICY = Policy(guard=BAND)
WHITE = Image.new("RGB", (8, 8), "white")


class FakeLanguage(LanguageRunner):
    """Count what is asked, and answer or fail as told; the answer names the prefill it goes on from."""

    runtime = "fake"
    takes_embeddings = True

    def __init__(self, exact: Any = SAFE, *, at_prefill: Any = None, at_generate: Any = None) -> None:
        super().__init__()
        self.exact = None if exact is None else np.array(exact, np.float32)
        self.preprocessing = PREPROCESSING
        self.classes = None if exact is None else CLASSES
        self.at_prefill, self.at_generate = at_prefill, at_generate
        self.calls: list[str] = []
        self.pictures: list[Any] = []
        self.embeddings: list[Any] = []

    def _activate(self) -> None:
        self.calls.clear()

    def _prefill(self, rgb: Any, question: str, embeddings: Any) -> Prefilled:
        self.calls.append("prefill")
        self.pictures.append(rgb)
        self.embeddings.append(embeddings)
        happen(self.at_prefill)
        return Prefilled(self.exact, f"prefill {self.calls.count('prefill')} of {question}")

    def _generate(self, handle: Any, max_new_tokens: int) -> str:
        self.calls.append("generate")
        happen(self.at_generate)
        return f"answer from {handle}"


def happen(what: Any) -> None:
    if isinstance(what, BaseException):
        raise what
    if what is not None:
        what()


class Hanging:
    """Hang when called until released; ``times`` bounds how often."""

    def __init__(self, times: int = 1000) -> None:
        self.released = threading.Event()
        self.times = times

    def __call__(self) -> None:
        self.times -= 1
        if self.times >= 0:
            self.released.wait(600)


class Failing(FakeRunner):
    """A guard that lets ``what`` happen, and gives embeddings of its own where told; ``seen`` are its inputs."""

    def __init__(self, what: Any = None, *, probs: Any = SAFE, embeddings: bool = False, checked: bool = True) -> None:
        super().__init__(PREPROCESSING, 3, probs=probs)
        self.what, self.gives_embeddings, self.checked = what, embeddings, checked
        self.seen: list[Any] = []
        self.raw = np.array([probs], np.float32)

    def infer(self, rgb: Any, *, embeddings: bool = False) -> GuardOutput:
        self.seen.append(rgb[0])
        output = super().infer(rgb) if self.checked else GuardOutput(probs=self.raw, logits=self.raw)
        if embeddings:
            object.__setattr__(output, "embeddings", np.full((1, 4, 6), 7, np.float32))
        return output

    def _run(self, rgb: Any) -> GuardOutput:
        happen(self.what)
        return super()._run(rgb)


class Shared(Failing):
    """As a runner whose calls share nothing."""

    exclusive = False


@pytest.fixture
def hang() -> Iterator[Hanging]:
    hanging = Hanging()
    yield hanging
    hanging.released.set()


def gate_of(
    runner: Any, language: LanguageRunner | None, policy: Policy = POLICY, timeout: float = 600, **more: Any
) -> Gate:
    return Gate(None if runner is None else Guard(runner, CLASSES), language, policy, timeout, **more)


# -- who decides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probs", "exact", "verdict", "stage", "calls"),
    [
        (WEAPON, SAFE, "block", "guard", []),
        (SAFE, SAFE, "allow", "guard", ["prefill", "generate"]),
        (SAFE, WEAPON, "block", "exact", ["prefill"]),
        (UNSURE, SAFE, "allow", "exact", ["prefill", "generate"]),
        (UNSURE, WEAPON, "block", "exact", ["prefill"]),
        (None, SAFE, "allow", "exact", ["prefill", "generate"]),
        (None, WEAPON, "block", "exact", ["prefill"]),
        (SAFE, None, "allow", "guard", ["prefill", "generate"]),
        (UNSURE, None, "block", "guard", []),
    ],
)
def test_stages(probs: Any, exact: Any, verdict: str, stage: str, calls: list[str]) -> None:
    """The exact verdict costs no prefill of its own, and the answer goes on from the very one it was read from."""
    language = FakeLanguage(exact)
    with gate_of(None if probs is None else FakeRunner(PREPROCESSING, 3, probs=probs), language) as gate:
        result = gate.ask(WHITE, "Why?")
    assert (result.verdict, result.stage, language.calls) == (verdict, stage, calls)
    assert result.answer == ("answer from prefill 1 of Why?" if verdict == "allow" else None)
    assert result.finding is not None and result.error is None
    assert (result.probs is None) == (probs is None)
    assert (result.exact_probs is None) == (exact is None or not calls)
    assert set(result.ms) == {"decode", "total"} | ({"guard"} if probs else set()) | {
        {"prefill": "exact", "generate": "generate"}[call] for call in calls
    }


def test_without_a_language_model_the_gate_only_judges() -> None:
    for probs, verdict in ((SAFE, "allow"), (UNSURE, "block"), (WEAPON, "block")):
        with gate_of(FakeRunner(PREPROCESSING, 3, probs=probs), None) as gate:
            result = gate.ask(WHITE, "Why?")
            assert (result.verdict, result.stage, result.answer) == (verdict, "guard", None)


@pytest.mark.parametrize("probs", [SAFE, UNSURE])
def test_an_unsure_exact_verdict_blocks_unless_the_policy_says_otherwise(probs: Any) -> None:
    for still, verdict in (("block", "block"), ("allow", "allow")):
        policy = Policy(guard=BAND, exact=BAND, still_unsure=still)
        with gate_of(FakeRunner(PREPROCESSING, 3, probs=probs), FakeLanguage(UNSURE), policy) as gate:
            assert gate.ask(WHITE, "Why?").verdict == verdict


def test_confirm_off_leaves_the_guard_s_allow_alone() -> None:
    policy = Policy(guard=BAND, confirm=False)
    with gate_of(FakeRunner(PREPROCESSING, 3, probs=SAFE), FakeLanguage(WEAPON), policy) as gate:
        result = gate.ask(WHITE, "Why?")
    assert (result.verdict, result.stage) == ("allow", "guard")
    assert result.exact_probs is not None and result.exact_probs["weapon"] > 0.9
    with gate_of(FakeRunner(PREPROCESSING, 3, probs=UNSURE), FakeLanguage(WEAPON), policy) as gate:
        assert gate.ask(WHITE, "Why?").verdict == "block"


@pytest.mark.parametrize(
    ("exact", "verdict", "review"), [(SAFE, "allow", False), (WEAPON, "block", True), (UNSURE, "block", True)]
)
def test_review(exact: Any, verdict: str, review: bool) -> None:
    policy = Policy(classes={"weapon": "review"}, guard=BAND, exact=BAND, still_unsure="allow")
    with gate_of(FakeRunner(PREPROCESSING, 3, probs=WEAPON), FakeLanguage(exact), policy) as gate:
        result = gate.ask(WHITE, "Why?")
    assert (result.verdict, result.stage, result.review) == (verdict, "exact", review)
    with gate_of(FakeRunner(PREPROCESSING, 3, probs=WEAPON), None, policy) as gate:
        alone = gate.ask(WHITE, "Why?")
    assert (alone.verdict, alone.review) == ("block", True)


# -- what the language model is shown -------------------------------------------------------------------


def test_the_language_model_is_shown_what_the_guard_judged() -> None:
    """Text hidden in the colours under full transparency reaches neither; both get the same pixels."""
    hidden = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    guard, language = Failing(), FakeLanguage()
    with gate_of(guard, language) as gate:
        gate.ask(hidden, "Why?")
    assert (language.pictures[0] == 255).all()
    assert np.array_equal(language.pictures[0], guard.seen[0])


def test_another_size_is_made_from_the_same_decode(tmp_path: Path) -> None:
    path = picture(tmp_path / "red.png", RED, (40, 30))
    for size, shape in ((None, (30, 40, 3)), (PREPROCESSING.model_copy(update={"height": 20}), (20, 16, 3))):
        language = FakeLanguage()
        language.preprocessing = size
        with gate_of(Failing(embeddings=True), language) as gate:
            assert gate.ask(path, "Why?").verdict == "allow"
        assert language.pictures[0].shape == shape and (language.pictures[0] == RED).all()
        assert language.embeddings == [None], "embeddings are of another size"


class ByColour(FakeRunner):
    """A guard that is ``verdict`` of red, and finds everything else safe."""

    def __init__(self, verdict: Any) -> None:
        super().__init__(PREPROCESSING, 3, probs=SAFE)
        self.verdict = np.array(verdict, np.float32)

    def _run(self, rgb: Any) -> GuardOutput:
        red = (rgb[..., 0].mean(axis=(1, 2)) > 200) & (rgb[..., 1].mean(axis=(1, 2)) < 60)
        rows = np.where(red[:, None], self.verdict, np.array(SAFE, np.float32)).astype(np.float32)
        return GuardOutput(probs=rows, logits=rows)


class ReadsRed(FakeLanguage):
    """A language model whose exact verdict blocks red."""

    def _prefill(self, rgb: Any, question: str, embeddings: Any) -> Prefilled:
        self.exact = np.array(WEAPON if rgb[..., 0].mean() > 200 > 60 > rgb[..., 1].mean() else SAFE, np.float32)
        return super()._prefill(rgb, question, embeddings)


HIDDEN = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
"""White to a viewer and to the language model, red to a reader that drops alpha."""


@pytest.mark.parametrize(
    ("guard", "exact", "calls"),
    [
        (WEAPON, FakeLanguage, []),
        (UNSURE, FakeLanguage, []),  # the exact verdict on white settles nothing about red
        (None, ReadsRed, ["prefill"] * 3),  # black, grey, and red
    ],
)
def test_what_only_other_readers_show_blocks_too(guard: Any, exact: Any, calls: list[str]) -> None:
    language = exact()
    with gate_of(None if guard is None else ByColour(guard), language) as gate:
        result = gate.ask(HIDDEN, "Why?")
        assert (result.verdict, result.view, language.calls) == ("block", "transparency ignored", calls)
        assert "as other programs show it (transparency ignored)" in result.reason
        assert result.to_json()["view"] == "transparency ignored"


@pytest.mark.parametrize(("guard", "prefills"), [(SAFE, 1), (None, 4)])
def test_of_several_views_the_language_model_answers_about_the_usual_one(guard: Any, prefills: int) -> None:
    language = FakeLanguage()
    with gate_of(None if guard is None else ByColour(guard), language) as gate:
        result = gate.ask(HIDDEN, "Why?")
        assert result.answer == f"answer from prefill {prefills} of Why?" and (language.pictures[-1] == 255).all()
        assert "view" not in gate.ask(WHITE, "Why?").to_json()


def test_embeddings_of_the_guard_spare_the_vision_tower() -> None:
    for share, takes in ((True, True), (False, True), (True, False)):
        language = FakeLanguage()
        language.takes_embeddings = takes
        with gate_of(Failing(embeddings=True), language, share_embeddings=share) as gate:
            assert gate.ask(WHITE, "Why?").verdict == "allow"
        given = language.embeddings[0]
        assert (given is not None and given.shape == (4, 6)) == (share and takes)


# -- it fails closed ------------------------------------------------------------------------------------

FAILURES = [
    SafeVLMError("no"),
    RuntimeError("no"),
    MemoryError(),
    KeyError("x"),
    SystemExit(0),
    KeyboardInterrupt(),
    GeneratorExit(),
]
NEVER = Limits.model_construct(block=2.0, allow=2.0)
LENIENT = Policy(default="allow", classes={"drug": "block"}, guard=NEVER, confirm=False, still_unsure="allow")


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("where", ["guard", "exact", "generate"])
def test_whatever_is_raised_blocks(failure: BaseException, where: str) -> None:
    guard = Failing(failure if where == "guard" else None)
    language = FakeLanguage(
        at_prefill=failure if where == "exact" else None, at_generate=failure if where == "generate" else None
    )
    with gate_of(guard, language, LENIENT) as gate:
        result = gate.ask(WHITE, "Why?")
        assert (result.verdict, result.stage, result.error_in, result.answer) == ("block", "error", where, None)
        told = "not enough memory" if isinstance(failure, MemoryError) else type(failure).__name__
        assert told in (result.error or "") and result.reason
        guard.what = language.at_prefill = language.at_generate = None
        assert gate.ask(WHITE, "Why?").verdict == "allow", "one failure does not spoil the next request"


@pytest.mark.parametrize("bad", [[np.nan] * 3, [np.inf, 0, 0], [0, 0, 0], [0.5, 0.5], [3, -1, -1]])
def test_no_row_of_probabilities_blocks(bad: Any) -> None:
    with gate_of(Failing(probs=bad, checked=False), FakeLanguage(), LENIENT) as gate:
        result = gate.ask(WHITE, "Why?")
    assert (result.verdict, result.stage, result.error_in) == ("block", "error", "guard")
    language = FakeLanguage()
    language.exact = np.array(bad, np.float32)
    with gate_of(Failing(), language, LENIENT) as gate:
        result = gate.ask(WHITE, "Why?")
    assert (result.verdict, result.stage, result.error_in) == ("block", "error", "exact")
    json.loads(result.to_json_line(text=True))


def test_a_broken_engine_s_nan_blocks() -> None:
    with gate_of(FakeRunner(PREPROCESSING, 3, not_a_number=True), FakeLanguage(), LENIENT) as gate:
        assert gate.ask(WHITE, "Why?").stage == "error"


def test_an_answer_that_is_no_text_blocks() -> None:
    language = FakeLanguage()
    language._generate = lambda handle, tokens: None  # type: ignore[assignment, method-assign, return-value]
    with gate_of(Failing(), language) as gate:
        result = gate.ask(WHITE, "Why?")
    assert (result.verdict, result.error_in) == ("block", "generate")


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_an_unreadable_image_blocks(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    language = FakeLanguage()
    with gate_of(Failing(), language, LENIENT) as gate:
        for image in (path, str(path), content, tmp_path / "none.png", tmp_path, 7):
            result = gate.ask(image, "Why?")  # type: ignore[arg-type]
            assert (result.verdict, result.stage, result.reason) == ("block", "error", "the image cannot be read")
    assert language.calls == []
    with gate_of(None, language, LENIENT) as gate:
        assert gate.ask(path, "Why?").reason == "the image cannot be read"


def test_a_gate_that_was_not_entered_blocks() -> None:
    assert (
        gate_of(FakeRunner(PREPROCESSING, 3, probs=SAFE), FakeLanguage(), LENIENT).ask(WHITE, "Why?").stage == "error"
    )


# -- it does not wait -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["guard", "exact", "generate"])
def test_a_hung_call_blocks_and_so_does_what_comes_until_it_ends(where: str) -> None:
    hanging = Hanging(times=1)
    guard = Failing(hanging if where == "guard" else lambda: setattr(gate, "timeout", 1 if where == "exact" else 600))
    language = FakeLanguage(
        at_prefill=hanging if where == "exact" else None, at_generate=hanging if where == "generate" else None
    )
    try:
        # What does not hang is waited for, however busy the machine is.
        with gate_of(guard, language, timeout=1 if where == "guard" else 600, generation_timeout=1) as gate:
            result = gate.ask(WHITE, "Why?")
            gate.timeout = gate.generation_timeout = 600
            guard.what = None
            assert (result.verdict, result.stage, result.error_in) == ("block", "error", where)
            assert "in time" in result.reason and gate.stuck == 1
            busy = gate.ask(WHITE, "Why?")
            assert (busy.verdict, busy.stage, busy.busy, gate.stuck) == ("block", "error", True, 1)
            assert busy.error_in == ("guard" if where == "guard" else "exact")
            who = "the guard" if where == "guard" else "the language model"
            assert busy.refusal() == f"I can't answer about this image: {who} is busy with an earlier image."
            hanging.released.set()
            wait_until(lambda: gate.stuck == 0)
            assert gate.ask(WHITE, "Why?").verdict == "allow"
    finally:
        hanging.released.set()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.perf_counter() + 600
    while not true():
        assert time.perf_counter() < deadline
        time.sleep(0.01)


def test_a_guard_whose_calls_share_nothing_answers_beside_a_hung_one() -> None:
    hanging = Hanging(times=1)
    try:
        with gate_of(Shared(hanging), None, timeout=0.05) as gate:
            assert "in time" in gate.ask(WHITE, "Why?").reason
            gate.timeout = 600
            assert gate.ask(WHITE, "Why?").verdict == "allow" and gate.stuck == 1
    finally:
        hanging.released.set()


def test_many_hung_calls_do_not_become_many_threads(hang: Hanging) -> None:
    before = threading.active_count()
    with gate_of(Shared(hang), None, timeout=0.02) as gate:
        results = [gate.ask(WHITE, "Why?") for _ in range(14)]
        assert {result.verdict for result in results} == {"block"}
        assert threading.active_count() - before <= 9 and gate.stuck <= 8
        assert "hang" in (results[-1].error or "")


def test_requests_at_once_take_turns() -> None:
    """A runner is never called twice at the same time, and a request that waits too long is blocked."""
    inside, most = [0], [0]

    def count() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1

    with gate_of(Failing(count), FakeLanguage(at_prefill=count)) as gate:
        results: list[Any] = []
        threads = [threading.Thread(target=lambda: results.append(gate.ask(WHITE, "Why?"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [result.verdict for result in results] == ["allow"] * 4
    assert most[0] <= 2, "guard and language model each once"


def test_a_hung_guard_does_not_keep_python_from_exiting() -> None:
    code = """
import threading
from PIL import Image
from tests.runtimes.gate.test_gate import Failing, gate_of
with gate_of(Failing(threading.Event().wait), None, timeout=0.2) as gate:
    print(gate.ask(Image.new("RGB", (8, 8)), "Why?").reason)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "the guard did not finish in time\n"), done.stderr


# -- the log --------------------------------------------------------------------------------------------


def test_a_log_line_says_why_and_holds_neither_pixels_nor_words(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    path = picture(tmp_path / "green.png", GREEN)
    with Gate(Guard.open(folder, threads=1), FakeLanguage(), POLICY) as gate:
        result = gate.ask(path, "A secret question?")
    line = result.to_json_line()
    stated = json.loads(line)
    assert "\n" not in line and len(line) < 2500 and "secret" not in line
    assert (stated["verdict"], stated["stage"], stated["label"]) == ("allow", "guard", "safe")
    assert stated["bundle"] == gate.digest and len(stated["bundle"]) == 64
    assert (stated["limits"], stated["limits_from"]) == ({"block": 0.9, "allow": 0.1}, "policy")
    assert set(stated["probs"]) == set(stated["exact_probs"]) == set(CLASSES)
    assert stated["image"] == str(path) and stated["ms"]["total"] >= stated["ms"]["guard"] > 0
    assert stated["policy"]["guard"] == {"block": 0.9, "allow": 0.1}
    told = json.loads(result.to_json_line(text=True))
    assert (told["question"], told["answer"]) == ("A secret question?", "answer from prefill 1 of A secret question?")


def test_an_error_that_quotes_the_question_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    failure = ValueError("cannot read 'A secret question?'")
    with gate_of(Failing(), FakeLanguage(at_prefill=failure)) as gate:
        result = gate.ask(_png(), "A secret question?")
    assert "secret" not in result.to_json_line() + caplog.text and "ValueError" in result.to_json_line()
    assert "secret" in result.to_json_line(text=True)
    assert "_prefill" in caplog.text, "a bug is told with the place it was raised at"
    assert result.image is None


def _png() -> bytes:
    stream = io.BytesIO()
    WHITE.save(stream, "PNG")
    return stream.getvalue()


# -- bad calls ------------------------------------------------------------------------------------------


def test_bad_calls() -> None:
    with pytest.raises(InputError, match="a guard, a language model, or both"):
        Gate(None, None)
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="above 0"):
            gate_of(Failing(), None, timeout=timeout)
    with pytest.raises(InputError, match="'gun'"):
        gate_of(Failing(), None, Policy(classes={"gun": "allow"}))
    with pytest.raises(InputError, match="'gun'"), gate_of(None, FakeLanguage(), Policy(classes={"gun": "allow"})):
        pass
    with pytest.raises(InputError, match="nothing would be judged"), gate_of(None, FakeLanguage(None)):
        pass


def test_guard_and_language_model_of_different_checkpoints_are_refused() -> None:
    language = FakeLanguage()
    language.classes = ("safe", "gun", "drug")
    guard = Failing()
    with pytest.raises(InputError, match=r"different classes \(gun, weapon\)"), gate_of(guard, language):
        pass
    with pytest.raises(SafeVLMError, match="not active"):
        guard.infer(np.zeros((1, 16, 16, 3), np.uint8))


def test_a_size_that_differs_only_in_normalisation_is_another_size() -> None:
    other: Preprocessing = PREPROCESSING.model_copy(update={"mean": (0.1, 0.1, 0.1)})
    language = FakeLanguage()
    language.preprocessing = other
    with gate_of(Failing(embeddings=True), language) as gate:
        gate.ask(WHITE, "Why?")
    assert language.embeddings == [None]


def test_waiting_too_long_for_others_is_told_as_that() -> None:
    with gate_of(Failing(), FakeLanguage()) as gate, gate.language_lane.turn(600):
        gate.timeout = 0.05
        result = gate.ask(WHITE, "Why?")
    assert (result.verdict, result.busy) == ("block", True)
    assert result.reason == "the language model was busy with other images"
