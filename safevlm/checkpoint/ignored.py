"""What lies in a checkpoint and is not read: said once, so that nobody takes it for part of the model."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safevlm.terminal.printable import shortened

if TYPE_CHECKING:
    from safevlm.checkpoint.weights.tensors import TensorStore

__all__ = ["NOTHING", "Ignored", "report_ignored", "report_unplaced"]

SHOWN_NAMES = 5
COMPUTED = (".inv_freq", ".position_ids")
"""Endings of what older releases stored and every release computes."""

_log = logging.getLogger(__name__)
_reported: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Ignored:
    """Files and tensors that are not part of what is read."""

    files: tuple[str, ...] = ()
    """Weight files beside those that the model is read from, by name."""
    tensors: tuple[str, ...] = ()
    """Tensors of no known part."""
    share: float | None = None
    """Their share of all tensor bytes; ``None`` where shards are not fetched yet."""

    def notes(self) -> list[str]:
        """Return one line on the files and one on the tensors, where there are any."""
        found = []
        if self.files:
            found.append(
                f"ignored: {_count(self.files, 'file')} beside the weights that are read: {_listed(self.files)}"
            )
        if self.tensors:
            share = "" if self.share is None else f" ({100 * self.share:.1f} % of the bytes)"
            found.append(f"ignored: {_count(self.tensors, 'tensor')}{share} of no known part: {_listed(self.tensors)}")
        return found


NOTHING = Ignored()


def report_ignored(name: str, ignored: Ignored) -> None:
    """Log as warnings what is ignored of the checkpoint ``name``, the same line once in a process.

    A command that sets no logging up has it on its standard error, where it disturbs no data.
    """
    for note in ignored.notes():
        _report(name, note)


def report_unplaced(name: str, tensors: TensorStore, placed: Collection[str]) -> None:
    """Log the same way the tensors that lie in a part of the model and that its config has no place for.

    ``placed`` are the canonical names that were read. A bias of linears that config.json lays out without one is
    what transformers calls unexpected, and leaves out.
    """
    parts = {".".join(one.split(".")[:2]) + "." for one in placed}
    found = [
        one
        for one in tensors.names()
        if one.startswith(tuple(parts)) and one not in placed and not one.endswith(COMPUTED)
    ]
    if found:
        share = tensors.share(found)
        told = "" if share is None else f" ({100 * share:.1f} % of the bytes)"
        _report(name, f"ignored: {_count(found, 'tensor')}{told} beyond what config.json describes: {_listed(found)}")


def _report(name: str, note: str) -> None:
    line = f"{shortened(name)}: {note}"
    if line not in _reported:
        _reported.add(line)
        _log.warning("%s", line)


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    more = ", …" if len(names) > SHOWN_NAMES else ""
    return ", ".join(f"'{shortened(name)}'" for name in names[:SHOWN_NAMES]) + more
