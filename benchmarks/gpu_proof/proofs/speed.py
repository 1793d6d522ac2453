"""Step 6: guard speed at a real shape on the GPU, each runtime beside the roofline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_proof.finding import Finding, Task, attempt, failed, proved, unproved
from benchmarks.speed.guard import GuardSpeed, Row, SpeedOptions, measure_in_turn
from benchmarks.speed.peer import Subject, random_images
from benchmarks.speed.reference_runner import build_guard
from benchmarks.speed.report import guard_record
from safevlm.machine import times_ms

__all__ = ["prove_gem", "prove_llava", "prove_qwen"]

SIDE, DRY_SIDE = 8192, 128
COPIED, DRY_COPIED = 2**30, 2**20
RUNS = 8
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def prove_llava(request: Mapping[str, Any]) -> Iterator[Finding]:
    """Time SafeLLaVA-7B's guard."""
    return _prove("SafeLLaVA-7B", "tiny-safellava", request)


def prove_qwen(request: Mapping[str, Any]) -> Iterator[Finding]:
    """Time SafeQwen2.5-VL-7B's guard."""
    return _prove("SafeQwen2.5-VL-7B", "tiny-safeqwen", request)


def prove_gem(request: Mapping[str, Any]) -> Iterator[Finding]:
    """Time SafeGem-12B's guard."""
    return _prove("SafeGem-12B", "tiny-safegem", request)


def _prove(shape: str, tiny: str, request: Mapping[str, Any]) -> Iterator[Finding]:
    task = Task.of(request)
    in_place_of_it = Subject(name=tiny, random=False, tap="projector")
    subject = in_place_of_it if task.dry else Subject(name=shape, random=True)
    return attempt(f"guard speed of {subject.name}", _speed, subject, task)


def _speed(subject: Subject, task: Task) -> Iterator[Finding]:
    lines = _roofline(subject, task)
    yield proved(
        "the roofline of this GPU" if not task.dry else "the roofline of this CPU (dry run)",
        "; ".join(f"{name} {value:.4g}" for name, value in lines.items()),
        **lines,
    )
    options = SpeedOptions(
        batches=(1,) if task.dry else (1, 8, 32),
        precisions=("fp32",) if task.dry else ("fp32", "fp16"),
        rounds=1,
        repeats=2 if task.dry else 20,
        seconds=0.1 if task.dry else 1.5,
        gpu_alone=not task.dry,
    )
    there = 0
    for speed in measure_in_turn(subject, options):
        record = guard_record(speed, "python -m benchmarks.gpu_proof")
        (task.work / f"speed-{subject.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        yield from _rows(speed, there, None if task.dry else lines)
        there = len(speed.rows)


def _rows(speed: GuardSpeed, there: int, lines: Mapping[str, float] | None) -> Iterator[Finding]:
    """Yield the rows from place ``there`` on, as findings."""
    for row in speed.rows[there:]:
        claim = f"{speed.subject.name}, batch {row.batch}: {row.peer} {row.precision} on {row.device}"
        if row.latency is not None:
            yield proved(claim, _words(row, lines), median_ms=row.latency.median_ms, **_share(row, lines))
        elif row.status == "unavailable":
            yield unproved(claim, row.reason or "")
        else:
            yield failed(claim, row.reason or "")


def _words(row: Row, lines: Mapping[str, float] | None) -> str:
    assert row.latency is not None
    share = _share(row, lines).get("share_of_roofline")
    words = [f"{row.latency.median_ms:.2f} ms a batch"]
    words += [f"{share:.0%} of the roofline"] if share is not None else []
    words += [f"{row.ratio_to_torch_eager:.2f} times torch eager"] if row.ratio_to_torch_eager is not None else []
    words += [f"largest difference {row.max_abs_prob_delta:.1e}"] if row.max_abs_prob_delta is not None else []
    return ", ".join(words)


def _share(row: Row, lines: Mapping[str, float] | None) -> dict[str, float]:
    """Return the least time that the work can take, by products or by reading the weights, over the time it took."""
    if lines is None or row.latency is None or row.precision not in DTYPES or row.work != "guard":
        return {}
    products = row.batch * lines["GFLOP an image"] / lines[f"GFLOP/s {row.precision}"]
    weights = lines["GB of weights in fp32"] / (1 + (row.precision == "fp16"))
    least_ms = 1000 * max(products, weights / lines["GB/s"])
    return {"share_of_roofline": least_ms / row.latency.median_ms}


def _roofline(subject: Subject, task: Task) -> dict[str, float]:
    """Measure products and copies on the device, and count the guard's: TF32 is off, as in torch's default."""
    guard, *_ = build_guard(subject)
    image = torch.from_numpy(random_images(guard.preprocessing, 1, seed=0)).to(task.device)
    guard = guard.eval().to(task.device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        guard(image)
    lines = {
        "GFLOP an image": counter.get_total_flops() / 1e9,
        "GB of weights in fp32": sum(each.numel() for each in guard.parameters()) * 4 / 1e9,
    }
    side, copied = (DRY_SIDE, DRY_COPIED) if task.dry else (SIDE, COPIED)
    for name, dtype in DTYPES.items():
        one, other = (torch.randn(side, side, device=task.device).to(dtype) for _ in range(2))
        lines[f"GFLOP/s {name}"] = 2 * side**3 / 1e9 / _seconds(partial(torch.matmul, one, other))
    source = torch.empty(copied, dtype=torch.uint8, device=task.device)
    lines["GB/s"] = 2 * copied / 1e9 / _seconds(partial(torch.empty_like(source).copy_, source))
    return lines


def _seconds(work: Any) -> float:
    """Return the least seconds of several runs."""

    def run() -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    run()
    return min(times_ms(run, most=RUNS, seconds=5)) / 1000
