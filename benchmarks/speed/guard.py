"""Measure one guard on every runtime side by side: latency, memory, size.

Every peer is measured in a process of its own, one process at a time, so that no peer's libraries, weights or
thread pools stand in another's memory. A machine's speed drifts (other load, heat), so the peers take turns in
several rounds, in the opposite order every other round, instead of one after the other: what is reported is the
median over the rounds of each round's median, and the distance between the rounds' lowest and highest median as
the spread. Two peers that differ by less than their spreads were not told apart.

This module runs in the command's own process and loads neither torch nor a runtime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.speed.guard_lineup import Measured, line_up, line_up_gpu
from benchmarks.speed.isolation import run_isolated
from benchmarks.speed.peer import PLAIN, Device, Subject, Work
from runtimes.guard.bundle import Bundle, open_bundle
from safevlm.errors import EngineUnavailableError, InputError, SafeVLMError
from safevlm.machine import core_count

__all__ = ["GuardSpeed", "Latency", "Row", "SpeedOptions", "Status", "measure_guard", "measure_in_turn"]

Report = Callable[[float, str], None]
Status = Literal["measured", "unavailable", "failed"]
PRECISIONS = ("fp32", "fp16", "int8")
UNAVAILABLE = (InputError.exit_code, EngineUnavailableError.exit_code)
"""With these a peer says that the machine lacks something."""


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """How long to measure what.

    A round times each batch size of each peer at most ``repeats`` times and begins no run after ``seconds``; one
    run is always timed, after one that is not. ``threads`` is given to every peer on the CPU.
    """

    batches: tuple[int, ...] = (1, 8)
    precisions: tuple[str, ...] = ("fp32",)
    rounds: int = 3
    repeats: int = 30
    seconds: float = 5.0
    threads: int = field(default_factory=core_count)
    seed: int = 0
    embeddings: bool = False
    """Measure, too, the guard that gives image embeddings and the vision tower without a guard."""
    peers: str | None = None
    """The interpreter of an environment with OpenVINO and NNCF: what people use on CPUs is measured beside ours."""
    gpu_alone: bool = False
    """Measure nothing on the CPU, and torch in float16, torch.compile and ONNX Runtime on the GPU, too."""

    def __post_init__(self) -> None:
        for name in ("rounds", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} is not allowed. Give at least 1.")
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) != len(self.batches):
            asked = ", ".join(map(str, self.batches)) or "none"
            raise InputError(
                f"--batch {asked} is not allowed. Give batch sizes of at least 1, each once, such as 1 and 8."
            )
        if not self.precisions or not set(self.precisions) <= set(PRECISIONS):
            raise InputError(
                f"--precision {','.join(self.precisions)} is not allowed. Give one or more of {', '.join(PRECISIONS)}."
            )
        if ("int8" in self.precisions or self.peers is not None) and "fp32" not in self.precisions:
            raise InputError(
                f"--precision {','.join(self.precisions)}: INT8 files and peers are made from fp32. Add fp32."
            )
        if self.gpu_alone and self.peers is not None:
            raise InputError("--gpu-alone leaves out the CPU, which --peers run on. Give one of them.")
        if not 0 < self.seconds < float("inf"):
            raise InputError(f"--seconds {self.seconds} is not allowed. Give a time above 0.")


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds a batch: the rounds' median, the 95th percentile of all runs, the rounds' range."""

    median_ms: float
    p95_ms: float
    spread_ms: float | None
    """Highest less lowest median of the rounds; None after a single round."""
    ms_per_image: float
    rounds_ms: tuple[float, ...]
    runs: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One peer at one batch size. What was not measured is None.

    ``reason`` says why nothing was measured, or why some rounds are missing. A peer is ``unavailable`` where the
    machine lacks what it needs, and has ``failed`` where it should have run.
    """

    peer: str
    runtime: str
    precision: str
    device: str
    batch: int
    work: Work
    """``guard``; ``shared``: with image embeddings; ``vision``: embeddings alone."""
    ours: bool
    """Made by this project, not a peer's."""
    weights: Literal["random", "checkpoint"]
    status: Status
    reason: str | None = None
    latency: Latency | None = None
    ratio_to_torch_eager: float | None = None
    """How many times as fast as torch eager on the same device, from the same run: above 1 is faster."""
    max_abs_prob_delta: float | None = None
    """Largest difference of a probability from torch eager's, on the CPU where it was measured, same images; None for
    another guard's file."""
    peak_rss_bytes: int | None = None
    size_bytes: int | None = None
    version: str | None = None
    """Of what ran it, such as ``onnxruntime 1.32.0``."""


