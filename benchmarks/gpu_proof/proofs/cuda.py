"""Step 1: CUDA bindings, memory, and activations that give back what they took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.gpu_proof.finding import Finding, Task, attempt, checked, unproved
from benchmarks.gpu_proof.proofs.onnx_runtime import providers_of, scratch_bundle
from benchmarks.speed.peer import Subject, random_images
from benchmarks.speed.reference_runner import ReferenceRunner
from runtimes.guard.cuda import CudaRuntime, DeviceBuffer, current_gpu, free_memory, load_cuda
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.runner import GuardRunner
from safevlm.checkpoint.hub import TINY_CHECKPOINTS
from safevlm.files.storage import shown_bytes

__all__ = ["prove"]

MODEL = TINY_CHECKPOINTS[0]
ACTIVATIONS, DRY_ACTIVATIONS = 50, 2
BUFFER = 256 * 2**20
SLACK = 8 * 2**20
"""Free memory of a GPU that others use, too, wavers by pages."""


def prove(request: Mapping[str, Any]) -> Iterator[Finding]:
    """Find what cuda-python says of the GPU, and whether activations leak."""
    task = Task.of(request)
    times = DRY_ACTIVATIONS if task.dry else ACTIVATIONS
    yield from attempt("cuda-python names the GPU and its memory", _bindings)
    yield from attempt(f"{times} buffers of {shown_bytes(BUFFER)} are given back", _buffers, times)
    runner = ReferenceRunner(Subject(name=MODEL, random=False, tap="projector"), task.device)
    claim = f"{times} activations of torch's guard leave no memory behind"
    yield from attempt(claim, _activations, claim, runner, times, task)
    claim = f"{times} activations of ONNX Runtime's CUDA provider leave no memory behind"
    yield from attempt(claim, _onnx_runtime, claim, times, task)


def _bindings() -> Iterator[Finding]:
    cuda = load_cuda("a proof")
    gpu = current_gpu(cuda)
    free, total = cuda.call("cudaMemGetInfo")
    seen = torch.cuda.get_device_properties(0)
    same = gpu.name == seen.name and gpu.compute_capability == f"{seen.major}.{seen.minor}"
    measured = f"{gpu.name}, {gpu.compute_capability}, {shown_bytes(free)} of {shown_bytes(total)} free"
    yield checked("cuda-python and torch name the same GPU", same, measured)
    close = abs(total - seen.total_memory) <= 0.05 * total
    yield checked("both state its memory within 5 %", close, f"{total:,} and {seen.total_memory:,} bytes")


def _buffers(times: int) -> Iterator[Finding]:
    cuda = load_cuda("a proof")
    current_gpu(cuda)
    DeviceBuffer(cuda, BUFFER).free()
    before = free_memory(cuda)
    buffer = DeviceBuffer(cuda, BUFFER)
    held = before - free_memory(cuda)
    buffer.free()
    yield checked("a buffer takes the memory that it says", held >= BUFFER, f"{shown_bytes(held)} less are free")
    for _ in range(times):
        DeviceBuffer(cuda, BUFFER).free()
    yield _no_leak(f"{times} buffers of {shown_bytes(BUFFER)} are given back", before - free_memory(cuda))


def _onnx_runtime(claim: str, times: int, task: Task) -> Iterator[Finding]:
    runner = OnnxRuntimeRunner(scratch_bundle(MODEL, task), providers=providers_of(task))
    yield from _activations(claim, runner, times, task)


def _activations(claim: str, runner: GuardRunner, times: int, task: Task) -> Iterator[Finding]:
    def once() -> None:
        with runner:
            runner.infer(random_images(runner.preprocessing, 2, seed=0))

    once()  # what a process loads once: contexts, kernels, workspaces
    once()
    cuda: CudaRuntime | None = None if task.dry else load_cuda("a proof")
    before = _free(cuda)
    for _ in range(times):
        once()
    if cuda is None:
        yield unproved(claim, f"no GPU (dry run): {times} activations ran on the CPU, and memory was not compared")
    else:
        yield _no_leak(claim, before - _free(cuda))


def _free(cuda: CudaRuntime | None) -> int:
    if cuda is None:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return free_memory(cuda)


def _no_leak(claim: str, gone: int) -> Finding:
    words = f"{shown_bytes(max(gone, 0))} fewer are free afterwards"
    return checked(claim, gone <= SLACK, words, gone_bytes=gone)
