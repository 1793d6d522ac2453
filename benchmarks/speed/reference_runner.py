"""The guard on torch, as people run it today: a runner for the line-up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.shapes.random_guard import build_random_guard
from benchmarks.shapes.shapes import find_shape
from benchmarks.speed.peer import Subject
from export.guard.graph import build_graph
from runtimes.guard.runner import GuardOutput, GuardRunner
from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.network.device import torch_device
from safevlm.network.reference import GuardModel, build_reference_guard

__all__ = ["STORED_BYTES", "ReferenceRunner", "build_guard"]


STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


def build_guard(subject: Subject) -> tuple[GuardModel, int, str]:
    """Return the guard, its size on disk in bytes, and what that size counts."""
    if subject.random:
        guard = build_random_guard(find_shape(subject.name).shortened(subject.layers), seed=subject.seed)
        held = sum(parameter.numel() * parameter.element_size() for parameter in guard.parameters())
        return guard, held, "its parameters as float32 would store them"
    checkpoint = _open(subject)
    guard = build_reference_guard(checkpoint)
    names = [*checkpoint.vision_names(), *checkpoint.head_names()]
    held = sum(
        int(np.prod(checkpoint.tensors.shape(name))) * STORED_BYTES.get(checkpoint.tensors.dtype(name), 4)
        for name in names
    )
    return guard, held, "vision, projector and head tensors as the checkpoint stores them"


def _open(subject: Subject) -> Checkpoint:
    return open_checkpoint(subject.name, tap=subject.tap, revision=subject.revision)


class ReferenceRunner(GuardRunner):
    """The untouched torch path, float32, on a CPU or a CUDA GPU; copies to and from the GPU are timed.

    ``compiled`` runs it through ``torch.compile``. ``half`` runs the graph that is exported as fp16 instead, which
    keeps normalisation and head in float32.
    """

    runtime = "torch"

    def __init__(self, subject: Subject, device: str, *, compiled: bool = False, half: bool = False) -> None:
        super().__init__()
        self.subject = subject
        self.device = device
        self.compiled = compiled
        self.half = half
        self._guard: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None = None

    def _activate(self) -> None:
        guard, *_ = build_guard(self.subject)
        self.preprocessing = guard.preprocessing
        network = (build_graph(guard, "fp16") if self.half else guard).eval().to(torch_device(self.device))
        self._guard = torch.compile(network, dynamic=False) if self.compiled else network

    def _deactivate(self) -> None:
        self._guard = None

    def _run(self, rgb: NDArray[np.uint8]) -> GuardOutput:
        guard = self._held(self._guard)
        with torch.inference_mode():
            probs, logits = guard(torch.from_numpy(rgb).to(self.device))[:2]
        return GuardOutput(probs=probs.cpu().numpy(), logits=logits.cpu().numpy())
