"""The comparison of quantizers measures what it says, and random checkpoints have a real model's shape."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.shapes.shapes import find_shape, shape_names
from benchmarks.speed.quantize import measure_quantize
from benchmarks.speed.quantize_cases import CASES, QuantizeRow, QuantizeSpeed, quantize_table
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.errors import InputError

ROOT = Path(__file__).parents[3]
SMALL = replace(
    CASES["llama"],
    layers=2,
    samples=6,
    length=32,
    width=256,
    language={
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 384,
        "vocab_size": 1024,
    },
)


def test_ours_is_measured_with_its_error() -> None:
    found = {bits: measure_quantize(SMALL, peers_python=None, bits=bits) for bits in (4, 8)}
    for speed in found.values():
        (row,) = speed.rows
        assert row.peer == "ours" and row.problem is None, row.problem
        assert row.seconds is not None and row.seconds > 0
        assert row.peak_rss_bytes is not None and row.peak_rss_bytes > 100 * 2**20
    errors = {bits: speed.rows[0].error for bits, speed in found.items()}
    assert errors[4] is not None and errors[8] is not None
    assert 0.02 < errors[4] < 0.6 and errors[8] < errors[4] / 6


def test_the_table_has_ratios_and_reasons() -> None:
    rows = (
        QuantizeRow(peer="ours", version="1", seconds=2.0, peak_rss_bytes=2**20, error=0.1),
        QuantizeRow(peer="gptqmodel", version="2", seconds=5.0, peak_rss_bytes=3 * 2**20, error=0.2),
        QuantizeRow(peer="llm-compressor", problem="it broke"),
    )
    speed = QuantizeSpeed(case=SMALL, threads=1, rounds=1, bits=4, group_size=128, rows=rows)
    lines = quantize_table(speed)
    assert lines[3].split() == ["gptqmodel", "2", "5.0", "2.50", "3", "3.00", "0.2000"]
    assert lines[4].endswith("not measured: it broke")
    with pytest.raises(InputError, match="make peers"):
        measure_quantize(SMALL, peers_python=Path("/nowhere/python"))


@pytest.mark.parametrize("name", shape_names())
def test_a_random_checkpoint_has_the_real_shape(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only headers are made here: the bytes of a layer are gigabytes."""
    from benchmarks import random_checkpoint

    monkeypatch.setattr(random_checkpoint, "_random", lambda name, shape, seed: torch.zeros(()).expand(shape))
    monkeypatch.setattr(
        random_checkpoint, "write_bytes", lambda file, tensor: file.truncate(file.seek(tensor.numel() * 2, 1))
    )
    write_random_checkpoint(find_shape(name), tmp_path / "out", layers=1)
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    shape, config = find_shape(name), build_config(checkpoint)
    assert checkpoint.family.key == shape.family and checkpoint.hidden_size == shape.hidden_size
    text = config.get_text_config()
    assert (text.num_hidden_layers, text.intermediate_size) == (1, shape.language["intermediate_size"])
    assert text.vocab_size == shape.language["vocab_size"]
    assert checkpoint.head.widths == shape.head_widths


def test_the_command_writes_a_checkpoint_that_can_be_compressed(tmp_path: Path) -> None:
    shape = replace(SMALL.shape(), name="small")
    write_random_checkpoint(shape, tmp_path / "model", layers=2)
    rows = [{"query": f"What is {number} and three?", "answer": "A number."} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        sys.executable,
        "-m",
        "quantize.gptq",
        "--model",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "out"),
    ]
    options = ["--calibration", str(tmp_path / "rows.jsonl"), "--samples", "4", "--mix", "text=1", "--layers", "1"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 layers are finished" in done.stdout and "the whole model: about" in done.stdout
    assert "memory: " in done.stderr and "disk: " in done.stderr and "time: " in done.stderr
    help_text = subprocess.run(
        [sys.executable, "-m", "benchmarks.random_checkpoint", "--shape", "SafeLLaVA-7B", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert help_text.returncode == 2 and "exists" in help_text.stderr
