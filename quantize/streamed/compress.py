"""From a checkpoint to a compressed one: calibration samples, their leakage check, rounding, artifact, drift.

What all ways of rounding share; each of them is a :class:`quantize.streamed.layers.Method`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibration.answers import Answer
from calibration.sets.conversations import Sample
from calibration.sets.samples import Calibration, CalibrationOptions, calibrate_on
from calibration.streaming.batches import Batch, Row, TokenWeights, embed_batches, lay_out, pack_rows
from calibration.streaming.gradients import gradient_weights
from calibration.streaming.sequential import Activations, LayerStream
from quantize.bits.auto_bits import sensitivity_of
from quantize.methods.settings import Plan, Progress, RunOptions
from quantize.streamed.answers import kept_answers, whose
from quantize.streamed.artifact import kept_dtype, write_light_files, write_tensors
from quantize.streamed.caches import Caches
from quantize.streamed.drift import answer_drift, exact_probs, guard_drift
from quantize.streamed.estimate import Estimate, check_memory, estimate, with_backward
from quantize.streamed.held_out import HeldOut, held_out_samples
from quantize.streamed.layers import round_layers
from quantize.streamed.record import calibration_record, measured_record, recipe_record, rows_record, summary
from quantize.streamed.rotated import rotated
from quantize.streamed.rotation_check import checked_rotation
from quantize.streamed.unfinished import RECORD, Unfinished
from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.checkpoint.weights.finite import check_values
from safevlm.errors import InputError
from safevlm.files.storage import check_room, check_writable
from safevlm.machine import available_memory, memory_advice
from safevlm.network.device import gpu_room, gpu_use, reset_gpu_peak, torch_device
from safevlm.network.reference import guard_sha256

__all__ = ["Compressed", "check_place", "compress"]

SCHEMA_VERSION = 1
MEMORY_SHARE = 0.8
"""Of the available memory, that a run takes where it is not told."""
ADVICE = (
    "Layers that are finished are kept. Free memory or use another GPU (--device cuda:N) and run the command again. "
    "Or give a new --out with --dtype bfloat16, which takes less memory, or with --device cpu."
)


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What came out: ``out`` is ``None`` when the run ended after ``--layers``."""

    out: Path | None
    record: dict[str, Any]
    estimate: Estimate
    seconds_per_layer: float | None


def compress(
    checkpoint: Checkpoint,
    out: Path,
    plan: Plan,
    calibration: CalibrationOptions = CalibrationOptions(),
    options: RunOptions = RunOptions(),
    progress: Progress = Progress(),
    chosen: Calibration | None = None,
) -> Compressed:
    """Write a compressed checkpoint to the folder ``out``; all of it or nothing.

    Killed, it goes on at the last finished layer when called again with the same arguments, and ends with the same
    bytes. ``chosen`` saves choosing the samples again.

    Raises InputError for a checkpoint that is quantized already, a folder that exists, a bad or leaking calibration
    set, too little memory, a full disk; CheckpointError.
    """
    with memory_advice(ADVICE):
        return _compress(checkpoint, out, plan, calibration, options, progress, chosen)


