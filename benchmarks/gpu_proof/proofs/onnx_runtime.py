"""Step 5: ONNX Runtime's CUDA provider: whether it starts, and how far each file is from the CPU's answers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.gpu_proof.finding import Finding, Task, attempt, checked, proved
from benchmarks.speed.guard_peers import CUDA_PROVIDER
from benchmarks.speed.guard_source import prepare
from benchmarks.speed.peer import Subject, random_images
from benchmarks.speed.reference_runner import ReferenceRunner
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from safevlm.checkpoint.hub import TINY_CHECKPOINTS
from safevlm.contract.manifest import GuardFile

__all__ = ["prove", "providers_of", "scratch_bundle"]

BOUNDS = {"fp32": 1e-5, "fp16": 5e-3}
"""Largest difference of a probability from torch in float32; INT8 is judged on images when it is exported."""
IMAGES = 8


def prove(request: Mapping[str, Any]) -> Iterator[Finding]:
    """Write the tiny three as ONNX in each precision, and ask each file on the GPU and torch on the CPU."""
    task = Task.of(request)
    for name in TINY_CHECKPOINTS[:1] if task.dry else TINY_CHECKPOINTS:
        yield from attempt(f"{name}: its ONNX files on the GPU", _files, name, task)


def scratch_bundle(name: str, task: Task) -> Bundle:
    """Return the ONNX files of a tiny checkpoint in each precision, written by the first step that asks."""
    folder = task.work / "onnx" / name
    if not (folder / "manifest.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        precisions = ["fp32"] if task.dry else ["fp32", "fp16", "int8"]
        asked = {"subject": asdict(_subject(name)), "bundle": None, "folder": str(folder), "precisions": precisions}
        list(prepare({**asked, "embeddings": False}))
    return open_bundle(folder, verify=False)


def providers_of(task: Task) -> list[str]:
    """Return ONNX Runtime's providers to ask for."""
    return [*([] if task.dry else [CUDA_PROVIDER]), "CPUExecutionProvider"]


def _subject(name: str) -> Subject:
    return Subject(name=name, random=False, tap="projector")


def _files(name: str, task: Task) -> Iterator[Finding]:
    bundle = scratch_bundle(name, task)
    images = random_images(bundle.manifest.preprocessing, IMAGES, seed=2)
    with ReferenceRunner(_subject(name), "cpu") as runner:
        expected = runner.infer(images).probs
    for file in bundle.files("onnx"):
        claim = f"{name} {file.precision}: ONNX Runtime's answers"
        yield from attempt(claim, _parity, claim, bundle, file, expected, images, task)


def _parity(claim: str, bundle: Bundle, file: GuardFile, expected: Any, images: Any, task: Task) -> Iterator[Finding]:
    with OnnxRuntimeRunner(bundle, file, providers=providers_of(task)) as runner:
        used = runner.session.get_providers()[0]
        delta = float(np.abs(runner.infer(images).probs - expected).max())
    measured = f"{used}, largest difference of a probability {delta:.2e}"
    bound = BOUNDS.get(file.precision)
    if bound is None:
        yield proved(f"{claim}, measured alone", measured, delta=delta)
    else:
        yield checked(f"{claim} are within {bound} of torch's", delta <= bound, measured, delta=delta)
