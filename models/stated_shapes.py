"""Compare what a config states with the tensors' shapes: fill what is unstated, refuse what disagrees."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from models.errors import CheckpointError

if TYPE_CHECKING:
    from models.tensors import TensorStore

__all__ = ["Section", "Shapes", "Width"]

Section: TypeAlias = dict[str, Any]
"""One level of a config under construction: transformers' key to value."""


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
                f"{self.source}: tensor '{name}' is missing, which the model's geometry is read from. "
                "The checkpoint is incomplete: fetch it again."
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
                "config.json and tensors are not of one model: fetch both from the same revision."
            )

    def settle(self, section: Section, where: str, widths: Iterable[Width]) -> None:
        """Fill unstated widths of ``section`` from the tensors and check the stated ones."""
        for width in widths:
            shape = self.get(width.tensor)
            if shape is None:
                continue
            if len(shape) <= width.axis:
                raise CheckpointError(
                    f"{self.source}: tensor '{width.tensor}' has shape {shape}, {width.axis + 1} axes or "
                    f"more are needed to read {where}{width.key} from it. The file is not of this family."
                )
            self.agree(section, where, width.key, shape[width.axis], width.tensor, width.axis)

    def agree(self, section: Section, where: str, key: str, size: int, tensor: str, axis: int) -> None:
        """Set ``section[key]`` to the size found in a tensor, or check that it says the same."""
        stated = section.get(key)
        if stated is None:
            section[key] = size
        elif stated != size:
            shape = self.need(tensor)
            wanted = (*shape[:axis], stated, *shape[axis + 1 :])
            self.check(tensor, wanted, f"{where}{key} = {stated} in config.json")

    def whole(self, section: Section, where: str, key: str, default: int) -> int:
        """Return a stated number that must be whole and above 0, or set ``default`` where none is stated."""
        value = section.setdefault(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{self.source}: config.json states {where}{key} = {value!r}; a whole number above 0 is "
                "allowed. Fetch config.json again."
            )
        return value

    def layers(self, section: Section, where: str, key: str, prefix: str) -> None:
        """Settle a number of layers that must all be stored; passes when none is (a part left out whole)."""
        stored = self.count(prefix)
        stated = section.get(key)
        if stored and stated is None:
            section[key] = stored
        elif stored and stated != stored:
            raise CheckpointError(
                f"{self.source}: config.json states {where}{key} = {stated}, the files hold {stored} layers "
                f"'{prefix}*'. Fetch config and tensors from the same revision."
            )