@dataclass(frozen=True, kw_only=True)
class GuardSpeed:
    """What was measured, on which guard; ``guard`` has its image size, classes and number of parameters."""

    subject: Subject
    options: SpeedOptions
    guard: Mapping[str, Any]
    rows: tuple[Row, ...]


def measure_guard(
    subject: Subject,
    options: SpeedOptions,
    *,
    bundle: Path | None = None,
    report: Report = lambda _share, _stage: None,
) -> GuardSpeed:
    """Measure torch eager, ONNX Runtime and TensorRT on ``subject``, and the files of ``bundle`` beside them.

    ONNX files are exported for the purpose into the system's temporary folder (``TMPDIR``) and removed. ``report`` gets
    the share of stages done and the stage that begins. A peer that cannot run here, or that fails, gives rows that say
    so.

    Raises InputError for a subject or bundle that cannot be used; SafeVLMError when the export fails.
    """
    with _line_up(subject, options, bundle, report) as (guard, peers):
        _run_rounds(subject, options, peers, report)
    rows = [row for measured in peers for row in _rows(subject, options, measured, peers)]
    return GuardSpeed(subject=subject, options=options, guard=guard, rows=tuple(rows))


def measure_in_turn(subject: Subject, options: SpeedOptions) -> Iterator[GuardSpeed]:
    """Measure as :func:`measure_guard` does, in one round; yield what there is after each peer.

    For whoever may be stopped: what was measured until then is kept.
    """
    rows: list[Row] = []
    with _line_up(subject, options, None, lambda _share, _stage: None) as (guard, peers):
        for measured in peers:
            _run_once(subject, options, measured)
            rows += _rows(subject, options, measured, peers)
            yield GuardSpeed(subject=subject, options=options, guard=guard, rows=tuple(rows))


@contextmanager
def _line_up(
    subject: Subject, options: SpeedOptions, bundle: Path | None, report: Report
) -> Iterator[tuple[Mapping[str, Any], list[Measured]]]:
    """Give what the guard is, and its peers, not yet measured; their files are there as long as the context is."""
    given = None if bundle is None else open_bundle(bundle)
    with tempfile.TemporaryDirectory(prefix="safevlm-speed-") as scratch:
        report(0.0, "exporting")
        guard = _prepare(subject, options, given, scratch)
        report(0.0, "building a TensorRT engine")
        request = {"folder": scratch, "precisions": options.precisions, "max_batch": max(options.batches)}
        engines = run_isolated("benchmarks.speed.guard_engine:build", request, threads=options.threads)
        others = None
        if options.peers is not None:
            report(0.0, "NNCF")
            others = run_isolated(
                "benchmarks.speed.openvino_peer:quantize",
                {"folder": str(Path(scratch, PLAIN)), "seed": options.seed},
                threads=options.threads,
                python=options.peers,
            )
        made = open_bundle(scratch, verify=False)
        if options.gpu_alone:
            yield guard, line_up_gpu(guard, made, given, engines, options.precisions)
        else:
            yield guard, line_up(guard, made, given, engines, python=options.peers, nncf=others)


def _prepare(subject: Subject, options: SpeedOptions, given: Bundle | None, scratch: str) -> Mapping[str, Any]:
    request = {
        "subject": asdict(subject),
        "precisions": options.precisions,
        "bundle": None if given is None else str(given.folder),
        "folder": scratch,
        "embeddings": options.embeddings,
        "plain": options.peers is not None,
    }
    outcome = run_isolated("benchmarks.speed.guard_source:prepare", request, threads=options.threads)
    if outcome.problem is not None:
        kind = InputError if outcome.exit_code == InputError.exit_code else SafeVLMError
        raise kind(outcome.problem)
    return outcome.answers[0]


