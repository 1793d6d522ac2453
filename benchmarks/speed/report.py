"""What ``benchmarks.speed`` tells of its measurements: records as JSON takes them, tables as people read them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.speed.gate import GateSpeed
from benchmarks.speed.gateway import GatewaySpeed
from benchmarks.speed.gateway_soak import GatewaySoak
from benchmarks.speed.guard import GuardSpeed, Row
from benchmarks.speed.peer import Subject
from benchmarks.speed.quantize_cases import QuantizeSpeed
from safevlm.errors import InputError
from safevlm.machine import core_count, machine_name, now
from safevlm.terminal.commandline import printable
from safevlm.version import VERSION

__all__ = [
    "check_out",
    "gate_record",
    "gateway_record",
    "guard_record",
    "guard_table",
    "quantize_record",
    "real_quantize_record",
    "soak_record",
]

SCHEMA_VERSION = 1
PACKAGES = (
    "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy", "llama_cpp_python",
    "fastapi", "uvicorn",
)  # fmt: skip
MEBIBYTE = 2**20
RANDOM_WEIGHTS = "random weights, guard head on the projector's output: its speed is real, its verdicts are noise"
HOW_MEASURED: Mapping[str, str] = {
    "latency": (
        "one call from uint8 images in memory to probabilities in memory; median: of the rounds' medians; p95: of all "
        "runs of all rounds; spread: highest less lowest median of the rounds; the first run of a process and batch "
        "size is not counted. Preprocessing of image files is not in it."
    ),
    "memory": (
        "most resident memory (Linux: VmHWM) of a process that does nothing but load and run this peer: interpreter, "
        "libraries, weights with mapped file pages, activations; batch sizes run in rising order, so a larger one "
        "includes the smaller; memory of a GPU is not counted"
    ),
    "size": (
        "ONNX files with their .data file, engines: bytes on disk; torch eager: the checkpoint's tensors of vision "
        "tower, projector and head as they are stored, for random weights as float32 would store them"
    ),
    "ratio": "torch eager's median over this peer's, same device, batch size and run: above 1 is faster",
}
HOW_GATED: Mapping[str, str] = {
    "latency": (
        "from an opened image at the contract's size to a block, or to the text of an answer; median of the rounds' "
        "medians; the first run of each way is not counted; decoding an image file is not in it"
    ),
    "course": "forced by limits of the policy (block at 0, never); guard and exact verdict are computed all the same",
    "passes": "counted with hooks in a run that is not timed",
}
HOW_SERVED: Mapping[str, str] = {
    "requests": "from sending a chat completion with one image to its whole answer, in turns; upstream answers at once",
    "blocks": "requests with an image that is blocked, a second; median of the rounds",
    "first token": "from an opened image to the first piece of text, a new image each time; median",
}
HOW_QUANTIZED: Mapping[str, str] = {
    "seconds": "from opening the model on disk to the quantized one on disk, imports not counted; best of the rounds",
    "memory": "most resident memory (VmHWM) of a process that does nothing else; highest of the rounds",
    "error": (
        "root mean square error of the last hidden states on token ids that were held out, over their root mean "
        "square; dequantized weights in float32"
    ),
    "settings": "4 bits, groups of 128, symmetric; all else each peer's own defaults",
}


def guard_record(speed: GuardSpeed, command: str) -> dict[str, Any]:
    """Return all that was measured, with what, where and when, as JSON takes it; ``command`` is how."""
    return {
        **_record("guard", speed.subject, speed.guard, command),
        "settings": asdict(speed.options),
        "how_measured": dict(HOW_MEASURED),
        "rows": [asdict(row) for row in speed.rows],
    }


def gate_record(speed: GateSpeed, command: str) -> dict[str, Any]:
    """Return the same of a gate."""
    return {
        **_record("gate", speed.subject, speed.model, command),
        "settings": asdict(speed.options),
        "how_measured": dict(HOW_GATED),
        "rows": [asdict(row) for row in speed.rows],
    }


def gateway_record(speed: GatewaySpeed, settings: Any, command: str) -> dict[str, Any]:
    """Return the same of a gateway."""
    return {
        **_surroundings("gateway", command),
        "settings": asdict(settings),
        "how_measured": dict(HOW_SERVED),
        **asdict(speed),
        "overhead_ms": speed.overhead_ms,
        "beside_guard_ms": speed.beside_guard_ms,
    }


def soak_record(soak: GatewaySoak, command: str) -> dict[str, Any]:
    """Return the same of a gateway under attack."""
    return {**_surroundings("gateway-soak", command), **asdict(soak), "growth": soak.growth}


def quantize_record(found: Sequence[QuantizeSpeed], command: str) -> dict[str, Any]:
    """Return the same of quantizing."""
    return {
        **_surroundings("quantize", command),
        "how_measured": dict(HOW_QUANTIZED),
        "cases": [
            {
                **speed.stated(),
                "threads": speed.threads,
                "rounds": speed.rounds,
                "rows": [asdict(row) for row in speed.rows],
            }
            for speed in found
        ],
    }


def real_quantize_record(found: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Return the same of quantizing real weights; ``found`` is what was measured, and of what."""
    return {**_surroundings("quantize-real", command), **found}


