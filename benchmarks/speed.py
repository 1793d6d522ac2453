"""Latency, memory and size, peers side by side: ``python -m benchmarks.speed guard --model tiny-safegem``."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.gate_speed import GateOptions, GateSpeed, gate_table, measure_gate
from benchmarks.guard_peers import Subject
from benchmarks.guard_speed import GuardSpeed, Row, SpeedOptions, measure_guard
from benchmarks.shapes import find_shape, shape_names
from models.commandline import printable, run
from models.errors import InputError
from models.family import TapSource
from models.machine import core_count, machine_name
from models.version import VERSION

__all__ = ["gate_record", "guard_record", "guard_table", "main"]

SCHEMA_VERSION = 1
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy")
MEBIBYTE = 2**20
RANDOM_WEIGHTS = "random weights, guard head on the projector's output: a figure of speed, not a guard"
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
        "from an opened picture at the contract's size to a block, or to the text of an answer; median of the rounds' "
        "medians; the first run of each way is not counted; decoding an image file is not in it"
    ),
    "course": "forced by limits of the policy (block at 0, never); guard and exact verdict are computed all the same",
    "passes": "counted with hooks in a run that is not timed",
}


# -- what is told ---------------------------------------------------------------------------------------


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


def _record(benchmark: str, subject: Subject, stated: Mapping[str, Any], command: str) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": {
            "name": machine_name(),
            "cores": core_count(),
            "memory_bytes": _memory_bytes(),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), "safevlm-edge": VERSION, **_versions()},
        "subject": {**asdict(subject), **stated, "weights": RANDOM_WEIGHTS if subject.random else "checkpoint"},
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


# -- the commands ---------------------------------------------------------------------------------------


@click.group()
def main() -> None:
    """Measure speed, size and memory, peers side by side."""


@main.command()
@click.option("--model", help="Folder, one of the six names, hub id[@revision], or tiny-safegem.")
@click.option("--shape", help=f"Random weights at the shape of one of {', '.join(shape_names())}.")
@click.option("--layers", type=int, help="Keep so many of the vision layers that the tap reads; only with --shape.")
@click.option("--tap", type=click.Choice(["projector", "language_model"]), help="Where the guard of --model taps.")
@click.option("--revision", help="Hub revision of --model: a branch, tag or commit.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Measure the files of this guard bundle, too.")
@click.option("--precision", default="fp32", show_default=True, help="Of the exported file: fp32, fp16 or fp32,fp16.")
@click.option("--batch", "batches", type=int, multiple=True, default=SpeedOptions.batches, show_default=True)
@click.option("--embeddings", is_flag=True, help="Measure a shared vision tower, too, and the tower without a guard.")
@click.option("--rounds", type=int, default=SpeedOptions.rounds, show_default=True, help="Turns of each peer.")
@click.option("--repeats", type=int, default=SpeedOptions.repeats, show_default=True, help="Most runs a round.")
@click.option("--seconds", type=float, default=SpeedOptions.seconds, show_default=True, help="No run begins after.")
@click.option("--threads", type=int, help="Of every peer on the CPU.  [default: all cores]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of images and random weights.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to this JSON file.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def guard(
    model: str | None,
    shape: str | None,
    layers: int | None,
    tap: TapSource | None,
    revision: str | None,
    bundle: Path | None,
    precision: str,
    batches: tuple[int, ...],
    embeddings: bool,
    rounds: int,
    repeats: int,
    seconds: float,
    threads: int | None,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> int:
    """Time a guard on torch eager, ONNX Runtime and, where present, TensorRT.

    The guard of --model, or random weights at the --shape of a real one. Exits with 1 when a peer failed; one that
    cannot run here is listed with the reason.
    """
    subject = _subject(model, shape, layers=layers, tap=tap, revision=revision, seed=seed)
    options = SpeedOptions(
        batches=batches,
        precisions=tuple(precision.split(",")),
        embeddings=embeddings,
        rounds=rounds,
        repeats=repeats,
        seconds=seconds,
        threads=core_count() if threads is None else threads,
        seed=seed,
    )
    _check_out(out)
    speed = _with_progress(subject, options, bundle)
    record = guard_record(speed, shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]]))
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    if out is not None:
        _write(out, text)
    click.echo(text.rstrip() if as_json else "\n".join(guard_table(speed)))
    return int(any(row.status == "failed" for row in speed.rows))


@main.command()
@click.option("--model", help="Folder, one of the six names, hub id[@revision], or a tiny checkpoint.")
@click.option("--shape", help=f"Random weights at the shape of one of {', '.join(shape_names())}.")
@click.option("--layers", type=int, help="So many layers of language model and tower; only with --shape.")
@click.option("--tap", type=click.Choice(["projector", "language_model"]), help="Where the guard of --model taps.")
@click.option("--revision", help="Hub revision of --model: a branch, tag or commit.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Guard bundle.  [default: one of its size is made]")
@click.option("--rounds", type=int, default=GateOptions.rounds, show_default=True, help="Turns of each way.")
@click.option("--repeats", type=int, default=GateOptions.repeats, show_default=True, help="Runs a turn.")
@click.option("--max-new-tokens", type=int, default=GateOptions.max_new_tokens, show_default=True)
@click.option("--threads", type=int, help="Of torch and ONNX Runtime.  [default: all cores]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the image and random weights.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to this JSON file.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def gate(
    model: str | None,
    shape: str | None,
    layers: int | None,
    tap: TapSource | None,
    revision: str | None,
    bundle: Path | None,
    rounds: int,
    repeats: int,
    max_new_tokens: int,
    threads: int | None,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time the gate beside no guard, the published way and the exact verdict alone, on the CPU."""
    subject = _subject(model, shape, layers=layers, tap=tap, revision=revision, seed=seed)
    options = GateOptions(
        rounds=rounds,
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        threads=core_count() if threads is None else threads,
        seed=seed,
    )
    _check_out(out)
    speed = measure_gate(subject, options, bundle=bundle)
    record = gate_record(speed, shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]]))
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    if out is not None:
        _write(out, text)
    click.echo(text.rstrip() if as_json else "\n".join(gate_table(speed)))


