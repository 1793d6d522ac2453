"""Small records of every kind, made by the functions that make the real ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.speed.gate import GateOptions, GateRow, GateSpeed
from benchmarks.speed.gateway import GatewayOptions, GatewaySpeed
from benchmarks.speed.guard import GuardSpeed, Latency, Row, SpeedOptions
from benchmarks.speed.peer import Device, Subject
from benchmarks.speed.quantize_cases import CASES, QuantizeRow, QuantizeSpeed
from benchmarks.speed.report import gate_record, gateway_record, guard_record, quantize_record
from benchmarks.true_shapes import __main__ as true_shapes
from benchmarks.true_shapes.steps import Step

__all__ = ["all_records", "gate", "gateway", "guard", "quantize", "true_shapes_record", "write"]

COMMAND = "python -m benchmarks.speed {} --shape SafeGem-12B --rounds 3 --threads 2 --out build/speed/{}.json"
MEBIBYTE = 2**20
OURS = "ONNX Runtime"


def guard(*, random: bool = True) -> dict[str, Any]:
    """Return a record of three peers on the CPU, one that failed, one that cannot run and one on a GPU."""
    shared = "ONNX Runtime, guard with embeddings"
    rows = [
        *(_row("torch eager", batch, (61.0 * batch, 60.0 * batch, 64.5 * batch)) for batch in (1, 8)),
        *(_row("ONNX Runtime", batch, (24.25 * batch, 24.0 * batch, 30.0 * batch)) for batch in (1, 8)),
        *(_row(shared, batch, (25.5 * batch, 25.0 * batch, 26.0 * batch)) for batch in (1, 8)),
        replace(_row("OpenVINO", 1, (20.0,)), version="openvino 2026.4.1"),
        replace(_row("ncnn", 1, ()), status="failed", reason="the process was ended by SIGKILL"),
        *(replace(_row("TensorRT", batch, (), "gpu"), status="unavailable", reason="no GPU") for batch in (1, 8)),
        replace(_row("torch eager", 1, (0.75, 0.5, 0.7), "gpu"), reason="round 3: out of memory"),
    ]
    subject = Subject(name="SafeGem-12B", random=random, layers=4)
    stated = {"height": 896, "width": 896, "classes": 20, "parameters": 417_123_456}
    options = SpeedOptions(batches=(1, 8), threads=2)
    record = guard_record(
        GuardSpeed(subject=subject, options=options, guard=stated, rows=tuple(rows)), COMMAND.format("guard", "guard")
    )
    return as_written(record)


def _row(peer: str, batch: int, rounds: tuple[float, ...], device: Device = "cpu") -> Row:
    latency = None
    if rounds:
        median = sorted(rounds)[len(rounds) // 2]
        latency = Latency(
            median_ms=median,
            p95_ms=1.2 * max(rounds),
            spread_ms=max(rounds) - min(rounds) if len(rounds) > 1 else None,
            ms_per_image=median / batch,
            rounds_ms=rounds,
            runs=10 * len(rounds),
        )
    return Row(
        peer=peer,
        runtime="torch" if peer == "torch eager" else "onnxruntime",
        precision="fp32",
        device=device,
        batch=batch,
        work="guard",
        ours=peer in (OURS, f"{OURS}, guard with embeddings"),
        weights="random",
        status="measured",
        latency=latency,
        ratio_to_torch_eager=61.0 * batch / latency.median_ms if latency and device == "cpu" else None,
        max_abs_prob_delta=1.25e-7 if latency else None,
        peak_rss_bytes=(1500 + 100 * batch) * MEBIBYTE if latency else None,
        size_bytes=1591 * MEBIBYTE + MEBIBYTE // 2,
    )


def gate() -> dict[str, Any]:
    """Return a record of four ways."""
    passes = {"guard": 1, "vision": 0, "prefill": 0, "decode": 7}
    courses = (
        ("no guard", "answer", 812.5, 0.0),
        ("published", "block", 640.0, None),
        ("published", "answer", 1432.0, 619.5),
        ("gate", "block", 31.5, None),
        ("gate", "unsure, answer", 811.25, -1.25),
    )
    rows = tuple(
        GateRow(way=way, course=course, median_ms=ms, spread_ms=2.5, added_ms=added, passes=passes, runs=9)
        for way, course, ms, added in courses
    )
    model = {"height": 336, "width": 336, "prompt_tokens": 600, "language_layers": 2, "tap": "x", "head": "random"}
    subject = Subject(name="SafeLLaVA-7B", random=True, layers=2)
    speed = GateSpeed(subject=subject, options=GateOptions(threads=2), model=model, rows=rows)
    return as_written(gate_record(speed, COMMAND.format("gate", "gate")))


def gateway() -> dict[str, Any]:
    """Return a gateway's record."""
    speed = GatewaySpeed(
        bundle="tiny-safegem-guard",
        image="168x168 PNG",
        direct_ms=(1.5, 2.25),
        gateway_ms=(5.25, 9.5),
        guard_ms=1.5,
        through={"gateway": 90.0, "upstream": 400.0},
        blocks_alone=201.5,
        blocks_together=388.0,
        clients=64,
        first_token={"no gate": 40.0, "gate, guard on ONNX Runtime": 44.0},
    )
    return as_written(gateway_record(speed, GatewayOptions(rounds=3), COMMAND.format("gateway", "gateway")))


def quantize() -> dict[str, Any]:
    """Return a record of one case: this project, a peer and a peer that broke."""
    rows = (
        QuantizeRow(peer="ours", version="0.1.0", seconds=42.5, peak_rss_bytes=900 * MEBIBYTE, error=0.1234),
        QuantizeRow(peer="gptqmodel", version="7.6.0", seconds=85.0, peak_rss_bytes=1800 * MEBIBYTE, error=0.13),
        QuantizeRow(peer="llm-compressor", problem="it broke"),
    )
    speed = QuantizeSpeed(case=CASES["llama"], threads=2, rounds=1, bits=4, group_size=128, rows=rows)
    return as_written(quantize_record([speed], COMMAND.format("quantize", "quantize")))


def true_shapes_record() -> dict[str, Any]:
    """Return a record of two real commands: one that keeps its promise and one that does not."""
    kept = Step(name="write", arguments=("-c", "print('done')"), most_bytes=2**32)
    broken = Step(name="guard", arguments=("-c", "x = bytearray(50 * 2**20)"), most_bytes=2**20)
    rows = {step.name: true_shapes._measure("SafeLLaVA-7B", 2, False, step) for step in (kept, broken)}
    return as_written(true_shapes._record(rows))


def all_records() -> dict[str, dict[str, Any]]:
    """Return one of each kind, by kind."""
    made = (guard(), gate(), gateway(), quantize(), true_shapes_record())
    return {record["benchmark"]: record for record in made}


def as_written(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record as a reader of its file has it: lists instead of tuples."""
    found: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    return found


def write(folder: Path, records: dict[str, dict[str, Any]]) -> list[Path]:
    """Write each record to a file of its own; return the paths."""
    paths = [folder / f"{name}.json" for name in records]
    for path, record in zip(paths, records.values(), strict=True):
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return paths