def _run_rounds(subject: Subject, options: SpeedOptions, peers: list[Measured], report: Report) -> None:
    for number in range(options.rounds):
        turn = peers if number % 2 == 0 else peers[::-1]
        for place, measured in enumerate(turn):
            share = (1 + number * len(peers) + place) / (1 + options.rounds * len(peers))
            report(share, f"round {number + 1}: {measured.peer.title} {measured.peer.precision}")
            _run_once(subject, options, measured)


def _run_once(subject: Subject, options: SpeedOptions, measured: Measured) -> None:
    """Measure one peer in a process of its own, unless it has ended early."""
    if measured.problem is not None:
        return
    request = {
        "peer": asdict(measured.peer),
        "subject": asdict(subject),
        "batches": options.batches,
        "repeats": options.repeats,
        "seconds": options.seconds,
        "threads": options.threads,
        "seed": options.seed,
    }
    there = measured.peer.python
    start = run_isolated if there is None else partial(run_isolated, python=there)
    measured.add(start("benchmarks.speed.guard_peers:measure", request, threads=options.threads))


# -- rows -----------------------------------------------------------------------------------------------


def _rows(subject: Subject, options: SpeedOptions, measured: Measured, peers: Sequence[Measured]) -> list[Row]:
    """Sum up one peer at each batch size, beside those of ``peers`` that are torch eager."""
    eager = [each for each in peers if (each.peer.runtime, each.peer.precision) == ("torch", "fp32")]
    baselines = {each.peer.device: each for each in eager}
    return [_row(subject, measured, batch, baselines, options.rounds) for batch in sorted(options.batches)]


def _row(subject: Subject, measured: Measured, batch: int, baselines: Mapping[Device, Measured], rounds: int) -> Row:
    """Sum up one peer at one batch size; ``baselines`` are torch eager in float32, by device."""
    answers = measured.answers.get(batch, [])
    peer = measured.peer
    unavailable = batch in measured.skipped or measured.exit_code in UNAVAILABLE
    row = Row(
        peer=peer.title,
        runtime=peer.runtime,
        precision=peer.precision,
        device=peer.device,
        batch=batch,
        work=peer.work,
        ours=peer.ours,
        weights="random" if subject.random else "checkpoint",
        status="unavailable" if unavailable else "failed",
        reason=measured.skipped.get(batch, measured.problem),
        size_bytes=measured.size_bytes,
    )
    if not answers:
        return row
    latency = _latency(answers, batch)
    baseline_here = baselines[peer.device]
    baseline = baseline_here.answers.get(batch, [])
    reference = baselines.get("cpu", baseline_here).answers.get(batch, [])
    same_weights = not (subject.random and peer.given)
    return replace(
        row,
        status="measured",
        reason=row.reason if len(answers) < rounds else None,
        latency=latency,
        ratio_to_torch_eager=_latency(baseline, batch).median_ms / latency.median_ms if baseline else None,
        max_abs_prob_delta=_delta(reference[0], answers[0]) if reference and same_weights else None,
        peak_rss_bytes=max(answer["peak_rss_bytes"] for answer in answers),
        version=answers[0].get("version"),
    )


def _latency(rounds: Sequence[Mapping[str, Any]], batch: int) -> Latency:
    medians = [float(np.median(answer["times_ms"])) for answer in rounds]
    times = [time for answer in rounds for time in answer["times_ms"]]
    median = float(np.median(medians))
    return Latency(
        median_ms=median,
        p95_ms=float(np.percentile(times, 95)),
        spread_ms=max(medians) - min(medians) if len(medians) > 1 else None,
        ms_per_image=median / batch,
        rounds_ms=tuple(medians),
        runs=len(times),
    )


def _delta(one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Return the largest difference of a probability; None between guards of different classes, and of a tower."""
    if other["probs"] is None:
        return None
    probs, others = np.array(one["probs"]), np.array(other["probs"])
    return float(np.abs(probs - others).max()) if probs.shape == others.shape else None
