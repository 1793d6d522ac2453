"""What a run has finished so far, in a hidden folder beside its output: killed, it goes on from there.

Layers are written in one step each (a temporary file that is renamed), so what is there is whole. The folder holds
the run's recipe, and only a run with the same recipe goes on with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantize.streamed.layers import Rounded
from safevlm.errors import InputError
from safevlm.files.json_file import MAX_JSON_BYTES, parse_json
from safevlm.files.regular_file import read_regular
from safevlm.files.storage import storing
from safevlm.machine import now

__all__ = ["Unfinished"]

ANSWERS, RESUMED, TUNING = "answers.json", "resumed.json", "tuning.json"
RECORD = "compression.json"
LAYER = "layer"
"""The one metadata key of a layer's file: safetensors writes several in an order that changes."""


class Unfinished:
    """The folder ``.NAME.unfinished`` beside ``out``, locked while it is open. A context manager."""

    def __init__(self, out: Path, recipe: Mapping[str, Any]) -> None:
        """Raises InputError for a folder of another recipe, or one that another process works in."""
        self.out = out
        self.folder = _folder(out)
        with self.storing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check(json.loads(json.dumps(recipe)))
            self._note_resumption()
        except BlockingIOError as error:
            self._lock.close()
            raise InputError(f"{self.folder}: another process is writing {out}. Wait for it, or stop it.") from error
        except InputError:
            self._lock.close()
            raise

    @staticmethod
    def remove_finished(out: Path) -> None:
        """Remove the folder that a run left which was killed just after ``out`` had been put in its place."""
        folder = _folder(out)
        if not (out / RECORD).is_file() or not (folder / "lock").is_file():
            return
        with (folder / "lock").open() as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)

    def _note_resumption(self) -> None:
        if self.finished() or (self.folder / ANSWERS).exists():
            self.keep(RESUMED, [*self.resumed, now()])

    def _check(self, recipe: dict[str, Any]) -> None:
        there = self.kept("recipe.json")
        if there is None:
            self.keep("recipe.json", recipe)
            return
        differing = sorted(key for key in {*there, *recipe} if there.get(key) != recipe.get(key))
        if differing and not self.finished():
            for name in (ANSWERS, RESUMED, TUNING):
                (self.folder / name).unlink(missing_ok=True)
            self.keep("recipe.json", recipe)
        elif differing:
            key = differing[0]
            raise InputError(
                f"{self.folder} holds an unfinished run with other settings ({', '.join(differing)}; {key} was "
                f"{_short(there.get(key))}, now {_short(recipe.get(key))}). Give the same settings to resume it, or "
                "remove that folder to start again."
            )

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """Turn a full disk, and a place that cannot be written, into StorageError."""
        with storing(self.out, "Layers that are finished are kept.", "give --out another place"):
            yield

    @property
    def resumed(self) -> list[str]:
        """When the run was resumed; empty if it never was."""
        return self.kept(RESUMED) or []

    # -- small facts ------------------------------------------------------------------------------------

    def keep(self, name: str, data: Any) -> None:
        """Write a JSON file in one step."""
        with self.storing(), self._whole(self.folder / name) as path:
            path.write_text(json.dumps(data, indent=1), encoding="utf-8")

    def kept(self, name: str) -> Any | None:
        """Return what :meth:`keep` wrote, or ``None``. Raises InputError for what it did not write."""
        path = self.folder / name
        try:
            return parse_json(read_regular(path, MAX_JSON_BYTES), rows=True)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path} cannot be read: {reason}. Remove {self.folder} to start again.") from error

    # -- layers -----------------------------------------------------------------------------------------

    def layer_file(self, index: int) -> Path:
        """Return where a layer's tensors are, or will be."""
        return self.folder / f"layer-{index:05d}.safetensors"

    def save_layer(self, index: int, rounded: Rounded) -> None:
        """Write a layer in one step. Raises InputError when the disk is full; finished layers stay."""
        tensors = {name: tensor.contiguous() for name, tensor in rounded.tensors.items()}
        with self.storing(), self._whole(self.layer_file(index)) as path:
            save_file(tensors, path, metadata={LAYER: json.dumps(rounded.report)})

    def layer(self, index: int) -> dict[str, Tensor] | None:
        """Return a finished layer's tensors, or ``None``."""
        path = self.layer_file(index)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no mapping

    def report(self, index: int) -> list[dict[str, Any]]:
        """Return the report that was written with a layer."""
        with safe_open(self.layer_file(index), framework="pt") as file:
            return list(json.loads(file.metadata()[LAYER]))

    def finished(self) -> list[int]:
        """Return the numbers of the layers that are there."""
        return sorted(int(path.stem.split("-")[1]) for path in self.folder.glob("layer-*.safetensors"))

    # -- the end ----------------------------------------------------------------------------------------

    def publish(self, finished: Path) -> None:
        """Move a complete folder to ``out`` and remove the rest. Raises InputError when ``out`` is there by now."""
        with self.storing():
            if self.out.exists():
                raise InputError(
                    f"{self.out} was created by something else meanwhile. Move it away and run the command again."
                )
            finished.rename(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _whole(self, path: Path) -> Iterator[Path]:
        unfinished = path.with_name(f"{path.name}.part")
        try:
            yield unfinished
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _folder(out: Path) -> Path:
    return out.parent / f".{out.name}.unfinished"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