def _subject(
    model: str | None,
    shape: str | None,
    *,
    layers: int | None,
    tap: TapSource | None,
    revision: str | None,
    seed: int,
) -> Subject:
    if (model is None) == (shape is None):
        given = "neither was given" if model is None else "both were given"
        raise InputError(
            f"one of --model (a checkpoint) and --shape (random weights at a real one's shape) is needed; {given}."
        )
    if model is not None:
        if layers is not None:
            raise InputError("--layers shortens random weights: it goes with --shape, not with --model.")
        return Subject(name=model, random=False, tap=tap, revision=revision, seed=seed)
    assert shape is not None
    if tap is not None or revision is not None:
        raise InputError("--tap and --revision say how a checkpoint is opened: they go with --model, not with --shape.")
    find_shape(shape).shortened(layers)
    return Subject(name=shape, random=True, layers=layers, seed=seed)


def _check_out(out: Path | None) -> None:
    """Refuse a place that cannot be written before anything is measured."""
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        problem = "is a folder" if out.is_dir() else f"cannot be written: there is no folder {out.parent}"
        raise InputError(f"--out {out} {problem}. Give the name of a JSON file in a folder that exists.")


def _write(out: Path, text: str) -> None:
    unfinished = out.with_name(f".{out.name}.partial-{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(out)


def _with_progress(subject: Subject, options: SpeedOptions, bundle: Path | None) -> GuardSpeed:
    """Measure, with a progress bar on a terminal's standard error."""
    if not sys.stderr.isatty():
        return measure_guard(subject, options, bundle=bundle)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("opening", total=1.0)
        return measure_guard(
            subject,
            options,
            bundle=bundle,
            report=lambda share, stage: progress.update(task, completed=share, description=stage),
        )


if __name__ == "__main__":
    run(main)
