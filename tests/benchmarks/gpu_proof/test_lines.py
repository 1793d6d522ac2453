"""Lines: what becomes of a step, and which steps a later call takes up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_proof.finding import FAILED, PROVED, UNPROVED, Finding, attempt, checked, failed, proved, unproved
from benchmarks.gpu_proof.lines import LATE, PARTLY, Line, append, is_done, latest, line_of, read_lines, still_to_do
from benchmarks.gpu_proof.section import section
from benchmarks.gpu_proof.steps import STEPS, find_steps
from benchmarks.speed.isolation import Outcome
from safevlm.errors import EngineUnavailableError, InputError, SafeVLMError

HERE: dict[str, Any] = {
    "machine": "a CPU",
    "gpu": "a GPU",
    "driver": "580",
    "versions": {"torch": "2.11"},
    "missing": [],
    "dry": False,
    "wheels": [],
}
GOOD, BAD, LACKING = proved("a", "1 ms"), failed("b", "worse"), unproved("c", "no wheel")


def line(step: int, *findings: Finding, **outcome: Any) -> Line:
    return line_of(STEPS[step], Outcome(answers=findings, **outcome), HERE, seconds=1.26, deadline=60)


@pytest.mark.parametrize(
    ("findings", "ended", "expected"),
    [
        ((GOOD, GOOD), {}, PROVED),
        ((GOOD, BAD, LACKING), {}, FAILED),
        ((GOOD, LACKING), {}, PARTLY),
        ((LACKING,), {}, UNPROVED),
        ((GOOD, BAD), {"problem": "not done after 9 s", "exit_code": 1, "late": True}, LATE),
        ((GOOD,), {"problem": "the process ended with code 1", "exit_code": 1}, FAILED),
        ((GOOD,), {"problem": "no such GPU", "exit_code": 2}, PARTLY),
        ((), {"problem": "no such GPU", "exit_code": 2}, UNPROVED),
    ],
)
def test_what_becomes_of_a_step(findings: tuple[Finding, ...], ended: dict[str, Any], expected: str) -> None:
    assert line(0, *findings, **ended)["outcome"] == expected


def test_a_failure_brings_its_last_words() -> None:
    assert line(0, GOOD, said="noise")["said"] == ""
    assert line(0, BAD, said="a traceback")["said"] == "a traceback"


def test_an_exception_is_a_finding_and_ends_no_step(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: Exception) -> Any:
        yield GOOD
        raise error

    for error, outcome in (
        (InputError("no GPU"), UNPROVED),
        (EngineUnavailableError("no GPU"), UNPROVED),
        (SafeVLMError("worse"), FAILED),
        (RuntimeError("CUDA error\nmore"), FAILED),
    ):
        found = list(attempt("a claim", raising, error))
        assert [each["outcome"] for each in found] == [PROVED, outcome]
        assert str(error).partition("\n")[0] in found[1]["reason"] and "\n" not in found[1]["reason"]
    assert "RuntimeError: CUDA error" in capsys.readouterr().err
    assert failed("a", "b", largest=float("inf"), n=1)["figures"] == {"largest": "inf", "n": 1}, "no JSON holds it"
    assert checked("a", True, "1")["outcome"] == PROVED and checked("a", False, "1")["outcome"] == FAILED


def test_lines_are_read_as_they_were_written_and_a_cut_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "proof.jsonl"
    assert read_lines(path) == []
    append(path, line(0, GOOD))
    with path.open("a") as stream:
        stream.write('{"step": "cut o')
    assert read_lines(path) == [line(0, GOOD) | {"created": read_lines(path)[0]["created"]}]  # type: ignore[operator]
    append(path, line(1, BAD))
    append(path, line(0, BAD))
    assert [each["step"] for each in read_lines(path)] == [STEPS[0].name, STEPS[1].name, STEPS[0].name]
    assert latest(read_lines(path))[STEPS[0].name]["outcome"] == FAILED


@pytest.mark.parametrize("content", [b"no JSON\n", b"[]\n", b'{"step": "cuda"}\n', b"\xff\n"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "proof.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="does not hold the lines of a proof"):
        read_lines(path)


def test_a_later_call_takes_up_what_is_left() -> None:
    late = line(0, GOOD, problem="not done", exit_code=1, late=True)
    lines = [late, line(1, LACKING), line(2, BAD), line(3, GOOD), line(4, GOOD, LACKING)]
    untried = [step.name for step in STEPS[5:]]
    assert [step.name for step in still_to_do(STEPS, lines, HERE)] == [*untried, STEPS[0].name]
    brought = {**HERE, "wheels": [{"wheel": "a.whl", "state": "installed"}]}
    more = [STEPS[1].name, STEPS[4].name]
    assert [step.name for step in still_to_do(STEPS, lines, brought)] == [*untried, STEPS[0].name, *more]
    assert still_to_do(STEPS, lines, {**HERE, "gpu": "another"}) != still_to_do(STEPS, lines, HERE)
    assert not is_done(line(3, GOOD), {**HERE, "dry": True}), "a dry run does not pass for a proof"


def test_the_section_says_what_was_proved_and_what_was_not() -> None:
    lines = [line(0, GOOD, LACKING), line(2, BAD, problem="the process ended | with <code> 1", exit_code=1)]
    text = section(latest(lines))
    assert "- a: 1 ms" in text and "- Not proved: c: no wheel" in text and "- **Failed**: b: worse" in text
    assert "**The step ended early**: the process ended \\| with &lt;code> 1" in text
    assert f"| {STEPS[0].title} | partly proved | 1 | 0 | 1 | 1 |" in text
    assert "a GPU, driver 580; a CPU; torch 2.11." in text and "dry run" not in text
    assert f"Not run: {STEPS[1].title}, {STEPS[3].title}" in text
    assert "A dry run on the CPU" in section(latest([{**lines[0], "dry": True}]))


def test_steps_are_named_and_unknown_ones_refused() -> None:
    assert find_steps(None) == list(STEPS)
    assert [step.name for step in find_steps("tests,cuda")] == ["cuda", "tests"]
    with pytest.raises(InputError, match="--steps dance: use one or several of cuda, "):
        find_steps("cuda,dance")
