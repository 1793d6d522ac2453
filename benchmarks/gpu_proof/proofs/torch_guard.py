"""Step 2: the guard on torch, CPU against GPU: TF32 off and on, and the largest activation of each tower in fp16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu_proof.finding import Finding, Task, attempt, checked, proved, unproved
from benchmarks.speed.peer import Subject, random_images
from benchmarks.speed.reference_runner import ReferenceRunner, build_guard
from export.guard.graph import build_graph
from export.guard.half_precision import FLOAT16_MAX, watched
from safevlm.checkpoint.hub import TINY_CHECKPOINTS

__all__ = ["REAL_SHAPES", "prove"]

REAL_SHAPES = ("SafeLLaVA-7B", "SafeQwen2.5-VL-7B", "SafeGem-12B")
PROMISED = 1e-5
"""Largest difference of a probability between float32 on two devices."""


def prove(request: Mapping[str, Any]) -> Iterator[Finding]:
    """Compare each guard on the CPU and on the device, the tiny three first, and look at what float16 gives.

    Heads are read on the projector, wherever the guard taps: two devices are compared, not verdicts.
    """
    task = Task.of(request)
    tiny = [Subject(name=name, random=False, tap="projector") for name in TINY_CHECKPOINTS]
    real = [Subject(name=name, random=True) for name in REAL_SHAPES]
    for subject in tiny[:1] if task.dry else [*tiny, *real]:
        name = _named(subject)
        yield from attempt(f"{name}: float32 on CPU and GPU agree", _parity, subject, task)
        yield from attempt(f"{name}: float16 holds every activation", _largest, subject, task)


def _named(subject: Subject) -> str:
    return f"{subject.name}'s shape, random weights" if subject.random else subject.name


def _parity(subject: Subject, task: Task) -> Iterator[Finding]:
    with ReferenceRunner(subject, "cpu") as runner:
        images = random_images(runner.preprocessing, 1 if subject.random else 8, seed=2)
        expected = runner.infer(images).probs
    with ReferenceRunner(subject, task.device) as runner:
        for tf32 in (False, True):
            with _tf32(tf32):
                found = runner.infer(images).probs
            yield _compared(_named(subject), expected, found, tf32=tf32, dry=task.dry)


def _compared(
    name: str, expected: NDArray[np.float32], found: NDArray[np.float32], *, tf32: bool, dry: bool
) -> Finding:
    delta = float(np.abs(expected - found).max())
    flips = int((expected.argmax(axis=1) != found.argmax(axis=1)).sum())
    measured = f"largest difference of a probability {delta:.2e}, {flips} of {len(found)} labels differ"
    if dry:
        return unproved(f"{name}: CPU and GPU agree, TF32 {'on' if tf32 else 'off'}", f"no GPU (dry run): {measured}")
    if tf32:
        return proved(f"{name}: what TF32 changes", measured, delta=delta, flips=flips)
    return checked(f"{name}: TF32 off, within {PROMISED}", delta <= PROMISED, measured, delta=delta, flips=flips)


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _largest(subject: Subject, task: Task) -> Iterator[Finding]:
    guard, *_ = build_guard(subject)
    images = torch.from_numpy(random_images(guard.preprocessing, 1, seed=2)).to(task.device)
    graph = build_graph(guard, "fp16").to(task.device)
    with torch.inference_mode(), watched(graph.named_modules()) as seen:
        graph(images)
    if not seen.sizes:
        yield unproved(f"{_named(subject)}: float16 holds every activation", "no module was seen")
        return
    name = max(seen.sizes, key=seen.sizes.__getitem__)
    held = not seen.broken and seen.sizes[name] <= FLOAT16_MAX
    measured = f"largest activation {seen.sizes[name]:.6g} ({name}), float16's maximum is {FLOAT16_MAX:,.0f}"
    claim = f"{_named(subject)}: float16 holds every activation"
    yield checked(claim, held, measured, largest=seen.sizes[name], module=name, first_not_finite=seen.broken)
