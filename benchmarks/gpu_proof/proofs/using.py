"""Step 4: gate, run and distill on the device, beside the CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.finding import Finding, Task, attempt, checked, proved, unproved
from benchmarks.gpu_proof.proofs.commands import need
from benchmarks.gpu_proof.proofs.images import PAIRS, suite_of

__all__ = ["prove"]

MODEL, BEHIND = "tiny-safegem", "tiny-safellava"
"""A guard on the projector, and one behind the language model, which distilling is for."""
QUESTION = "What is in the image?"
GATED = (0, 10)
SAME_ANSWERS = 0.99


def prove(request: Mapping[str, Any]) -> Iterator[Finding]:
    """Run the three commands on the device; the first two on the CPU, too."""
    task = Task.of(request)
    work = task.work / "use"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    images = suite_of(task)[1][:: PAIRS if task.dry else PAIRS // 4]
    devices = ("cpu",) if task.dry else ("cpu", task.device)
    yield from attempt("the gate answers alike on CPU and GPU", _gate, work, devices, images)
    yield from attempt("a run answers alike on CPU and GPU", _run, work, devices, 8 if task.dry else 200)
    yield from attempt("a head is distilled on the GPU", _distill, work, task)


def _gate(work: Path, devices: tuple[str, ...], images: list[Path]) -> Iterator[Finding]:
    bundle = work / "bundle"
    need("export.onnx", "--model", MODEL, "--out", bundle, "--parity-images", 4)
    asked = ["--bundle", bundle, "--model", MODEL, "--question", QUESTION, "--max-new-tokens", 8, "--timeout", 600]
    for image in images:
        found = []
        for device in devices:
            told = json.loads(need("runtimes.gate", image, *asked, "--device", device, "--json", codes=GATED).output)
            found.append({key: told[key] for key in ("verdict", "stage", "label", "answer")})
        same = all(each == found[0] for each in found)
        yield checked(f"the gate on {' and '.join(devices)}: one verdict, one answer", same, _words(found[-1]))


def _words(told: Mapping[str, Any]) -> str:
    return ", ".join(str(value) for value in told.values() if value is not None)


def _run(work: Path, devices: tuple[str, ...], rows: int) -> Iterator[Finding]:
    answers = []
    for device in devices:
        out = work / f"run-{device}"
        need("benchmarks.run", "--model", MODEL, "--out", out, "--limit", rows, "--device", device)
        lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        answers.append([json.loads(line)["answer"] for line in lines])
    same = sum(one == other for one, other in zip(answers[0], answers[-1], strict=True))
    measured = f"{same} of {len(answers[0])} answers are the same"
    yield checked(f"a run on {' and '.join(devices)}", same >= SAME_ANSWERS * rows, measured, same=same, rows=rows)


def _distill(work: Path, task: Task) -> Iterator[Finding]:
    if task.dry:
        yield unproved("a head is distilled", "no GPU (dry run), and it takes a minute of a CPU")
        return
    out = work / "head.safetensors"
    done = need("calibration.distill", "--model", BEHIND, "--out", out, "--device", task.device, "--json")
    agreement = json.loads(done.output)["fidelity"]["agreement"]
    yield proved(f"a head is distilled on {task.device}", f"agreement {agreement}")
