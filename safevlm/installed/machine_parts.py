"""GPUs, and the places that files go to with the room in them."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Gpu", "Gpus", "Place", "find_gpus", "find_places"]

SECONDS = 30
"""For nvidia-smi, which hangs where a driver does."""
_ASKED = ("name", "driver_version", "memory.total")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU, as its driver describes it."""

    name: str
    driver: str
    memory_mib: str


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The GPUs of this machine; where there is none, ``note`` says how that is known."""

    found: tuple[Gpu, ...] = ()
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder that is read and written; ``free_bytes`` is of its file system, None where that is unknown."""

    purpose: str
    path: str
    free_bytes: int | None = None
    problem: str | None = None


def find_gpus() -> Gpus:
    """Ask nvidia-smi for the GPUs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        board = _text("/proc/device-tree/model")
        return Gpus(note=f"nvidia-smi is not installed{f'; this is a {board}' if board else ''}.")
    command = [program, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Gpus(note=f"nvidia-smi failed: {error}")
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        return Gpus(note=f"nvidia-smi failed: {said[0] if said else f'exit code {done.returncode}'}")
    rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines())]
    found = tuple(Gpu(name=row[0], driver=row[1], memory_mib=row[2]) for row in rows if len(row) == len(_ASKED))
    return Gpus(found=found, note=None if found else "nvidia-smi lists no GPU.")


def find_places() -> list[Place]:
    """Return where checkpoints, engines' timings, temporary files and, by default, results go."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HUB_CACHE") or f"{os.environ.get('HF_HOME') or f'{cache}/huggingface'}/hub"
    places = [_place("checkpoints from the hub", hub)]
    if models := os.environ.get("SAFEVLM_MODELS"):
        places.append(_place("checkpoints of SAFEVLM_MODELS", models))
    places.append(_place("TensorRT's timings", f"{cache}/safevlm-edge"))
    places.append(_place("temporary files", os.environ.get("TMPDIR") or "/tmp"))
    places.append(_place("the current folder", "."))
    return places


def _place(purpose: str, text: str) -> Place:
    try:
        path = Path(os.path.expanduser(text)).absolute()  # noqa: PTH111  Path's own raises where there is no home
        there = next(each for each in (path, *path.parents) if each.exists())
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Place(purpose=purpose, path=text, problem=error.strerror or str(error))
    problem = "cannot be written" if not os.access(there, os.W_OK | os.X_OK) else "full" if free == 0 else None
    return Place(purpose=purpose, path=str(path), free_bytes=free, problem=problem)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""
