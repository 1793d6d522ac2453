"""``benchmarks.gpu_proof``: its dry run on the CPU, and a command that no step stops."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks.gpu_proof import __main__ as command
from benchmarks.gpu_proof import proofs
from benchmarks.gpu_proof.finding import FAILED, PROVED, UNPROVED, Task, failed, proved
from benchmarks.gpu_proof.proofs import commands, gpu_tests, quantizing, rtx
from benchmarks.gpu_proof.steps import STEPS
from benchmarks.speed import guard as guard_speed
from benchmarks.speed.isolation import Outcome
from quantize.streamed.unfinished import Unfinished
from safevlm.errors import MissingExtraError
from tests.benchmarks.speed.test_speed import in_process
from tests.killing import Warm

ROOT = Path(__file__).parents[3]
LOOK: dict[str, Any] = {
    "machine": "a CPU",
    "gpu": "a GPU",
    "driver": None,
    "versions": {},
    "missing": [],
    "libraries": [],
}
ALIKE = ("speed-llava", "speed-qwen")
"""A dry run of these differs from ``speed-gem``'s in the model alone."""


def proof(*arguments: object) -> Result:
    return CliRunner().invoke(command.main, list(map(str, arguments)), standalone_mode=False)


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "proof.jsonl").read_text().splitlines()]


# -- the dry run ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL, so that the test goes on."""


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parent: Warm) -> Iterator[None]:
    """Run steps here and commands in forks, which takes a tenth of the time of fresh processes."""

    def here(function: str, request: Mapping[str, Any], *, threads: int, **_: Any) -> Outcome:
        try:
            return in_process(function, request, threads=threads)
        except Killed:
            Unfinished.save_layer = save_layer  # type: ignore[method-assign]  # what dies was put there for good
            return Outcome(answers=(), problem="the process was ended by SIGKILL", exit_code=1)

    save_layer = Unfinished.save_layer

    def kill(*_: Any) -> None:
        raise Killed

    def forked(module: str, *arguments: object) -> commands.Ran:
        output = tmp_path / "output"
        output.write_text("")
        module = {"runtimes.gate": "runtimes.gate.__main__"}.get(module, module)
        ended = parent.run(module, *map(str, arguments), under=tmp_path / "nowhere", stdout=str(output))
        return commands.Ran(ended.code, output.read_text(), ended.said)

    monkeypatch.setattr(command, "run_isolated", here)
    monkeypatch.setattr(guard_speed, "run_isolated", here)
    monkeypatch.setattr(quantizing, "run_isolated", here)
    monkeypatch.setattr(quantizing, "os", SimpleNamespace(kill=kill, getpid=os.getpid))
    monkeypatch.setattr(commands, "ran", forked)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("in_this_process")
def test_a_dry_run_tries_every_step_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no folder .whl
    steps = [step.name for step in STEPS if step.name not in ALIKE]
    done = proof("--dry-run", "--out", tmp_path / "out", "--steps", ",".join(steps))
    lines = lines_of(tmp_path / "out")
    assert [line["step"] for line in lines] == steps and all(json.dumps(line) in done.stdout for line in lines)
    found = {line["step"]: line for line in lines}
    broken = [(step, each) for step in steps for each in found[step]["findings"] if each["outcome"] == FAILED]
    assert not broken and done.return_value == 0
    assert all(line["dry"] and line["problem"] is None and line["findings"] for line in lines)
    claims = {step: [each["claim"] for each in found[step]["findings"] if each["outcome"] == PROVED] for step in steps}
    assert any("twice the same bytes" in claim for claim in claims["quantize"])
    assert any("killed after a layer and resumed" in claim for claim in claims["quantize"])
    assert any("within 1e-05 of torch's" in claim for claim in claims["onnxruntime"])
    reasons = [each["reason"] for line in lines for each in line["findings"] if each["outcome"] == UNPROVED]
    assert all("GPU" in reason or "TensorRT" in reason or "cuda-python" in reason for reason in reasons), reasons
    assert "A dry run on the CPU" in (tmp_path / "out" / "proof.md").read_text()
    page = (tmp_path / "out" / "speed.html").read_text()
    assert "Gpu proof" in page and "twice the same bytes" in page and "tiny-safegem" in page
    assert proof("--dry-run", "--out", tmp_path / "out", "--steps", ",".join(steps)).return_value == 0
    assert lines_of(tmp_path / "out") == lines, "what ended is not run again"


