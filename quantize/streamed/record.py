"""What compression.json says of the calibration set, the layers and the source."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

from calibration.answers import Answer
from calibration.sets.beginnings import Beginnings, beginnings_record
from calibration.sets.mix import samples_sha256
from calibration.sets.samples import Calibration, CalibrationOptions
from calibration.streaming.batches import Batch
from quantize.methods.settings import Plan, RunOptions
from quantize.streamed.layers import linear_names
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.weights.shards import GUARD_FILE
from safevlm.machine import machine_name, peak_rss
from safevlm.network.device import GpuUse
from safevlm.version import VERSION

__all__ = [
    "calibration_record",
    "identity",
    "jsonable",
    "measured_record",
    "recipe_record",
    "rows_record",
    "summary",
    "token_counts",
]


def recipe_record(
    checkpoint: Checkpoint,
    chosen: Calibration,
    calibration: CalibrationOptions,
    plan: Plan,
    options: RunOptions,
    device: str,
) -> dict[str, Any]:
    """Return all that an artifact's bytes depend on: an unfinished run goes on only with the same."""
    return {
        "method": dict(plan.recipe),
        "rotate": plan.rotate,
        "checkpoint": identity(checkpoint),
        "calibration": {**jsonable(calibration), "source": chosen.source.sha256},
        "samples": samples_sha256(chosen.samples, [None] * len(chosen.samples)),
        "run": {"dtype": options.dtype_name, "device": device, "batch_tokens": options.batch_tokens},
        "version": VERSION,
    }


def measured_record(options: RunOptions, max_memory: int, gpu: GpuUse | None) -> dict[str, Any]:
    """Return what a run took, in bytes, and on what it ran."""
    return {
        "peak_memory_bytes": peak_rss(),
        "peak_gpu_memory_bytes": gpu.peak_bytes if gpu else None,
        "max_memory_bytes": max_memory,
        "machine": machine_name(),
        "device": options.device,
        "dtype": options.dtype_name,
        "gpu": gpu.name if gpu else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safevlm-edge": VERSION,
    }


def calibration_record(
    chosen: Calibration, answers: Sequence[Answer | None], options: CalibrationOptions
) -> dict[str, Any]:
    """Return where samples come from, what they are, and whose answers they have."""
    own = sum(answer is not None and answer.ids is not None for answer in answers)
    none = sum(answer is None for answer in answers)
    texts = [None if answer is None else answer.text for answer in answers]
    return {
        "source": chosen.source.source,
        "source_sha256": chosen.source.sha256,
        "sha256": samples_sha256(chosen.samples, texts),
        "samples": dict(Counter(sample.kind for sample in chosen.samples)),
        "seed": options.mix.seed,
        "mix": dict(options.mix.shares),
        "left_out": dict(chosen.source.left_out),
        "kinds_from_answers": chosen.source.kinds_from_answers,
        "answers": {"own": own, "given": len(answers) - own - none, "none": none},
        "token_weights": asdict(options.weights),
    }


def rows_record(batches: Sequence[Batch], beginnings: Beginnings) -> dict[str, Any]:
    """Return what is calibrated on, row by row and token by token."""
    rows = [row for batch in batches for row in batch.rows]
    return {"tokens": token_counts(batches), "beginnings": beginnings_record(rows, beginnings)}


def token_counts(batches: Sequence[Batch]) -> dict[str, int]:
    """Return how many tokens are calibrated on, and how many of which sort."""
    rows = [row for batch in batches for row in batch.rows]
    image = sum(int(batch.prefill.image_mask.sum()) for batch in batches)
    return {
        "all": sum(len(row.ids) for row in rows),
        "image": image,
        "answer": sum(row.answer_length for row in rows),
        "refusal": sum(row.answer_length for row in rows if row.refused),
    }


def summary(checkpoint: Checkpoint, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean bits of the decoder's linears and what did not go as asked for."""
    sizes = {
        (index, name): torch.Size(checkpoint.tensors.shape(f"{full}.weight")).numel()
        for index, name, full in linear_names(checkpoint)
    }
    rows = [(layer["layer"], linear) for layer in layers for linear in layer["linears"]]
    weight = sum(sizes[index, row["linear"]] for index, row in rows)
    bits = sum(sizes[index, row["linear"]] * row["bits"] for index, row in rows)
    named = [(f"layers.{index}.{row['linear']}", row) for index, row in rows]
    return {
        "bits_per_weight": bits / weight if weight else None,
        "rounded_to_nearest": [name for name, row in named if row["kept"] == "rtn"],
        "damped_more": [name for name, row in named if row.get("damped_more")],
        "dead_columns": sum(row.get("dead_columns", 0) for _, row in named),
    }


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what tells a checkpoint from another one without reading its weights."""
    files = [path for path in checkpoint.folder.iterdir() if path.suffix in (".safetensors", ".json")]
    guard = checkpoint.folder / GUARD_FILE
    stats = {path.relative_to(checkpoint.folder).as_posix(): path.stat() for path in sorted(files)}
    if guard.is_file():
        stats[GUARD_FILE] = guard.stat()
    return {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "tap": checkpoint.tap.source,
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


def jsonable(options: CalibrationOptions) -> dict[str, Any]:
    found = asdict(options)
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]