def check_out(out: Path | None) -> None:
    """Refuse a place that cannot be written before anything is measured."""
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        problem = "is a folder" if out.is_dir() else f"cannot be written: there is no folder {out.parent}"
        raise InputError(f"--out {out} {problem}. Give the name of a JSON file in a folder that exists.")


def _record(benchmark: str, subject: Subject, stated: Mapping[str, Any], command: str) -> dict[str, Any]:
    return {
        **_surroundings(benchmark, command),
        "subject": {**asdict(subject), **stated, "weights": RANDOM_WEIGHTS if subject.random else "checkpoint"},
    }


def _surroundings(benchmark: str, command: str) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "created": now(),
        "command": command,
        "machine": {
            "name": machine_name(),
            "cores": core_count(),
            "memory_bytes": _memory_bytes(),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), "safevlm-edge": VERSION, **_versions()},
    }


def _versions() -> dict[str, str | None]:
    found = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    return {name: found.get(name) for name in PACKAGES}


def _memory_bytes() -> int | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def guard_table(speed: GuardSpeed) -> list[str]:
    """Return the lines of a table, and below it why a peer is not in it."""
    subject, guard = speed.subject, speed.guard
    layers = "" if subject.layers is None else f" cut to {subject.layers} vision layers"
    weights = f" ({RANDOM_WEIGHTS})" if subject.random else ""
    lines = [
        f"guard of {printable(subject.name)}{layers}{weights}",
        f"{guard['parameters'] / 1e6:.1f} M parameters, {guard['height']}x{guard['width']} pixels, "
        f"{machine_name()}, {speed.options.threads} threads, {speed.options.rounds} rounds",
        "",
    ]
    head = ("peer", "precision", "device", "batch", "median ms", "p95 ms", "spread ms", "ms/image")
    rows: list[tuple[str, ...]] = [(*head, "x torch", "peak MiB", "size MiB", "runs")]
    rows += [_cells(row) for row in speed.rows if row.latency is not None]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(_aligned(cells, widths)).rstrip() for cells in rows]
    lines += _shared_cost(speed.rows)
    reasons = [_reason(row) for row in speed.rows if row.reason is not None]
    return [*lines, "", *dict.fromkeys(reasons)] if reasons else lines


def _shared_cost(rows: Sequence[Row]) -> list[str]:
    """Say what the guard adds to a vision tower that has to run anyway."""
    alone = {
        (row.precision, row.batch): row.latency.median_ms
        for row in rows
        if row.work == "vision" and row.latency is not None
    }
    return [
        f"guard on a shared tower, {row.precision}, batch {row.batch}: "
        f"{row.latency.median_ms / alone[row.precision, row.batch] - 1:+.1%} over the vision tower alone"
        for row in rows
        if row.work == "shared" and row.latency is not None and (row.precision, row.batch) in alone
    ]


def _reason(row: Row) -> str:
    """Say what of a peer is missing (a peer that cannot run here says it once for all batch sizes) and why."""
    which = "" if row.status == "unavailable" else f", batch {row.batch}"
    state = "measured in some rounds only" if row.status == "measured" else "not measured"
    return f"{state}: {printable(f'{row.peer} {row.precision} on {row.device}{which}: {row.reason}')}"


def _cells(row: Row) -> tuple[str, ...]:
    latency = row.latency
    assert latency is not None
    return (
        printable(row.peer),
        row.precision,
        row.device,
        str(row.batch),
        f"{latency.median_ms:.2f}",
        f"{latency.p95_ms:.2f}",
        "-" if latency.spread_ms is None else f"{latency.spread_ms:.2f}",
        f"{latency.ms_per_image:.2f}",
        "-" if row.ratio_to_torch_eager is None else f"{row.ratio_to_torch_eager:.2f}",
        "-" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / MEBIBYTE:.0f}",
        "-" if row.size_bytes is None else f"{row.size_bytes / MEBIBYTE:.1f}",
        str(latency.runs),
    )


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Pad words on the right and numbers on the left."""
    words = 3
    return [
        cell.ljust(width) if column < words else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