# -- the command ------------------------------------------------------------------------------------------


Play = Callable[..., None]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Play:
    """Play the processes: what each step's does, and what the machine is."""
    monkeypatch.chdir(tmp_path)

    def set_up(outcomes: Mapping[str, Outcome], **look: Any) -> None:
        by_function = {f"{command.PROOFS}.{step.function}": step.name for step in STEPS}

        def run(function: str, request: Mapping[str, Any], **options: Any) -> Outcome:
            assert options["deadline"] > 0
            if function.endswith(":look"):
                return Outcome(answers=({**LOOK, **look},))
            if function.endswith(":write"):
                return Outcome(answers=({"page": "speed.html"},))
            return outcomes.get(by_function[function], Outcome(answers=(proved("it holds"),)))

        monkeypatch.setattr(command, "run_isolated", run)

    return set_up


def test_no_step_stops_the_others_and_a_later_call_resumes(play: Play, tmp_path: Path) -> None:
    crashed = Outcome(answers=(proved("a"),), problem="the process was ended by SIGSEGV", exit_code=1, said="words")
    late = Outcome(answers=(), problem="not done after 60 s", exit_code=1, late=True)
    play({"cuda": late, "torch": crashed, "rtx": Outcome(answers=(failed("b", "worse"),))})
    done = proof("--out", tmp_path / "out")
    lines = lines_of(tmp_path / "out")
    assert [line["step"] for line in lines] == [step.name for step in STEPS] and done.return_value == 1
    assert [json.loads(line)["step"] for line in done.stdout.splitlines()] == [step.name for step in STEPS]
    assert (lines[0]["outcome"], lines[1]["outcome"], lines[1]["said"]) == ("late", "failed", "words")
    play({})
    assert proof("--out", tmp_path / "out").return_value == 1, "what failed stays failed until it is run again"
    assert [line["step"] for line in lines_of(tmp_path / "out")[len(STEPS) :]] == ["cuda"]
    assert proof("--out", tmp_path / "out", "--again", "--steps", "torch,rtx").return_value == 0


def test_where_no_time_is_left_nothing_begins(play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play({})
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=iter(range(10**6)).__next__))
    done = proof("--out", tmp_path / "out", "--minutes", 0.05)  # a second passes whenever the time is asked for
    run = [line["step"] for line in lines_of(tmp_path / "out")]
    assert run == [STEPS[0].name]
    assert f"no time is left for {STEPS[1].name}, " in done.stderr and "run the command again" in done.stderr
    assert lines_of(tmp_path / "out")[0]["deadline_seconds"] <= 3


@pytest.mark.parametrize(
    ("look", "reason"),
    [
        ({"gpu": None}, "no GPU that torch can use; --dry-run"),
        ({"missing": ["pydantic"]}, "missing packages: pydantic; bring them as wheels"),
    ],
)
def test_what_the_machine_lacks_is_said_of_each_step(
    play: Play, tmp_path: Path, look: dict[str, Any], reason: str
) -> None:
    play({}, **look)
    assert proof("--out", tmp_path / "out").return_value == 0
    lines = lines_of(tmp_path / "out")
    assert len(lines) == len(STEPS) and {line["outcome"] for line in lines} == {UNPROVED}
    assert all(reason in line["findings"][0]["reason"] for line in lines)


def test_a_folder_that_is_not_there_is_refused(play: Play, tmp_path: Path) -> None:
    play({})
    assert "there is no such folder. --prepare" in str(proof("--wheels", tmp_path / "nowhere").exception)


