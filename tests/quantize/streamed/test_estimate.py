"""What a run is said to take is near what it takes, and counts what it is made of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calibration.sets.conversations import Sample
from calibration.streaming.batches import Row
from quantize.streamed.estimate import check_memory, estimate, shown_seconds
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError

ROOT = Path(__file__).parents[3]


def rows(count: int, length: int) -> tuple[Row, ...]:
    sample = Sample(kind="text", question="?", answer=None, image=None, name="", where="here")
    return tuple(Row(sample=sample, ids=(1,) * length, answer_length=0, refused=False) for _ in range(count))


def test_estimates_follow_what_they_are_made_of() -> None:
    checkpoint, cpu = open_checkpoint("tiny-safellava"), torch.device("cpu")
    one = estimate(checkpoint, [rows(4, 100)], dtype=torch.float32, device=cpu, speed=1e9)
    four = estimate(checkpoint, [rows(4, 100)] * 4, dtype=torch.float32, device=cpu, speed=1e9)
    assert one.layers == 3 and one.activations == 400 * 256 * 4 and four.activations == 4 * one.activations
    assert four.memory == one.memory, "batches run one by one"
    assert 1.5 < four.seconds_per_layer / one.seconds_per_layer < 4
    half = estimate(checkpoint, [rows(4, 100)], dtype=torch.bfloat16, device=cpu, speed=1e9)
    assert half.activations == one.activations / 2
    assert one.disk > 10_000_000
    with pytest.raises(InputError, match=r"--max-memory 0.1: about .* are needed"):
        check_memory(one, int(0.1 * 2**30))
    assert "in a file" in one.lines(one.memory + 10)[0] and "in memory" in one.lines(2**40)[0]


def test_measured_speed_gives_a_time() -> None:
    found = estimate(open_checkpoint("tiny-safegem"), [rows(8, 64)], dtype=torch.float32, device=torch.device("cpu"))
    assert 1e-4 < found.seconds_per_layer < 10


def test_the_promise_of_memory_is_kept_as_seen_from_outside(tmp_path: Path) -> None:
    """GNU time's figure is the kernel's own: the most resident memory of the process."""
    command = [sys.executable, "-m", "quantize.gptq", "--model", "tiny-safellava", "--out", str(tmp_path / "out")]
    options = [
        "--samples",
        "24",
        "--guard-images",
        "4",
        "--group-size",
        "32",
        "--max-memory",
        "0.7",
        "--answers",
        "given",
    ]
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, capture_output=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, *options], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 <= 0.7 * 2**30


def test_figures_read_as_people_write_them() -> None:
    assert [shown_seconds(count) for count in (5, 120, 7200)] == ["5.0 s", "2.0 min", "2.0 h"]
