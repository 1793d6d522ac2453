"""Pictures to learn from or to check with: a folder, a hub data set, or the built-in calibration part.

Each is read once, resized to the preprocessing contract's size and identified by its content, so that no image is in
two parts of a split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from safevlm.checkpoint.hub_failures import Wanted, bound_waiting, hub_failures, out_of_reach
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import ImageFileError, InputError, MissingExtraError
from safevlm.images.image import open_image, to_rgb
from safevlm.images.image_folder import no_images, not_read, read_folder

__all__ = ["BuiltIn", "Folder", "HubDataset", "PictureSource", "Pictures", "load_pictures", "picture_source"]

BUILT_IN_PAIRS = 9_000
"""Pairs of holisafe-mini's calibration part; about 4,000 images come with them."""
UNREADABLE_SHARE = 0.01
"""Up to this share of a source's files may be unreadable; they are named and passed over."""
NAMES_SHOWN = 5
HUB = "hub:"

Opened: TypeAlias = "tuple[str, Image.Image | ImageFileError]"


def _open(picture: Path | Image.Image, where: str = "") -> Image.Image | ImageFileError:
    try:
        return open_image(picture) if isinstance(picture, Path) else to_rgb(picture, where=where)
    except ImageFileError as error:
        return error


@dataclass(frozen=True, kw_only=True)
class Folder:
    """All image files in a folder and its subfolders, recognised by content, in order of name."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def opened(self) -> Iterator[Opened]:
        """Yield names and images, or why one cannot be read. Raises InputError for an empty folder."""
        if not self.path.is_dir():
            raise InputError(f"{self.path} is not a folder. Give --images a folder of images, or hub:NAME.")
        content = read_folder(self.path)
        if not content.images:
            raise no_images(self.path, content)
        for path, problem in content.unreadable:
            yield str(path), ImageFileError(not_read(path, problem))
        for file in content.images:
            yield str(file), _open(file)


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """The ``image`` column of a hub data set, through the datasets library: ``hub:owner/name@revision:split``."""

    name: str
    revision: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        return f"{HUB}{self.name}"

    def opened(self) -> Iterator[Opened]:
        """Yield row numbers and images. Raises MissingExtraError, InputError when it cannot be loaded."""
        try:
            import datasets
        except ImportError as error:
            raise MissingExtraError("datasets", "datasets", f"reading {self}") from error
        bound_waiting()
        try:
            rows: Any = datasets.load_dataset(self.name, split=self.split, revision=self.revision, streaming=True)
        except hub_failures() as error:
            raise out_of_reach(error, self._wanted) or InputError(
                f"{self}: the data set cannot be loaded ({error}). Check its name, its split ({self.split}) and the "
                "network, or give a folder."
            ) from error
        for number, row in enumerate(self._streamed(rows)):
            picture = row.get("image")
            if not isinstance(picture, Image.Image):
                raise InputError(
                    f"{self}, row {number}: column 'image' holds no image. The columns are {', '.join(row)}."
                )
            yield f"{self}#{number}", _open(picture, f"{self}#{number}")

    def _streamed(self, rows: Any) -> Iterator[Any]:
        """Yield rows; rows come over the network one by one. Raises InputError when that breaks off."""
        try:
            yield from rows
        except hub_failures() as error:
            raise out_of_reach(error, self._wanted) or InputError(
                f"{self}: reading failed ({error}). Try again, or give a folder."
            ) from error

    @property
    def _wanted(self) -> Wanted:
        return Wanted(self.name, self.revision, kind="dataset")


@dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """The calibration part of holisafe-mini, for the tiny checkpoints."""

    pairs: int = BUILT_IN_PAIRS

    def __str__(self) -> str:
        return "the calibration part of holisafe-mini"

    def opened(self) -> Iterator[Opened]:
        """Yield paths and drawn images."""
        for picture in build_suite("calibration", pairs=self.pairs, questions=0).pictures:
            yield picture.path, draw(picture.scene)


PictureSource: TypeAlias = "Folder | HubDataset | BuiltIn"


def picture_source(spec: str | Path) -> PictureSource:
    """Return the source that ``--images`` names: a folder, or ``hub:owner/name[@revision][:split]``."""
    text = str(spec)
    if not text.startswith(HUB):
        return Folder(path=Path(spec))
    name, _, split = text.removeprefix(HUB).partition(":")
    name, _, revision = name.partition("@")
    if not name:
        raise InputError(f"{text} is not a data set. Give hub:owner/name[@revision][:split].")
    return HubDataset(name=name, revision=revision or None, split=split or "train")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Distinct images at the contract's size.

    ``rgb`` is uint8 N × H × W × 3, ``sha256`` each one's hash of those bytes.
    """

    rgb: NDArray[np.uint8]
    names: tuple[str, ...]
    sha256: tuple[str, ...]
    duplicates: int = 0
    unreadable: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.names)


def load_pictures(source: PictureSource, preprocessing: Preprocessing) -> Pictures:
    """Read all images of a source, each content once.

    Raises InputError when there is none, or when more than 1 % cannot be read (all are named up to five).
    """
    rgb: list[NDArray[np.uint8]] = []
    names: dict[str, str] = {}
    unreadable: list[str] = []
    total = 0
    for name, picture in source.opened():
        total += 1
        if isinstance(picture, ImageFileError):
            unreadable.append(name)
            continue
        pixels = preprocessing.apply(picture)
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        if digest not in names:
            names[digest] = name
            rgb.append(pixels)
    if len(unreadable) > UNREADABLE_SHARE * total or not rgb:
        raise InputError(
            f"{source}: {len(unreadable)} of {total} images cannot be read ({shown(unreadable) or 'none given'}). At "
            "most 1 % is skipped. Repair or remove them."
        )
    return Pictures(
        rgb=np.stack(rgb),
        names=tuple(names.values()),
        sha256=tuple(names),
        duplicates=total - len(unreadable) - len(rgb),
        unreadable=tuple(unreadable),
    )


def shown(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
