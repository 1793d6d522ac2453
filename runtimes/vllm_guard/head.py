"""The exact guard of a checkpoint as vLLM's process reads it: final norm, mean over the image positions, head.

Shapes: T image tokens, D width of the language model, C classes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safevlm.checkpoint.families import FAMILIES
from safevlm.checkpoint.family import HEAD_PREFIX, Family
from safevlm.checkpoint.tap import find_tap
from safevlm.contract.class_names import class_names_problem
from safevlm.errors import GuardHeadError, InputError
from safevlm.files.regular_file import read_regular

__all__ = ["GUARD_FILE", "ExactHead", "family_of", "head_sha256", "read_config", "require_language_tap"]

GUARD_FILE = "guard/head.safetensors"
MAX_CONFIG_BYTES = 16 * 2**20
LAYER_STEP = 3
"""The head is Linear, GELU, Dropout, Linear, …"""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExactHead:
    """The guard behind the language model; ``layers`` are its Linears in order, weight (outputs × inputs) and bias."""

    family: Family
    classes: tuple[str, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]
    norm: Tensor
    """D, the final norm's weight."""
    sha256: str

    @classmethod
    def read(cls, folder: Path) -> ExactHead:
        """Read the guard of a checkpoint in transformers' layout.

        Raises InputError for a place that is not a checkpoint, a family that has no such path and a guard that reads
        the projector; GuardHeadError for a head that is missing, damaged or does not fit.
        """
        config = read_config(folder)
        family = family_of(folder, config)
        require_language_tap(folder, family, config)
        path = folder / GUARD_FILE
        if not path.is_file():
            raise GuardHeadError(
                f"{folder} has no {GUARD_FILE}, so there is no guard to judge with. Write the checkpoint again: "
                "python -m export.hf, quantize.gptq or quantize.int8."
            )
        layers = _read_layers(path)
        norm_D = _read_norm(folder, family)
        if layers[0][0].shape[1] != len(norm_D):
            raise GuardHeadError(
                f"{path} takes {layers[0][0].shape[1]} features, the language model's final norm gives {len(norm_D)}. "
                "The head belongs to another checkpoint."
            )
        classes = _classes(folder, config, len(layers[-1][0]))
        return cls(family=family, classes=classes, layers=layers, norm=norm_D, sha256=head_sha256(layers))

    def to(self, device: torch.device) -> ExactHead:
        """Return the same guard on another device."""
        moved = tuple((weight.to(device), bias.to(device)) for weight, bias in self.layers)
        return replace(self, layers=moved, norm=self.norm.to(device))

    @torch.inference_mode()
    def probs(self, hidden_TD: Tensor, eps: float) -> list[float]:
        """Return C probabilities from the last layer's output at the image positions, before the final norm."""
        x_TD = hidden_TD.float()
        x_TD = x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps) * (self.norm + self.family.norm_offset)
        x = x_TD.mean(0)
        for number, (weight, bias) in enumerate(self.layers):
            x = torch.nn.functional.linear(x if number == 0 else torch.nn.functional.gelu(x), weight, bias)
        found: list[float] = torch.softmax(x, -1).tolist()
        return found


def head_sha256(layers: Iterable[tuple[Tensor, Tensor]]) -> str:
    """Return the SHA-256 of a head's numbers in float32, so that it is the same whatever dtype they are stored in."""
    digest = hashlib.sha256()
    for pair in layers:
        for tensor in pair:
            digest.update(json.dumps(list(tensor.shape)).encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json``. Raises InputError."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} is not the folder of a checkpoint: it has no config.json. Give a folder on this machine; a "
            "checkpoint of the hub has to be downloaded first."
        )
    try:
        found = json.loads(read_regular(path, MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}. Fetch the file again.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object. Fetch the file again.")
    return found


def family_of(folder: Path, config: Mapping[str, Any]) -> Family:
    """Return the family that a config names. Raises InputError for an unknown one."""
    kind = config.get("model_type")
    family = next((each for each in FAMILIES.values() if each.auto_model_type == kind), None)
    if family is None:
        known = ", ".join(each.auto_model_type for each in FAMILIES.values())
        raise InputError(f"{folder}: model_type {kind!r} is unknown. Allowed: {known}. Write it with export.hf first.")
    return family


def require_language_tap(folder: Path, family: Family, config: Mapping[str, Any]) -> None:
    """Raise InputError for a guard that does not stand behind the language model: vLLM has nothing to read for it."""
    tap = find_tap(family, config, folder)
    if tap.source != "language_model":
        raise InputError(
            f"the guard of {folder} ({family.title}) reads the projector, not the language model, so vLLM has nothing "
            "to read for it, and it splits off exactly: python -m export.onnx. Put python -m runtimes.gateway in "
            "front of vLLM with that bundle."
        )
    if family.key == "gemma3":
        raise InputError(
            f"{folder}: vLLM gives no hidden states of Gemma-3, so its guard cannot be read there. Export it: "
            "python -m export.onnx."
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises GuardHeadError where it is damaged or cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise GuardHeadError(f"{path} cannot be read: {error}. Fetch the file again.") from error


def _read_layers(path: Path) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return the head's Linears in float32. Raises GuardHeadError where they are not a chain at 0, 3, 6, …"""
    stored: dict[tuple[int, str], Tensor] = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            matched = re.fullmatch(re.escape(HEAD_PREFIX) + r"mlp\.(\d{1,4})\.(weight|bias)", name)
            if matched is None:
                raise GuardHeadError(f"{path}: '{name[:200]}' is not a guard head's tensor. Fetch the file again.")
            stored[int(matched[1]), matched[2]] = file.get_tensor(name).float()
    places = range(0, LAYER_STEP * (len(stored) // 2), LAYER_STEP)
    if not stored or set(stored) != {(place, kind) for place in places for kind in ("weight", "bias")}:
        raise GuardHeadError(f"{path} is not a chain of Linears at 0, 3, 6, … Fetch the file again.")
    layers = tuple((stored[place, "weight"], stored[place, "bias"]) for place in places)
    width = None
    for weight, bias in layers:
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or width not in (None, weight.shape[1]):
            raise GuardHeadError(f"{path}: the shapes of its Linears do not fit each other. Fetch the file again.")
        width = weight.shape[0]
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise GuardHeadError(f"{path} holds numbers that are not finite. Fetch the file again.")
    return layers


def _read_norm(folder: Path, family: Family) -> Tensor:
    """Return the final norm's weight, float32. Raises GuardHeadError where no safetensors file has it."""
    wanted = f"{family.language_prefix}norm.weight"
    for path in sorted(folder.glob("*.safetensors")):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith("norm.weight") and family.canonical(name) == wanted:
                    found: Tensor = file.get_tensor(name).float()
                    return found
    raise GuardHeadError(f"{folder}: no safetensors file holds '{wanted}'. Give the whole checkpoint.")


def _classes(folder: Path, config: Mapping[str, Any], outputs: int) -> tuple[str, ...]:
    stated = config.get("safety_categories")
    if not isinstance(stated, list) or not all(isinstance(name, str) for name in stated):
        raise GuardHeadError(f"{folder}/config.json has no list 'safety_categories'. Write it with export.hf.")
    problem = class_names_problem(stated)
    if problem is None and len(stated) != outputs:
        problem = f"{len(stated)} names for a head of {outputs} outputs"
    if problem is not None:
        raise GuardHeadError(f"{folder}/config.json: 'safety_categories': {problem}. Give the original checkpoint.")
    return tuple(stated)
