"""Compare what a config states with the tensors' shapes: fill what they show, refuse what disagrees.

What is unstated is its class's default, as in transformers. Where a tensor contradicts the default, the tensor
holds; but then the config leaves out more than defaults, and what no tensor shows has to be stated.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from safevlm.errors import CheckpointError

if TYPE_CHECKING:
    from safevlm.checkpoint.weights.tensors import TensorStore

__all__ = ["Section", "Shapes", "Width", "default_of", "shown"]

MAX_COUNT = 2**31 - 1
"""Largest count that a config may state; torch cannot index more."""

Section: TypeAlias = dict[str, Any]
"""One level of a config under construction: transformers' key to value."""


def default_of(config_class: type, key: str, otherwise: Any = None) -> Any:
    """Return what a config class takes for a key that is not stated."""
    parameter = inspect.signature(config_class).parameters.get(key)
    return otherwise if parameter is None or parameter.default is parameter.empty else parameter.default


def shown(value: object) -> str:
    """Return a value as a message quotes it: escaped, and cut where it is long."""
    text = ascii(value) if not isinstance(value, int) or -MAX_COUNT < value < MAX_COUNT else "a larger number"
    return text if len(text) <= 80 else f"{text[:77]}…"


@dataclass(frozen=True)
class Width:
    """A config key that is one axis of a tensor."""

    key: str
    tensor: str
    axis: int


class Shapes:
    """The tensors' shapes, and the questions a config asks of them.

    Tensors outside ``prefixes`` count as not stored: asking for the shape of one whose shard is still on the
    hub would fetch that shard.
    """

    def __init__(self, tensors: TensorStore, source: str, prefixes: tuple[str, ...] = ("",)) -> None:
        self._tensors = tensors
        self._prefixes = prefixes
        self.source = source

    def __contains__(self, name: str) -> bool:
        return name.startswith(self._prefixes) and name in self._tensors

    def get(self, name: str) -> tuple[int, ...] | None:
        """Return a tensor's shape, ``None`` when it is not stored."""
        return tuple(self._tensors.shape(name)) if name in self else None

    def need(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; CheckpointError when it is not stored."""
        shape = self.get(name)
        if shape is None:
            raise CheckpointError(
                f"{self.source}: tensor '{name}' is missing; the model's geometry is read from it. The checkpoint is "
                "incomplete: fetch it again."
            )
        return shape

    def count(self, prefix: str) -> int:
        """Count the layers stored under ``prefix`` (``…layers.``); CheckpointError when one is skipped."""
        found = {
            int(match[1])
            for name in self._tensors.names()
            if name.startswith(self._prefixes) and (match := re.match(re.escape(prefix) + r"(\d+)\.", name))
        }
        absent = sorted(set(range(len(found))) - found)
        if absent:
            raise CheckpointError(
                f"{self.source}: layer '{prefix}{absent[0]}' is missing while layer {max(found)} is stored. "
                "The checkpoint is incomplete: fetch it again."
            )
        return len(found)

    def check(self, name: str, wanted: Sequence[int], because: str) -> None:
        """Raise CheckpointError when a stored tensor has not the wanted shape; absent tensors pass."""
        shape = self.get(name)
        if shape is not None and shape != tuple(wanted):
            raise CheckpointError(
                f"{self.source}: tensor '{name}' has shape {shape}, but {because} asks for {tuple(wanted)}. "
                "config.json and tensors belong to different models: fetch both from the same revision."
            )

    def settle(self, section: Section, where: str, widths: Iterable[Width], config_class: type) -> list[str]:
        """Check the stated widths of ``section`` and fill the others; return how defaults are contradicted."""
        gaps = []
        for width in widths:
            shape = self.get(width.tensor)
            if shape is None:
                continue
            if len(shape) <= width.axis:
                raise CheckpointError(
                    f"{self.source}: tensor '{width.tensor}' has shape {shape}, but {where}{width.key} is read from "
                    f"its axis {width.axis}. The file does not belong to this family."
                )
            size, default = shape[width.axis], default_of(config_class, width.key)
            if width.key not in section:
                section[width.key] = size
                if size != default:
                    gaps.append(f"{where}{width.key} ('{width.tensor}' shows {size}, the default is {default})")
            elif self.whole(section, where, width.key, size) != size:
                stated = section[width.key]
                wanted = (*shape[: width.axis], stated, *shape[width.axis + 1 :])
                self.check(width.tensor, wanted, f"{where}{width.key} = {stated} in config.json")
        return gaps

    def need_stated(self, section: Section, where: str, keys: Iterable[str], gaps: Sequence[str]) -> None:
        """Refuse defaults for what no tensor shows in a config that leaves out more than defaults."""
        for key in keys:
            if gaps and key not in section:
                raise CheckpointError(
                    f"{self.source}: config.json leaves out {gaps[0]}, so the default of {where}{key} is not reliable "
                    f"either, and no tensor shows it. State {where}{key} in config.json."
                )

    def whole(self, section: Section, where: str, key: str, default: int) -> int:
        """Return a stated number that must be whole and above 0, or set ``default`` where none is stated."""
        value = section.setdefault(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
            raise CheckpointError(
                f"{self.source}: config.json states {where}{key} = {shown(value)}; a whole number from 1 to "
                f"{MAX_COUNT} is allowed. Fetch config.json again."
            )
        return value

    def layers(self, section: Section, where: str, key: str, prefix: str, config_class: type) -> list[str]:
        """Settle a number of layers that must all be stored, as :meth:`settle` does; passes when none is."""
        stored = self.count(prefix)
        if not stored:
            return []
        if key not in section:
            section[key] = stored
            default = default_of(config_class, key)
            return [] if stored == default else [f"{where}{key} ({stored} are stored, the default is {default})"]
        if self.whole(section, where, key, stored) != stored:
            raise CheckpointError(
                f"{self.source}: config.json states {where}{key} = {section[key]}, the files hold {stored} layers "
                f"'{prefix}*'. Fetch config and tensors from the same revision."
            )
        return []
