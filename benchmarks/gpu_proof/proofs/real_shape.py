"""Step 3, second half: GPTQ at SafeLLaVA-7B's shape: seconds a layer, the GPU's peak, the whole."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_proof.finding import Finding, Task, attempt, checked, proved, unproved
from benchmarks.gpu_proof.proofs.images import suite_of
from benchmarks.gpu_proof.proofs.quantizing import quantize
from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.shapes.shapes import VisionShape, find_shape
from safevlm.files.storage import shown_bytes
from safevlm.network.prompt_tokens import load_tokenizer

__all__ = ["prove"]

SHAPE = "SafeLLaVA-7B"
SAMPLES, TOKENS, IMAGE_TOKENS, FRAME = 128, 700, 576, 30
"""``FRAME`` are about as many tokens as the prompt has around image and question."""
SECONDS, GPU_BYTES = 180, 8 * 2**30
"""Goals for the whole model."""
DENSE_BYTES = 16 * 10**9
WORDS = "row {number} lists weather, wind and rain of a quiet town by a river; "


def prove(request: Mapping[str, Any]) -> Iterator[Finding]:
    """Write random weights at the shape, 128 samples of about 700 tokens, and compress all layers to 4 bits."""
    task = Task.of(request)
    yield from attempt(f"GPTQ at {SHAPE}'s shape", _whole, task)


def _whole(task: Task) -> Iterator[Finding]:
    shape = _small(find_shape(SHAPE)) if task.dry else find_shape(SHAPE)
    work = task.work / "real-shape"
    work.mkdir(parents=True, exist_ok=True)
    sparse = shutil.disk_usage(work).free < DENSE_BYTES and not task.dry
    model = work / "model"
    if not model.is_dir():
        write_random_checkpoint(shape, model, sparse=sparse)
    samples = 4 if task.dry else SAMPLES
    rows = _write_rows(task, samples, load_tokenizer(model))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    mix = ("--mix", "unsafe=0.5,safe=0.5,text=0", "--samples", str(samples), "--guard-images", "0")
    group = ("--group-size", "32") if task.dry else ()
    out = work / "gptq"
    shutil.rmtree(out, ignore_errors=True)
    record = quantize("gptq", str(model), out, task.device, "--calibration", str(rows), *mix, *group)
    yield from _findings(record, samples, task, sparse=sparse)


def _findings(record: Mapping[str, Any], samples: int, task: Task, *, sparse: bool) -> Iterator[Finding]:
    measured, tokens = record["measured"], record["calibration"]["tokens"]["all"] / samples
    layers = len(record["layers"])
    zeros = "; matrices are zeros, for want of disk space" if sparse else ""
    told = f"{samples} samples of {tokens:.0f} tokens, {layers} layers{zeros}"
    each = measured["seconds_per_layer"]
    figures = {"seconds_per_layer": each, "tokens": tokens, "peak_memory_bytes": measured["peak_memory_bytes"]}
    yield proved("seconds a layer", f"{each:.2f} s; {told}", **figures)
    if record["resumed"]:
        yield unproved("the whole model within its time", "the run was resumed; see the earlier lines for its parts")
    else:
        seconds = measured["seconds"]
        claim = "the whole model" if task.dry else f"the whole model within {SECONDS} s"
        yield checked(claim, task.dry or seconds <= SECONDS, f"{seconds:.1f} s; {told}", seconds=seconds)
    if not torch.cuda.is_available():
        yield unproved("the GPU's peak", "no GPU (dry run)")
        return
    peak = torch.cuda.max_memory_reserved()
    claim = f"at most {shown_bytes(GPU_BYTES)} of the GPU's memory"
    yield checked(claim, peak <= GPU_BYTES, f"{shown_bytes(peak)} reserved by torch", gpu_peak_bytes=peak)


def _small(shape: VisionShape) -> VisionShape:
    """Return a shape that a dry run has the time for: the families' layers, narrow and few."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 32}
    language = {**shape.language, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    language |= {"num_key_value_heads": 2}
    config = {**shape.config, **tower}
    return dataclasses.replace(
        shape, name="small", hidden_size=64, layers_read=1, layers_behind_tap=1, config=config, language=language
    )


def _write_rows(task: Task, samples: int, tokenizer: Any) -> Path:
    """Write calibration rows, each an image and a question that make about ``TOKENS`` tokens together."""
    suite, found = suite_of(task)
    images = [path.relative_to(suite) for path in found]
    rows = []
    for number in range(samples):
        text = ""
        while len(tokenizer(text)["input_ids"]) < TOKENS - IMAGE_TOKENS - FRAME:
            text += WORDS.format(number=number * 1000 + len(text))
        kind = "unsafe" if number % 2 else "safe"
        rows.append({"image": str(images[number % len(images)]), "query": text, "kind": kind})
    path = suite / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
