"""Step 3, first half: GPTQ and INT8 of the tiny three on the device: the same bytes twice, killed and resumed.

Commands run inside this process, but for the one that is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu_proof.finding import Finding, Task, attempt, checked, failed, unproved
from benchmarks.speed.isolation import run_isolated
from quantize.streamed.unfinished import Unfinished
from safevlm.checkpoint.hub import TINY_CHECKPOINTS
from safevlm.machine import core_count

__all__ = ["die_after_first_layer", "prove", "quantize"]

METHODS = ("gptq", "int8")
SAME_ERROR = 1.05
"""How many times the CPU's output error a layer's may be: rounding is by other sums there."""


def prove(request: Mapping[str, Any]) -> Iterator[Finding]:
    """Compress each tiny checkpoint with each method, again, killed and resumed, and on the CPU."""
    task = Task.of(request)
    for method in METHODS[:1] if task.dry else METHODS:
        for model in TINY_CHECKPOINTS[:1] if task.dry else TINY_CHECKPOINTS:
            work = task.work / "quantize" / f"{method}-{model}"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            claim = f"{method} of {model} on {task.device}"
            yield from attempt(claim, _runs, claim, method, model, work, task)


def quantize(method: str, model: str, out: Path, device: str, *more: str) -> dict[str, Any]:
    """Run a command of ``quantize`` in this process, and return its record."""
    command = import_module(f"quantize.{method}").main
    command.main(
        ["--model", model, "--out", str(out), "--device", device, "--answers", "none", *more], standalone_mode=False
    )
    return dict(json.loads((out / "compression.json").read_text(encoding="utf-8")))


def _runs(claim: str, method: str, model: str, work: Path, task: Task) -> Iterator[Finding]:
    few = _text_alone(work) if task.dry else ("--samples", "16", "--guard-images", "16")
    first = quantize(method, model, work / "first", task.device, *few)
    quantize(method, model, work / "second", task.device, *few)
    same = _bytes(work / "first") == _bytes(work / "second")
    seconds = first["measured"]["seconds"]
    yield checked(f"{claim}: twice the same bytes", same, f"{seconds:.1f} s", seconds=seconds)
    yield _resumed(claim, method, model, work, task, few)
    if task.dry:
        yield unproved(f"{claim}: as good as on the CPU", "no GPU (dry run)")
        return
    yield _against_cpu(claim, first, quantize(method, model, work / "cpu", "cpu", *few), work)


def _text_alone(work: Path) -> tuple[str, ...]:
    """Return options for rows without images, which are quick to compare with the evaluation suites."""
    rows = work / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"query": f"Count to {number}."}) + "\n" for number in range(4)), encoding="utf-8"
    )
    mix = ("--mix", "unsafe=0,safe=0,text=1", "--samples", "4", "--guard-images", "0")
    return "--calibration", str(rows), *mix


def _resumed(claim: str, method: str, model: str, work: Path, task: Task, few: tuple[str, ...]) -> Finding:
    claim = f"{claim}: killed after a layer and resumed, the same bytes"
    asked = {"method": method, "model": model, "out": str(work / "killed"), "device": task.device, "few": few}
    died = run_isolated(f"{__name__}:die_after_first_layer", asked, threads=core_count())
    if died.problem is None or "SIGKILL" not in died.problem or (work / "killed").exists():
        return failed(claim, f"it was not killed: {died.problem}")
    record = quantize(method, model, work / "killed", task.device, *few)
    same = bool(record["resumed"]) and _bytes(work / "first") == _bytes(work / "killed")
    return checked(claim, same, f"resumptions: {len(record['resumed'])}")


def die_after_first_layer(request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Compress in this process, and be killed as soon as a layer is on the disk."""
    save = Unfinished.save_layer

    def save_and_die(self: Unfinished, *given: Any) -> None:
        save(self, *given)
        os.kill(os.getpid(), signal.SIGKILL)

    Unfinished.save_layer = save_and_die  # type: ignore[assignment, method-assign]
    quantize(request["method"], request["model"], Path(request["out"]), request["device"], *request["few"])
    yield {}


def _against_cpu(claim: str, found: Mapping[str, Any], expected: Mapping[str, Any], work: Path) -> Finding:
    here, there = (_errors(record) for record in (found, expected))
    worst = max((here[name] / there[name] for name in there if there[name] > 0), default=1.0)
    share = _equal_share(work / "first", work / "cpu")
    measured = f"output error at most {worst:.3f} times the CPU's; {share:.2%} of the numbers are equal"
    holds = here.keys() == there.keys() and worst <= SAME_ERROR
    return checked(f"{claim}: as good as on the CPU", holds, measured, worst=worst, equal_share=share)


def _errors(record: Mapping[str, Any]) -> dict[tuple[int, str], float]:
    return {
        (layer["layer"], linear["linear"]): float(linear["relative_error"])
        for layer in record["layers"]
        for linear in layer["linears"]
    }


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def _equal_share(one: Path, other: Path) -> float:
    equal = total = 0
    for path in sorted(one.glob("*.safetensors")):
        here, there = load_file(path), load_file(other / path.name)
        equal += sum(int(torch.eq(here[name], there[name]).sum()) for name in here)
        total += sum(tensor.numel() for tensor in here.values())
    return equal / total