def _compress(
    checkpoint: Checkpoint,
    out: Path,
    plan: Plan,
    calibration: CalibrationOptions,
    options: RunOptions,
    progress: Progress,
    chosen: Calibration | None,
) -> Compressed:
    started, device = time.monotonic(), torch_device(options.device)
    reset_gpu_peak(device)
    gpu = gpu_use(device)
    check_place(checkpoint, out)
    plan.method.check(checkpoint)
    turned = rotated(checkpoint, plan.rotate)
    chosen = chosen or calibrate_on(checkpoint, calibration, progress.status)
    if not chosen.leakage.clean:
        progress.say(f"LEAKAGE ALLOWED: {len(chosen.leakage.leaks)} hits; reports about this artifact are ANOMALOUS.")
    max_memory = options.max_memory or int(MEMORY_SHARE * available_memory())
    recipe = recipe_record(checkpoint, chosen, calibration, plan, options, gpu.name if gpu else "cpu")
    with Unfinished(out, recipe) as unfinished:
        check_values(checkpoint.tensors, partial(_kept_in, checkpoint), progress.status)
        rotation = checked_rotation(
            checkpoint,
            turned,
            plan.rotate,
            chosen.source.samples,
            unfinished,
            progress,
            grid=calibration.grid,
            max_bytes=max_memory // 4,
            device=options.device,
        )
        samples, unseen = held_out_samples(chosen, calibration.mix.seed)
        asked = (*chosen.samples, *samples)
        answers = kept_answers(checkpoint, asked, calibration, options, max_memory, unfinished, progress)
        answers, others = answers[: len(chosen.samples)], answers[len(chosen.samples) :]
        held_out = HeldOut(samples, others, unseen=unseen, seed=calibration.mix.seed, batch_tokens=options.batch_tokens)
        run = _Run(turned, checkpoint, unfinished, plan, options, calibration.weights, max_memory, progress)
        outcome = run.round(chosen.samples, answers, calibration, held_out)
        record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "source": {
                "name": checkpoint.name,
                "revision": checkpoint.revision,
                "family": checkpoint.family.key,
                "guard_sha256": guard_sha256(checkpoint),
                "tap": asdict(checkpoint.tap),
            },
            "method": dict(run.plan.recipe),
            "rotation": rotation,
            "sensitivity": run.sensitivity,
            "calibration": calibration_record(chosen, answers, calibration) | outcome.rows,
            "leakage": chosen.leakage.record(),
            "anomalous": not chosen.leakage.clean,
            "random_weights": checkpoint.random_weights,
            "layers": [{"layer": index, "linears": unfinished.report(index)} for index in unfinished.finished()],
            "consumers": list(run.plan.consumers),
            "resumed": unfinished.resumed,
            "answers": outcome.answers | {"are": whose(answers)},
            "held_out_kl": outcome.held_out_kl,
        }
        record["summary"] = summary(checkpoint, record["layers"])
        if outcome.answers:
            artifact = run.write(record)
            record["guard"] = run.guard(open_checkpoint(str(artifact)), chosen, calibration.grid)
            record["measured"] = {"seconds": time.monotonic() - started, "seconds_per_layer": run.seconds_per_layer}
            record["measured"] |= measured_record(options, max_memory, gpu_use(device))
            with unfinished.storing():
                (artifact / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            unfinished.publish(artifact)
    return Compressed(
        out=out if outcome.answers else None,
        record=record,
        estimate=outcome.estimate,
        seconds_per_layer=run.seconds_per_layer,
    )


def _kept_in(checkpoint: Checkpoint, name: str) -> torch.dtype | None:
    """Return the dtype that a tensor is written in; ``None`` for one that is rounded, whose scales are checked."""
    rounded = name.startswith(f"{checkpoint.family.language_prefix}layers.") and name.endswith("_proj.weight")
    return None if rounded else kept_dtype(checkpoint, name)


def check_place(checkpoint: Checkpoint, out: Path) -> None:
    """Raise InputError for a checkpoint that is quantized already, and a folder that exists or cannot be written."""
    if checkpoint.quantization is not None:
        raise InputError(
            f"{checkpoint.name} is quantized already ({checkpoint.quantization.method}): rounding it again only adds "
            "error. Give the 16-bit checkpoint."
        )
    if out.exists():
        Unfinished.remove_finished(out)
        raise InputError(f"{out} already exists. Give --out a new folder, or remove this one.")
    check_writable(out)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    answers: dict[str, Any]
    held_out_kl: dict[str, Any]
    rows: dict[str, Any]
    estimate: Estimate


@dataclass
class _Run:
    """One run over the layers, and what it writes."""

    checkpoint: Checkpoint
    """Its tensors as they are rounded: turned, where a rotation is asked for."""
    source: Checkpoint
    unfinished: Unfinished
    plan: Plan
    options: RunOptions
    weights: TokenWeights
    max_memory: int
    progress: Progress
    seconds_per_layer: float | None = None
    sensitivity: list[dict[str, Any]] = field(default_factory=list)

    def round(
        self,
        samples: Sequence[Sample],
        answers: Sequence[Answer | None],
        calibration: CalibrationOptions,
        held_out: HeldOut,
    ) -> _Outcome:
        """Round all layers that are not finished; ``answers`` of the outcome is empty when layers are left."""
        packed: list[tuple[Row, ...]] = []

        def token_ids(model: Any) -> list[int]:
            rows = lay_out(
                model,
                samples,
                answers,
                max_length=calibration.max_length,
                beginnings=calibration.beginnings,
                seed=calibration.mix.seed,
            )
            packed.extend(pack_rows(rows, self.options.batch_tokens))
            held_out.lay_out(model, calibration.max_length)
            return [token for rows in (*packed, *held_out.packed) for row in rows for token in row.ids]

        self.progress.status("opening the checkpoint")
        stream = LayerStream(
            self.checkpoint,
            grid=calibration.grid,
            dtype=self.options.dtype,
            products=self.options.products,
            device=self.options.device,
            token_ids=token_ids,
        )
        all_rows = [*packed, *held_out.packed, *held_out.packed]
        needed = estimate(
            self.checkpoint,
            all_rows,
            dtype=self.options.dtype,
            products=stream.products,
            device=stream.device,
            tuning=None if self.plan.tuner is None else self.plan.tuner.options,
            original_inputs=self.plan.original_inputs,
        )
        if self.weights.by == "gradient":
            needed = with_backward(needed, self.checkpoint, packed, self.options.dtype, stream.device)
        check_memory(needed, self.max_memory, gpu_room(stream.device))
        check_room(self.unfinished.out, needed.disk)
        finished = self.unfinished.finished()
        for line in needed.lines(self.max_memory):
            self.progress.say(line)
        if finished:
            self.progress.say(f"resuming: {len(finished)} of {len(stream)} layers are finished")
        shapes = [(len(rows), max(len(row.ids) for row in rows), self.checkpoint.hidden_size) for rows in packed]
        left, folder = max(0, self.max_memory - needed.memory), self.unfinished.folder
        with (
            Activations(shapes, self.options.dtype, left, folder) as hidden,
            held_out.open(stream, max(0, left - hidden.nbytes), folder, self.progress.status),
        ):
            batches = embed_batches(stream, packed, hidden, self.progress.status)
            if self.plan.auto is not None:
                self.sensitivity = sensitivity_of(
                    stream,
                    packed,
                    self.plan.auto,
                    self.unfinished,
                    left,
                    self.options.batch_tokens,
                    self.progress.status,
                )
                self.plan = self.plan.auto.plan(self.sensitivity)
                self.progress.say(f"bits by sensitivity: {self.plan.recipe['assigned']}")
            stream.forget_vision()
            self._layers(stream, batches, hidden, held_out, max(0, left - hidden.nbytes - held_out.nbytes))
            done = len(self.unfinished.finished()) == len(stream)
            found = answer_drift(self.checkpoint, batches, hidden) if done else {}
            kl = held_out.record(self.checkpoint) if done else {}
        rows = rows_record(batches, calibration.beginnings)
        return _Outcome(answers=found, held_out_kl=kl, rows=rows, estimate=needed)

    def _layers(
        self, stream: LayerStream, batches: Sequence[Batch], hidden: Activations, held_out: HeldOut, room: int
    ) -> None:
        before, times = time.monotonic(), []
        was_there = set(self.unfinished.finished())

        def report(index: int) -> None:
            nonlocal before
            now = time.monotonic()
            if index not in was_there:
                times.append(now - before)
            self.progress.layer(index, len(stream), self.unfinished.report(index), now - before)
            before = now

        prefills = [batch.prefill for batch in batches]
        weights: Sequence[Tensor] | Callable[[int], Sequence[Tensor]]
        weights = fixed = [self.weights.of_batch(batch) for batch in batches]
        if self.weights.by == "gradient":
            folder, status = self.unfinished.folder, self.progress.status
            by_layer = gradient_weights(stream, batches, hidden, fixed, max_bytes=room, folder=folder, report=status)
            weights = by_layer.__getitem__
        with contextlib.ExitStack() as stack:
            target, tuner = None, self.plan.tuner
            if tuner is not None:
                target = stack.enter_context(tuner.begin(hidden, self.unfinished, room))
            elif self.plan.original_inputs:
                target = stack.enter_context(hidden.copy(room, self.unfinished.folder))
            if target is not None and not target.on_disk:
                room -= target.nbytes
            caches = stack.enter_context(Caches(room, self.unfinished.folder))
            round_layers(
                stream,
                prefills,
                hidden,
                self.plan.method,
                weights=weights,
                finished=self.unfinished.layer,
                write=self.unfinished.save_layer,
                report=report,
                stop=None if self.options.layers is None else min(self.options.layers, len(stream)),
                caches=caches,
                beside=held_out,
                target=target,
                original_inputs=self.plan.original_inputs,
            )
        self.seconds_per_layer = float(np.mean(times)) if times else None

    def write(self, record: dict[str, Any]) -> Path:
        """Write the artifact's folder, still under a hidden name; sizes go into ``record``."""
        folder = self.unfinished.folder / "artifact"
        with self.unfinished.storing():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            token = write_light_files(self.checkpoint, folder, self.plan.quantization)
            for name, data in self.plan.extra_files.items():
                (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
            layers = [self.unfinished.layer_file(index) for index in self.unfinished.finished()]
            stored = write_tensors(
                self.checkpoint,
                layers,
                folder,
                token=token,
                shard_bytes=self.options.shard_bytes,
                report=self.progress.status,
            )
        tensors = self.source.tensors
        whole = sum(torch.Size(tensors.shape(name)).numel() * 2 for name in tensors.names())
        record["summary"] |= {"bytes": stored, "bytes_in_16_bit": whole}
        return folder

    def guard(self, artifact: Checkpoint, chosen: Calibration, grid: tuple[int, int] | None) -> dict[str, Any]:
        """Ask the exact guard of both checkpoints about pictures, held out where there are enough."""
        used = {sample.where for sample in chosen.samples}
        pictures = {sample.name: sample for sample in chosen.source.samples if sample.image is not None}
        held_out = [sample for sample in pictures.values() if sample.where not in used]
        source = held_out if len(held_out) >= min(self.options.guard_images, 16) else list(pictures.values())
        if not source or not self.options.guard_images:
            return {"n": 0}
        places = np.random.default_rng(0).permutation(len(source))[: self.options.guard_images]
        preprocessing = read_processor(self.checkpoint.processor, family=self.checkpoint.family.key, grid=grid)
        opened = [source[place].picture() for place in sorted(places)]
        rgb = torch.from_numpy(np.stack([preprocessing.apply(each) for each in opened if each is not None]))
        probs = []
        for which, checkpoint in (("16-bit", self.source), ("compressed", artifact)):
            self.progress.status(f"running the {which} model's guard on {len(rgb)} images")
            probs.append(
                exact_probs(
                    checkpoint,
                    rgb,
                    grid=grid,
                    max_bytes=max(0, self.max_memory // 4),
                    dtype=self.options.dtype,
                    device=self.options.device,
                    report=self.progress.status,
                )
            )
        held = {"held_out": source is held_out, "tap": self.checkpoint.tap.source}
        return {**held, **guard_drift(probs[0], probs[1], self.checkpoint.classes)}
