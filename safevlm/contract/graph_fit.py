"""Whether a graph's inputs and outputs are those of a guard with these classes and this preprocessing.

Asked of what a manifest states, of what an ONNX file says of itself, and of what a runtime has loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from safevlm.contract.manifest_fields import Frozen, Name, Width
from safevlm.contract.preprocessing import Preprocessing

__all__ = ["Role", "TensorSpec", "misfit"]

Role = Literal["guard", "vision", "head"]
"""``guard``: pixels to probabilities. ``vision``: pixels to image embeddings. ``head``: hidden states over them to
probabilities."""


class TensorSpec(Frozen):
    """An input or output of a graph; ``"N"`` in the shape is the batch."""

    name: Name
    shape: tuple[Width | Literal["N"], ...] = Field(max_length=8)
    dtype: Name


def misfit(
    role: Role,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    preprocessing: Preprocessing,
    classes: int,
) -> str | None:
    """Say what about a graph does not fit its role; None when all does."""
    pixels = (preprocessing.height, preprocessing.width, 3)
    if role != "head" and [(each.name, each.dtype, each.shape[1:]) for each in inputs] != [("rgb", "uint8", pixels)]:
        return f"the input must be rgb, uint8, of shape N x {_product(pixels)} (see preprocessing), not {_told(inputs)}"
    if len(inputs) != 1:
        return f"exactly one input is needed, not {_told(inputs)}"
    answers = {each.name: each for each in outputs}
    for name in ("embeddings",) if role == "vision" else ("probs", "logits"):
        if name not in answers:
            return f"the output {name} is missing; the outputs are {_told(outputs)}"
    for name, each in answers.items():
        if each.dtype != "float32":
            return f"the output {name} is {each.dtype}, float32 is needed"
        if name in ("probs", "logits") and each.shape[1:] != (classes,):
            return f"there are {classes} classes, but the output {name} has shape {_product(each.shape)}"
        if name == "embeddings" and (len(each.shape) != 3 or "N" in each.shape[1:]):
            return f"embeddings must have shape N x T x D with fixed T and D, not {_product(each.shape)}"
    if len(answers) != len(outputs):
        return f"an output appears twice: {_told(outputs)}"
    return None


def _told(tensors: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{each.name} ({each.dtype} {_product(each.shape)})" for each in tensors[:4]) or "none"


def _product(shape: Sequence[int | str]) -> str:
    return " x ".join(map(str, shape))
