"""A guard head fitted to a checkpoint's exact verdicts, on the projector's output: one safetensors file.

``calibration.distill`` writes it, the exporters read it. It holds the head's tensors under their usual names
(``img_safety_head.mlp.*``) and, in the header, what it was made from: a head fits one vision tower only.

Shapes: N images, T image tokens, D width of the language model, P pooled features, C classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from safevlm.checkpoint.family import HEAD_PREFIX
from safevlm.checkpoint.weights.shard_header import read_header
from safevlm.contract.class_names import class_names_problem
from safevlm.errors import CheckpointError, GuardHeadError
from safevlm.files.json_file import parse_json, replace_file
from safevlm.files.regular_file import read_regular
from safevlm.files.storage import storing
from safevlm.network.head import GuardHead
from safevlm.network.pooling import POOLINGS, Pooling, pooled_width

if TYPE_CHECKING:
    from safevlm.checkpoint.checkpoint import Checkpoint

__all__ = ["FORMAT", "DistilledHead"]

FORMAT = "safevlm-edge-guard-head-1"
MAX_BYTES = 2**30
METADATA = "guard_head"
"""The header's only entry: safetensors writes several in an order that changes from call to call."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DistilledHead:
    """A fitted head and what it belongs to.

    ``source_sha256`` covers the checkpoint's vision, projector and head tensors, as a bundle's manifest states
    it; ``size`` is the (height, width) in pixels it was fitted at; ``fidelity`` goes into the manifest.
    """

    head: GuardHead
    pooling: Pooling
    classes: tuple[str, ...]
    checkpoint: str
    source_sha256: str
    size: tuple[int, int]
    fidelity: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    """Of the file; empty until it was written or read."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths from P to C."""
        return self.head.widths

    def write(self, path: Path) -> DistilledHead:
        """Write the file in one step and return this head with its hash; InputError where that is impossible."""
        tensors = {HEAD_PREFIX + name: value.contiguous() for name, value in self.head.state_dict().items()}
        stated = {
            "format": FORMAT,
            "pooling": self.pooling,
            "widths": self.widths,
            "classes": self.classes,
            "checkpoint": self.checkpoint,
            "source_sha256": self.source_sha256,
            "size": self.size,
            "fidelity": self.fidelity,
        }
        content = save(tensors, metadata={METADATA: json.dumps(stated, sort_keys=True)})
        with storing(path, advice="name a file in a folder that can be written to"):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content)
        return replace(self, sha256=hashlib.sha256(content).hexdigest())

    @classmethod
    def read(cls, path: Path) -> DistilledHead:
        """Read a file. Raises GuardHeadError when it is missing, damaged or something else."""
        try:
            content = read_regular(path, MAX_BYTES)
            read_header(path)
        except OSError as error:
            raise GuardHeadError(f"{path} cannot be read: {error.strerror or error}. {_MAKE}") from error
        except CheckpointError as error:
            raise GuardHeadError(f"{path} is not a guard head that can be read ({error}). {_MAKE}") from error
        try:
            with safe_open(path, framework="pt") as file:
                stated = parse_json((file.metadata() or {}).get(METADATA, "{}"))
                if not isinstance(stated, dict):
                    raise TypeError(f"its header must hold a JSON object, not {type(stated).__name__}")
                if stated.get("format") != FORMAT:
                    raise GuardHeadError(
                        f"{path} states format {stated.get('format')!r}; only {FORMAT!r} can be read. {_MAKE}"
                    )
                names = list(file.keys())
                widths, classes = _checked(stated)
                sizes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
                if sizes != _shapes(widths):  # before memory is taken for what the widths state
                    raise ValueError(f"its tensors do not form a head of widths {widths}")
                head = GuardHead(widths)
                values = {name.removeprefix(HEAD_PREFIX): file.get_tensor(name) for name in names}
            head.load_state_dict(values)
            return cls(
                head=head.requires_grad_(False).eval(),
                pooling=POOLINGS[POOLINGS.index(stated["pooling"])],
                classes=classes,
                checkpoint=str(stated["checkpoint"]),
                source_sha256=str(stated["source_sha256"]),
                size=(int(stated["size"][0]), int(stated["size"][1])),
                fidelity=stated["fidelity"],
                sha256=hashlib.sha256(content).hexdigest(),
            )
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError, OverflowError, RuntimeError) as error:
            raise GuardHeadError(f"{path} is not a guard head that can be read ({error}). {_MAKE}") from error

    def check_fits(self, checkpoint: Checkpoint, source_sha256: str) -> None:
        """Raise GuardHeadError unless the head was made for this checkpoint (by hash) and its classes."""
        if self.source_sha256 != source_sha256 or self.classes != checkpoint.classes:
            raise GuardHeadError(
                f"the guard head was made for {self.checkpoint} with tensors of SHA-256 {self.source_sha256[:12]}…; "
                f"{checkpoint.name} has {source_sha256[:12]}…. With another vision tower its verdicts are noise. Fit "
                f"a head for this checkpoint: python -m calibration.distill --model {checkpoint.name} --images DIR "
                "--out FILE"
            )
        width = pooled_width(self.pooling, checkpoint.hidden_size)
        if self.widths[0] != width or self.widths[-1] != len(self.classes):
            raise GuardHeadError(
                f"the guard head has widths {self.widths}; {self.pooling} pooling of {checkpoint.name} gives {width} "
                f"features for {len(self.classes)} classes. {_MAKE}"
            )


def _checked(stated: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the stated widths and classes. Raises ValueError for what no head can have."""
    widths, classes = stated["widths"], stated["classes"]
    if not isinstance(widths, list) or not 2 <= len(widths) <= 64 or not all(type(width) is int for width in widths):
        raise ValueError("its 'widths' are not a list of 2 to 64 numbers")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its 'classes' are not a list of names")
    problem = class_names_problem(classes)
    if problem is None and widths[-1] != len(classes):
        problem = f"{len(classes)} classes for {widths[-1]} outputs"
    if problem is not None:
        raise ValueError(problem)
    return tuple(widths), tuple(classes)


def _shapes(widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a head: weights of outputs x inputs, and biases."""
    pairs = [(f"{HEAD_PREFIX}mlp.{3 * at}", into, out) for at, (into, out) in enumerate(pairwise(widths))]
    weights = {f"{name}.weight": (out, into) for name, into, out in pairs}
    return weights | {f"{name}.bias": (out,) for name, _, out in pairs}


_MAKE = "A guard head is made by python -m calibration.distill --model M --images DIR --out FILE."
