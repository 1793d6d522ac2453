"""What a run will take, told before it starts: memory, disk and time.

Memory is that of this process, in bytes, as the system counts it; time comes from counted multiplications and a
product of matrices that is timed for a moment on the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from calibration.streaming.batches import Row
from quantize.methods.solver import rows_together
from quantize.methods.tuning import PIECE_TOKENS, STEP_TOKENS, TuneOptions
from quantize.streamed.layers import SHARED_INPUTS, linear_names
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.errors import InputError
from safevlm.files.storage import shown_bytes

__all__ = ["Estimate", "check_memory", "estimate", "shown_seconds", "with_backward"]

INTERPRETER = 600 * 2**20
"""Python, torch and transformers themselves."""
CUDA_LIBRARIES = 2 * 2**30
"""What CUDA's libraries and context take of the host's memory."""
WORKSPACE = 512 * 2**20
"""What the same take of the GPU's beside tensors, with what the allocator cannot use."""
STORED = 2
"""Bytes of a value in 16 bit."""
PASSES = 3.2
"""Forward passes of a layer: up to each group of linears, and once rounded."""
WORKING_COPIES = 10
"""Matrices of the size of the rows in work that rounding holds at its widest."""
STORING_COPIES = 3
"""Matrices of a linear's size, 4 bytes a value, that its stored form is made in."""
KEPT_COPIES = 3
"""Values of the size of all linears' inputs that a layer keeps for its backward pass."""
SMALLEST_HEAD = 64
"""Width of an attention head, for the number of heads."""
PASSES_BACK = 4
"""Forward passes that token weights by gradient take: one forward, one more and one back, which is two."""
TUNING_BYTES = 32
"""Of a tuned weight: its 16-bit value, its place, Adam's two means, rounded value, gradient and a step's own."""
STEP_PASSES = 3
"""Forward passes that a step is worth."""
GIBIBYTE = 2**30


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes, and seconds a layer."""

    memory: int
    """Of the process, without the hidden states of the samples."""
    gpu: int = 0
    """Of the GPU; 0 where there is none."""
    activations: int
    disk: int
    seconds_per_layer: float
    layers: int

    def lines(self, max_memory: int, *, seconds_per_layer: float | None = None) -> list[str]:
        """Return it in words."""
        in_file = self.memory + self.activations > max_memory
        where = "in a file" if in_file else "in memory"
        each = self.seconds_per_layer if seconds_per_layer is None else seconds_per_layer
        measured = "" if seconds_per_layer is None else ", as measured"
        return [
            f"memory: {shown_bytes(self.memory + (0 if in_file else self.activations))} of at most "
            f"{shown_bytes(max_memory)}; hidden states of the samples: {shown_bytes(self.activations)}, {where}",
            *([f"memory of the GPU: {shown_bytes(self.gpu)}"] if self.gpu else []),
            f"disk: at most {shown_bytes(self.disk + (self.activations if in_file else 0))}",
            f"time: {shown_seconds(each * self.layers)} for {self.layers} layers, {shown_seconds(each)} each{measured}",
        ]


def estimate(
    checkpoint: Checkpoint,
    packed: Sequence[tuple[Row, ...]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    products: torch.dtype | None = None,
    speed: float | None = None,
    tuning: TuneOptions | None = None,
    original_inputs: bool = False,
) -> Estimate:
    """Estimate a run over batches of rows, weights in ``dtype``, factors of products in ``products``.

    ``speed`` in multiply-adds a second is measured where it is not given. With ``original_inputs`` what linears read in
    the 16-bit model is kept, too, and weights are moved by it.
    """
    shapes = {name: checkpoint.tensors.shape(f"{full}.weight") for _, name, full in linear_names(checkpoint)}
    layers = len({index for index, _, _ in linear_names(checkpoint)})
    weights = sum(rows * columns for rows, columns in shapes.values())
    hidden = checkpoint.hidden_size
    widest = max(sum(shapes[name][0] for name in names) for names in SHARED_INPUTS)
    columns = max(columns for _, columns in shapes.values())
    largest = max(rows * columns for rows, columns in shapes.values())
    tokens = [len(batch) * max(len(row.ids) for row in batch) for batch in packed]
    together = max(
        min(rows_together(shapes[names[0]][1], device), sum(shapes[name][0] for name in names)) * shapes[names[0]][1]
        for names in SHARED_INPUTS
    )
    solving = columns**2 * 4 + max(WORKING_COPIES * together, STORING_COPIES * largest) * 4 + widest * columns
    forward = max(tokens) * (2 * widest + 8 * hidden) * dtype.itemsize
    learning = 0
    if tuning is not None:
        piece = max(PIECE_TOKENS, max(len(row.ids) for batch in packed for row in batch))
        moments = sum(shapes[names[0]][1] ** 2 for names in SHARED_INPUTS) * 4
        learning = weights * TUNING_BYTES + piece * (2 * columns + 4 * widest + 16 * hidden) * 4 + moments
        solving += moments  # kept from linear to linear, for the tuning at the end
    if original_inputs:  # moments of both models' inputs, and weights as they are to be
        moved = max(sum(shapes[name][0] * shapes[name][1] for name in names) for names in SHARED_INPUTS)
        solving += (columns**2 + moved) * 4
        learning += weights * dtype.itemsize if tuning is not None else 0
    rounding = weights * dtype.itemsize + max(solving, forward, learning)
    vision = sum(torch.Size(checkpoint.tensors.shape(name)).numel() for name in checkpoint.vision_names())
    seeing = vision * dtype.itemsize + 2 * forward
    macs = sum(tokens) * (PASSES * weights + sum(shapes[names[0]][1] ** 2 for names in SHARED_INPUTS))
    for names in SHARED_INPUTS:
        width = shapes[names[0]][1]
        macs += sum(shapes[name][0] for name in names) * width**2 + width**3 / 6
    seconds = 0.0
    if tuning is not None or original_inputs:
        macs += sum(tokens) * weights  # the 16-bit model's pass
    if original_inputs:
        macs += sum(sum(tokens) * shapes[names[0]][1] ** 2 for names in SHARED_INPUTS)
        macs += sum(2 * rows * columns**2 for rows, columns in shapes.values())
    if tuning is not None:
        macs += STEP_PASSES * STEP_TOKENS * weights * (tuning.steps or 0)
        seconds = 60 * (tuning.minutes or 0) / layers
    total = sum(torch.Size(checkpoint.tensors.shape(name)).numel() for name in checkpoint.tensors.names())
    peak = max(rounding, seeing)
    read = max(torch.Size(checkpoint.tensors.shape(name)).numel() for name in checkpoint.tensors.names()) * STORED
    # on a GPU, the host holds a tensor as it is read, and a rounded layer and its copy as they are written
    memory = peak if device.type == "cpu" else CUDA_LIBRARIES + read + 2 * STORED * weights
    kept = hidden * dtype.itemsize * (1 if tuning is None and not original_inputs else 2)
    if original_inputs:
        kept += sum(shapes[names[0]][1] for names in SHARED_INPUTS) * (products or dtype).itemsize
    return Estimate(
        memory=INTERPRETER + memory,
        gpu=0 if device.type == "cpu" else WORKSPACE + peak,
        activations=sum(tokens) * kept,
        disk=2 * (total * 2 - weights * layers),
        seconds_per_layer=seconds + macs / (speed or _multiply_adds_a_second(products or dtype, device)),
        layers=layers,
    )


def with_backward(
    needed: Estimate,
    checkpoint: Checkpoint,
    packed: Sequence[tuple[Row, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> Estimate:
    """Add what one backward pass through all layers takes: what a layer keeps for it, and all hidden states."""
    shapes = {name: checkpoint.tensors.shape(f"{full}.weight") for _, name, full in linear_names(checkpoint)}
    lengths = [(len(batch), max(len(row.ids) for row in batch)) for batch in packed]
    each = KEPT_COPIES * sum(columns for _, columns in shapes.values())
    heads = shapes["self_attn.q_proj"][0] // SMALLEST_HEAD
    kept = max(rows * length * (each + heads * length) for rows, length in lengths) * dtype.itemsize
    weights = sum(rows * columns for rows, columns in shapes.values())
    tokens = sum(rows * length for rows, length in lengths)
    macs = PASSES_BACK * weights * tokens
    seconds = needed.seconds_per_layer + macs / _multiply_adds_a_second(dtype, device)
    host = {"memory": needed.memory + kept} if device.type == "cpu" else {"gpu": needed.gpu + kept}
    activations = needed.activations + needed.layers * tokens * checkpoint.hidden_size * dtype.itemsize
    return replace(needed, activations=activations, seconds_per_layer=seconds, **host)


def check_memory(needed: Estimate, max_memory: int, free_on_gpu: int | None = None) -> None:
    """Raise InputError when even with hidden states in a file more memory is needed, or more of the GPU's is."""
    if needed.memory > max_memory:
        raise InputError(
            f"--max-memory {max_memory / GIBIBYTE:g}: about {shown_bytes(needed.memory)} are needed with hidden states "
            f"in a file. Give {math.ceil(10 * needed.memory / GIBIBYTE) / 10} or more, or --dtype bfloat16."
        )
    if free_on_gpu is not None and needed.gpu > free_on_gpu:
        raise InputError(
            f"The GPU has {shown_bytes(free_on_gpu)} free: about {shown_bytes(needed.gpu)} are needed. Free it, use "
            "--dtype bfloat16, another GPU (--device cuda:N) or --device cpu."
        )


def shown_seconds(seconds: float) -> str:
    """Return seconds as people read them."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"


def _multiply_adds_a_second(dtype: torch.dtype, device: torch.device) -> float:
    one, other = torch.randn(512, 2048).to(dtype).to(device), torch.randn(2048, 2048).to(dtype).to(device)
    (one @ other).sum().item()
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        (one @ other).sum().item()
        rounds += 1
    return rounds * 512 * 2048**2 / (time.perf_counter() - started)
