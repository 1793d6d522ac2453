"""Wheels for a machine without a package index: split into loads of a bounded size here, joined and installed there.

::

    DIR/load-1/wheels.json   every wheel with its size, SHA-256 and pieces; the same in each load
    DIR/load-1/…             wheels, and pieces of those that fill more than a load (NAME.whl.2-of-7)
    DIR/load-2/…

Loads can be brought one at a time: what is complete is joined and installed, what is not is named. Importing this
module needs no package but click.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safevlm.errors import InputError
from safevlm.files.draft import draft_of, publish
from safevlm.files.storage import check_room, shown_bytes, storing
from safevlm.terminal.child import module_arguments

__all__ = ["LOAD_BYTES", "Piece", "Wheel", "download", "install", "prepare", "split"]

LOAD_BYTES = 38 * 2**20
INDEX = "wheels.json"
INDEX_BYTES = 2**16
"""Kept free in each load."""
CHUNK = 2**22
REFUSED = "pip install failed"
WITH_DEPENDENCIES = ("pydantic>=2.10",)
ALONE = (
    "onnxruntime-gpu==1.31.1",
    "tensorrt-rtx-cu13-bindings==1.7.1.116",
    "tensorrt-rtx-cu13-libs==1.7.1.116",
)
"""What these need besides, the machine has: CUDA's libraries come with torch."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PYTHON = "3.12"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One file of a load."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel, and the pieces that give it when they are joined in their order."""

    name: str
    bytes: int
    sha256: str
    pieces: tuple[Piece, ...]


# -- on a machine with a package index --------------------------------------------------------------------


def prepare(folder: Path, *, load_bytes: int = LOAD_BYTES) -> list[Wheel]:
    """Download the wheels that a proof can use and write them to ``folder``, which must not exist, as loads.

    Raises InputError when ``folder`` exists or pip fails.
    """
    if folder.exists():
        raise InputError(f"--prepare {folder} already exists. Give a new folder, or remove this one.")
    with draft_of(folder) as draft, storing(folder, advice="give --prepare another place"):
        downloads = draft / "downloads"
        for wanted in (WITH_DEPENDENCIES, ALONE):
            download(wanted, downloads, dependencies=wanted is WITH_DEPENDENCIES)
        wheels = split(sorted(downloads.glob("*.whl"), key=_size), draft, load_bytes)
        shutil.rmtree(downloads)
        publish(draft, folder)
    return wheels


def download(wanted: Sequence[str], folder: Path, *, dependencies: bool) -> None:
    """Download wheels for the machine's Python with pip. Raises InputError with pip's last words when it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for each in PLATFORMS for word in ("--platform", each)]
    only = ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON, *platforms]
    alone = [] if dependencies else ["--no-deps"]
    _pip("download", *only, *alone, "--no-cache-dir", "--dest", str(folder), *wanted)


def split(wheels: Sequence[Path], folder: Path, load_bytes: int) -> list[Wheel]:
    """Write wheels into folders ``load-N`` of at most ``load_bytes`` each, in order, with the index in each."""
    room = load_bytes - INDEX_BYTES
    if room <= 0:
        raise InputError(f"--load-mib is too small: a load holds at least {shown_bytes(INDEX_BYTES)}. Give 1 or more.")
    found, load, left = [], 1, room
    for path in wheels:
        sizes: list[int] = []
        loads: list[int] = []
        rest = _size(path)
        while rest:
            if not left:
                load, left = load + 1, room
            taken = min(rest, left)
            sizes.append(taken)
            loads.append(load)
            rest, left = rest - taken, left - taken
        names = [path.name] if len(sizes) == 1 else [f"{path.name}.{i + 1}-of-{len(sizes)}" for i in range(len(sizes))]
        with path.open("rb") as stream:
            for name, size, number in zip(names, sizes, loads, strict=True):
                _copy(stream, folder / f"load-{number}" / name, size)
        pieces = tuple(Piece(name=name, bytes=size) for name, size in zip(names, sizes, strict=True))
        found.append(Wheel(name=path.name, bytes=_size(path), sha256=_sha256([path]), pieces=pieces))
    for number in range(1, load + 1):
        (folder / f"load-{number}" / INDEX).write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")
    return found


def _copy(stream: BinaryIO, path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        while size:
            block = stream.read(min(size, CHUNK))
            out.write(block)
            size -= len(block)


# -- on the machine that proves ---------------------------------------------------------------------------


def install(wheels: Path, site: Path) -> tuple[list[Path], list[dict[str, str]]]:
    """Join and install what is complete in ``wheels``, each wheel into a folder of its own below ``site``.

    Returns the folders, for the search path, and of each wheel its name and what came of it (``installed``, or what
    is wrong). A folder with wheels and no index is taken as it is. Where pip refuses one, as those of another Python,
    none is used: they belong together, and half of them would hide what works.
    """
    folders: list[Path] = []
    told: list[dict[str, str]] = []
    for wheel, problem in _wheels(wheels):
        target = site / wheel.name.removesuffix(".whl")
        state = problem
        if not state and not target.is_dir():
            state = _install(wheel, wheels, target)
        if not state:
            folders.append(target)
        told.append({"wheel": wheel.name, "state": state or "installed"})
    refused = any(each["state"].startswith(REFUSED) for each in told)
    return [] if refused else folders, told


def _wheels(folder: Path) -> Iterator[tuple[Wheel, str]]:
    """Yield each wheel, with what keeps it from being joined; an empty text where nothing does."""
    indexes = sorted(folder.rglob(INDEX))
    if not indexes:
        for path in sorted(folder.rglob("*.whl")):
            whole = Piece(name=path.name, bytes=_size(path))
            yield Wheel(name=path.name, bytes=whole.bytes, sha256=_sha256([path]), pieces=(whole,)), ""
        return
    there = {path.name: path for path in folder.rglob("*") if path.is_file()}
    for wheel in _index(indexes[-1]):
        missing = [piece.name for piece in wheel.pieces if piece.name not in there]
        yield wheel, f"{len(missing)} of {len(wheel.pieces)} pieces are missing" if missing else ""


def _index(path: Path) -> list[Wheel]:
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        return [Wheel(**{**each, "pieces": tuple(Piece(**piece) for piece in each["pieces"])}) for each in stated]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not an index that --prepare wrote ({error}). Prepare the folder again.") from error


def _install(wheel: Wheel, folder: Path, target: Path) -> str:
    """Join a wheel, compare its hash, and let pip unpack it; return what is wrong."""
    there = {path.name: path for path in folder.rglob("*") if path.is_file()}
    pieces = [there[piece.name] for piece in wheel.pieces]
    if _sha256(pieces) != wheel.sha256:
        return "its SHA-256 differs from the index. Bring its pieces again"
    check_room(target, 4 * wheel.bytes)
    with draft_of(target) as draft:
        joined = draft / wheel.name
        with joined.open("wb") as out:
            for piece in pieces:
                with piece.open("rb") as stream:
                    shutil.copyfileobj(stream, out, CHUNK)
        try:
            _pip("install", "--no-index", "--no-deps", "--no-compile", "--target", str(draft / "site"), str(joined))
        except InputError as error:
            return str(error)
        publish(draft / "site", target)
    return ""


def _sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(CHUNK):
                digest.update(block)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size


def _pip(*arguments: Any) -> None:
    words = module_arguments("pip", *arguments, "--quiet", "--disable-pip-version-check")
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it gave no reason"]
        problem = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1])
        raise InputError(f"pip {arguments[0]} failed: {problem.removeprefix('ERROR: ')}")
