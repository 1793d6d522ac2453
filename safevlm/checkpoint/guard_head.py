"""The visual guard's head as a checkpoint stores it: its layers, its width, its classes.

``img_safety_head.mlp`` is Linear, GELU, Dropout, …, Linear, so the Linears stand at 0, 3, 6, …
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from safevlm.checkpoint.family import HEAD_PREFIX
from safevlm.checkpoint.weights.shards import GUARD_FILE
from safevlm.checkpoint.weights.tensors import TensorStore
from safevlm.contract.class_names import class_names_problem
from safevlm.errors import GuardHeadError

__all__ = ["HeadShape", "check_width", "hidden_size_of", "read_classes", "read_head", "standard_classes"]

LAYER_STEP = 3
FLOATS = ("F16", "BF16", "F32", "F64")

PROJECTOR_OUTPUTS = (
    ("model.multi_modal_projector.linear_2.weight", 0),
    ("model.visual.merger.mlp.2.weight", 0),
    ("model.multi_modal_projector.mm_input_projection_weight", 1),
)
"""Projector tensors whose axis is the language model's hidden size, whichever of them a checkpoint has."""


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Widths of the head's activations, input and output included: ``(4096, 2048, 20)`` is two Linears."""

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise GuardHeadError(
                f"a guard head of widths {self.widths} has no layer; at least an input and an output width are needed"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the Linears in ``img_safety_head.mlp``: 0, 3, 6, …"""
        return tuple(range(0, LAYER_STEP * (len(self.widths) - 1), LAYER_STEP))


@cache
def standard_classes() -> tuple[str, ...]:
    """Return the 20 published class names in the order of their labels, from ``classes.json``."""
    names = json.loads((Path(__file__).parent / "classes.json").read_text(encoding="utf-8"))
    return tuple(names)


def read_head(name: str, tensors: TensorStore) -> HeadShape:
    """Return the head's shape, from the headers alone.

    Raises GuardHeadError when there is no head, or its tensors are not a chain of Linears at 0, 3, 6, …
    """
    stored = [tensor for tensor in tensors.names() if tensor.startswith(HEAD_PREFIX)]
    if not stored:
        raise GuardHeadError(
            f"{name}: no tensor '{HEAD_PREFIX}mlp.*', so this checkpoint has no guard head. Loading a Safe-VLM as the "
            "stock class of its base and saving it drops the head silently, as every public quantization of these "
            f"models did. Give the original checkpoint; one that was written here needs its '{GUARD_FILE}', too."
        )
    layers: set[int] = set()
    for tensor in stored:
        matched = re.fullmatch(re.escape(HEAD_PREFIX) + r"mlp\.(\d{1,4})\.(weight|bias)", tensor)
        if matched is None or tensors.dtype(tensor) not in FLOATS:
            raise GuardHeadError(
                f"{name}: '{tensor}' ({tensors.dtype(tensor)}) is not a guard head's tensor; allowed are "
                f"'{HEAD_PREFIX}mlp.N.weight' and '.bias' in {', '.join(FLOATS)}. Give the original checkpoint."
            )
        layers.add(int(matched[1]))
    if sorted(layers) != list(range(0, LAYER_STEP * len(layers), LAYER_STEP)):
        raise GuardHeadError(
            f"{name}: the guard head's Linears stand at {sorted(layers)} of '{HEAD_PREFIX}mlp'; they must stand at "
            "0, 3, 6, … (Linear, GELU, Dropout between). A layer is missing or of an unknown kind."
        )
    shapes = [_layer_shape(name, tensors, index) for index in sorted(layers)]
    for (at, (_, out)), (_, (into, _)) in pairwise(enumerate(shapes)):
        if out != into:
            raise GuardHeadError(
                f"{name}: '{HEAD_PREFIX}mlp.{LAYER_STEP * at}' gives {out} features, the Linear after it takes "
                f"{into}; they must agree. The head is damaged: give the original checkpoint."
            )
    return HeadShape(widths=(shapes[0][0], *(out for _, out in shapes)))


def _layer_shape(name: str, tensors: TensorStore, index: int) -> tuple[int, int]:
    """Return (inputs, outputs) of one Linear; its weight is outputs x inputs, its bias outputs."""
    weight, bias = (f"{HEAD_PREFIX}mlp.{index}.{kind}" for kind in ("weight", "bias"))
    for needed in (weight, bias):
        if needed not in tensors:
            raise GuardHeadError(
                f"{name}: '{needed}' is missing; each Linear of the guard head has a weight and a bias. "
                "Give the original checkpoint."
            )
    shape = tensors.shape(weight)
    if len(shape) != 2 or min(shape) < 1 or tensors.shape(bias) != shape[:1]:
        raise GuardHeadError(
            f"{name}: '{weight}' of shape {shape} and its bias of shape {tensors.shape(bias)} do not form a Linear "
            "layer. Allowed are (outputs, inputs) and (outputs,). Give the original checkpoint."
        )
    return shape[1], shape[0]


def hidden_size_of(config: Mapping[str, Any], tensors: TensorStore) -> int | None:
    """Return the language model's width: ``text_config.hidden_size``, top-level ``hidden_size``, or the
    projector's output."""
    text = config.get("text_config")
    for section in (text, config):
        if isinstance(section, Mapping) and type(section.get("hidden_size")) is int:
            return int(section["hidden_size"])
    for tensor, axis in PROJECTOR_OUTPUTS:
        if tensor in tensors and len(tensors.shape(tensor)) == 2:
            return tensors.shape(tensor)[axis]
    return None


def check_width(name: str, head: HeadShape, hidden_size: int | None) -> None:
    """Require that the head takes what the model gives. Raises GuardHeadError."""
    if hidden_size != head.widths[0]:
        raise GuardHeadError(
            f"{name}: '{HEAD_PREFIX}mlp.0.weight' takes {head.widths[0]} features, the language model's hidden size "
            f"is {hidden_size}; they must agree. The head or config.json belongs to another checkpoint."
        )


def read_classes(name: str, config: Mapping[str, Any], head: HeadShape) -> tuple[str, ...]:
    """Return the class names in label order: the config's ``safety_categories``, otherwise the 20 standard ones.

    Raises GuardHeadError when list, ``num_safety_categories`` and head disagree, or the list is not one of names.
    """
    outputs = head.widths[-1]
    given = config.get("safety_categories")
    where = "config.json's 'safety_categories'" if given is not None else "the standard list of classes"
    classes = standard_classes() if given is None else given
    if not isinstance(classes, (list, tuple)) or not all(isinstance(item, str) and item for item in classes):
        raise GuardHeadError(
            f"{name}: {where} is {given!r}; a list of {outputs} names is allowed. Correct config.json."
        )
    problem = class_names_problem(classes)
    if problem is not None:
        raise GuardHeadError(f"{name}: {where}: {problem}. Correct config.json.")
    count = config.get("num_safety_categories")
    if count is not None and (type(count) is not int or count != outputs):
        raise GuardHeadError(
            f"{name}: config.json states num_safety_categories = {count!r}, the guard head has {outputs} outputs; "
            "they must agree. Correct config.json, or give the original checkpoint."
        )
    if len(classes) != outputs:
        raise GuardHeadError(
            f"{name}: {where} has {len(classes)} names, the guard head has {outputs} outputs; they must agree. "
            "Put the checkpoint's own names into 'safety_categories', in the order of its labels."
        )
    return tuple(classes)