def test_the_command_starts_without_what_wheels_bring(tmp_path: Path) -> None:
    hide = "import sys; sys.modules.update(dict.fromkeys(['pydantic', 'torch', 'transformers', 'rich', 'jinja2']));"
    code = f"{hide} import benchmarks.gpu_proof.__main__, benchmarks.speed.isolation, benchmarks.gpu_proof.machine"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- single steps -----------------------------------------------------------------------------------------


def test_an_engine_is_asked_about_only_where_the_library_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a library that names an engine as unfit, and a command that builds one."""
    manifest = {"files": [{"kind": "engine", "path": "a.plan", "precision": "fp16", "engine": {"targets": ["sm80"]}}]}
    validity = SimpleNamespace(INVALID="INVALID")
    library = SimpleNamespace(
        __version__="1.7",
        EngineValidity=validity,
        Logger=SimpleNamespace(ERROR=0, __call__=None),
        Runtime=lambda _: SimpleNamespace(get_engine_validity=lambda _: ("INVALID", "UNSUPPORTED_CC")),
    )
    library.Logger = type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None})

    def need(module: str, *arguments: object, **_: Any) -> None:
        folder = Path(str(arguments[arguments.index("--out") + 1]))
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "a.plan").write_bytes(b"plan")

    monkeypatch.setattr(rtx, "need", need)
    monkeypatch.setattr(rtx, "ran", lambda *_: commands.Ran(2, "", "error: the engine is not for this GPU"))
    request = {"device": "cpu", "dry": True, "work": str(tmp_path)}
    monkeypatch.setattr(rtx, "_library", lambda: library)
    built, not_run = rtx.prove(request)
    assert built["outcome"] == PROVED and "fp16 for sm80" in built["measured"] and "no GPU" in not_run["reason"]
    capability = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda _: (9, 0))
    monkeypatch.setattr(rtx, "torch", SimpleNamespace(cuda=capability))
    outcomes = [(each["outcome"], each["reason"]) for each in rtx.prove(request)]
    assert [outcome for outcome, _ in outcomes] == [PROVED, PROVED, PROVED, UNPROVED]
    assert "nothing for compute capability 9.0" in str(outcomes[-1][1])
    monkeypatch.setattr(rtx, "MODULES", ("no_such_library",))
    monkeypatch.undo()
    monkeypatch.setattr(rtx, "MODULES", ("no_such_library",))
    (lacking,) = rtx.prove(request)
    assert lacking["outcome"] == UNPROVED and "tensorrt-rtx" in lacking["reason"]
    with pytest.raises(MissingExtraError):
        rtx._library()


def test_each_gpu_test_is_a_finding() -> None:
    printed = (
        "PASSED tests/a.py::test_one\nFAILED tests/a.py::test_two - assert 1 == 2\nSKIPPED [1] tests/b.py:7: no GPU\n"
    )
    found = [(each["outcome"], each["claim"], each["reason"]) for each in gpu_tests._tests(printed)]
    assert found[0][:2] == (PROVED, "tests/a.py::test_one")
    assert found[1] == (FAILED, "tests/a.py::test_two", "assert 1 == 2")
    assert found[2][0] == UNPROVED and "no GPU" in str(found[2][2])


def test_whatever_skips_for_want_of_a_gpu_is_marked() -> None:
    marked = set(gpu_tests.files_marked(ROOT / "tests"))
    assert {ROOT / "tests/export/test_trt.py", ROOT / "tests/runtimes/guard/test_tensorrt_runner.py"} <= marked
    skips = re.compile(r"skip\([^)]*(?:GPU|CUDA)|skipif\([^)]*cuda", re.IGNORECASE)
    texts = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)}
    assert {path for path, text in texts.items() if skips.search(text)} <= marked


def test_every_step_has_its_function() -> None:
    for step in STEPS:
        module, _, name = step.function.partition(":")
        assert callable(getattr(__import__(f"{proofs.__name__}.{module}", fromlist=[name]), name))
    assert Task.of({"device": "cuda", "dry": False, "work": "a"}).work == Path("a")
