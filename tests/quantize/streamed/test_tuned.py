"""A tuned artifact: the same bytes however often the run ends, little memory or much, bad input before it starts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quantize.gptq import gptq_plan, main
from quantize.methods.grid import Scheme
from quantize.methods.settings import Plan, Progress
from quantize.methods.tuning import TuneOptions, Tuner
from quantize.streamed.compress import Compressed
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.errors import InputError
from tests.quantize.streamed.test_compress import FEW, content, run

MODEL = "tiny-safellava"


def tuned(checkpoint: Checkpoint, **options: Any) -> Plan:
    return gptq_plan(checkpoint, Scheme(bits=2, group_size=32), tuning=TuneOptions(**options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    return run(tmp_path_factory.mktemp("whole") / "out", MODEL, partial(tuned, steps=3))


def test_the_record_says_what_tuning_did(whole: Compressed) -> None:
    assert whole.record["method"]["tuning"] == {"steps": 3, "minutes": None}
    told = [row["tuning"] for layer in whole.record["layers"] for row in layer["linears"]]
    assert {each["steps"] for each in told} == {3}
    assert any(each["kept"] and each["loss_after"] < each["loss_before"] for each in told)


def test_a_run_that_ends_anywhere_goes_on_and_ends_with_the_same_bytes(whole: Compressed, tmp_path: Path) -> None:
    class Stopped(Exception):  # noqa: N818
        pass

    seen: list[int] = []

    def once(index: int, *_: Any) -> None:
        seen.append(index)
        if seen.count(index) == 1:
            raise Stopped

    go = partial(run, tmp_path / "out", MODEL, partial(tuned, steps=3), progress=Progress(layer=once))
    for _ in whole.record["layers"]:
        with pytest.raises(Stopped):
            go()
    again = go()
    assert whole.out is not None
    assert content(tmp_path / "out") == content(whole.out)
    assert again.record["layers"] == whole.record["layers"]


def test_in_the_memory_that_is_said_to_be_enough(tmp_path: Path) -> None:
    """With all hidden states in files."""
    given, plan = replace(FEW, answers="given"), partial(tuned, steps=3)
    first = run(tmp_path / "first", MODEL, plan, calibration=given)
    needed = first.estimate.memory
    again = run(tmp_path / "again", MODEL, plan, calibration=given, max_memory=needed + 1000)
    assert again.out is not None and first.out is not None
    assert content(again.out) == content(first.out)
    with pytest.raises(InputError, match=r"--max-memory .* are needed"):
        run(tmp_path / "less", MODEL, plan, calibration=given, max_memory=needed - 1000)


def test_a_run_by_time_goes_on_with_the_steps_it_had_decided_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tuner, "_timed", lambda self, learn, layers: self._decide(2))
    part = run(tmp_path / "out", MODEL, partial(tuned, minutes=5), layers=1)
    assert part.record["layers"][0]["linears"][0]["tuning"]["steps"] == 2
    monkeypatch.setattr(Tuner, "_timed", lambda *_: pytest.fail("it had been decided"))
    rest = run(tmp_path / "out", MODEL, partial(tuned, minutes=5))
    assert {row["tuning"]["steps"] for layer in rest.record["layers"] for row in layer["linears"]} == {2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--time", "0"], "--time 0 is not allowed. Give a number of minutes above 0."),
        (["--time", "-2"], "--time -2 is not allowed."),
        (["--time", "nan"], "--time nan is not allowed."),
        (["--tune-steps", "0"], "--tune-steps 0 is not allowed. Give at least 1; 100 is usual."),
        (["--time", "1", "--tune-steps", "2"], "--time and --tune-steps exclude each other. Give one of them."),
        (["--nearest", "--time", "1"], "--nearest rounds each weight by itself; it does not work with --time"),
    ],
)
def test_bad_input_is_said_before_anything_is_read(given: list[str], message: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["--model", "no-such-model", "--out", str(tmp_path / "out"), *given])
    assert isinstance(found.exception, InputError)
    assert message in str(found.exception)
