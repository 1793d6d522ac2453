"""How a run is done, what is rounded with, who is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quantize.methods.grid import Scheme
from quantize.methods.rotation import Rotate
from quantize.methods.tuning import Tuner
from quantize.streamed.artifact import SHARD_BYTES
from quantize.streamed.layers import Method
from safevlm.errors import InputError
from safevlm.network.device import torch_device

__all__ = ["AutoBits", "Plan", "Progress", "RunOptions"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is done: nothing here changes what is calibrated on.

    ``dtype`` is what weights and hidden states are in, ``products`` what factors of the decoder layers' products are
    rounded to (by default the same). ``max_memory`` in bytes, of this process; ``layers`` ends the run after so many,
    to go on later; ``batch_tokens`` run together; ``guard_images`` are looked at for the guard's drift.
    """

    max_memory: int | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    products: torch.dtype | None = None
    layers: int | None = None
    batch_tokens: int = 2048
    guard_images: int = 64
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        if self.layers is not None and self.layers < 1:
            raise InputError(f"--layers {self.layers} is not allowed. Give at least 1.")
        torch_device(self.device)

    @property
    def dtype_name(self) -> str:
        """``mixed``, ``float32`` or ``bfloat16``, as ``--dtype`` has it."""
        own = str(self.dtype).removeprefix("torch.")
        return own if self.products in (None, self.dtype) else "mixed"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A method, and what of it is written down.

    ``recipe`` goes into compression.json and decides whether an unfinished run is the same one; ``quantization`` is
    config.json's ``quantization_config``; ``consumers`` says who reads the artifact and who does not.
    """

    method: Method
    recipe: Mapping[str, Any]
    quantization: Mapping[str, Any]
    extra_files: Mapping[str, Any] = field(default_factory=dict)
    consumers: Sequence[str] = ()
    rotate: Rotate = "none"
    """What is turned before anything is rounded."""
    tuner: Tuner | None = None
    """The method's, if it has one: it is given the 16-bit model's hidden states beside the rounded model's."""
    original_inputs: bool = False
    """Whether the method asks for what the 16-bit model's linears read."""
    auto: AutoBits | None = None
    """Set: this plan only says what is wanted, and the one that its measurement leads to is done."""


@dataclass(frozen=True, kw_only=True)
class AutoBits:
    """Ask for bits by sensitivity: ``choices`` are measured on ``samples`` of the samples, then ``plan`` decides.

    ``plan`` gets the rows of the measurement as compression.json shows them.
    """

    choices: tuple[int, ...]
    scheme: Scheme
    """Of every choice but for its bits."""
    samples: int
    plan: Callable[[Sequence[Mapping[str, Any]]], Plan]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Who is told what happens: a status line, lines to keep, and each finished layer with its report."""

    status: Callable[[str], None] = lambda _: None
    say: Callable[[str], None] = lambda _: None
    layer: Callable[[int, int, Sequence[Mapping[str, Any]], float], None] = lambda *_: None
