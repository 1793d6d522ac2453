"""The watched path: what is measured, what is kept, what fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.shapes.shapes import find_shape
from benchmarks.true_shapes import __main__ as command
from benchmarks.true_shapes.steps import STEPS, Step, steps_of
from benchmarks.true_shapes.watching import watch
from safevlm.terminal.commandline import run


def test_memory_and_reads_are_those_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 2**22)
    code = f"import time; held = bytearray(200 * 2**20); open({str(tmp_path / 'file')!r}, 'rb').read(); time.sleep(0.3)"
    seen = watch(["-c", code])
    assert seen.code == 0 and seen.seconds >= 0.3
    assert 200 * 2**20 < seen.peak_bytes < 300 * 2**20
    assert seen.read_bytes >= 2**22
    failed = watch(["-c", "raise SystemExit('no good')"])
    assert failed.code == 1 and "no good" in failed.said


def test_every_shape_has_its_steps(tmp_path: Path) -> None:
    gem = steps_of(find_shape("SafeGem-27B"), tmp_path, layers=2, sparse=True)
    assert tuple(gem) == STEPS and "--sparse" in gem["write"].arguments
    llava = steps_of(find_shape("SafeLLaVA-7B"), tmp_path, layers=None, sparse=False)
    assert tuple(llava) == STEPS and "--layers" not in llava["write"].arguments
    assert llava["guard-int8"].makes in [Path(word) for word in llava["check"].arguments]


def test_the_command_keeps_what_was_measured_and_tells_what_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {
        "write": Step(name="write", arguments=("-c", "print('done')")),
        "guard": Step(name="guard", arguments=("-c", "x = bytearray(50 * 2**20)"), most_bytes=2**20),
    }
    monkeypatch.setattr(command, "steps_of", lambda *_, **__: steps)
    arguments = ["--shape", "SafeLLaVA-7B", "--work", str(tmp_path), "--json"]
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            run(command.main, arguments)
        assert ended.value.code == 1
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert [row["step"] for row in rows] == ["write", "guard"] and rows[0]["problem"] is None
        assert "; at most 1.0 MiB are promised" in rows[1]["problem"]
        steps["write"] = Step(name="write", arguments=("-c", "raise SystemExit(3)"))  # a step that is done is not run
    with pytest.raises(SystemExit) as ended:
        run(command.main, ["--steps", "write,dance", "--work", str(tmp_path)])
    assert ended.value.code == 2 and "dance is unknown" in capsys.readouterr().err
