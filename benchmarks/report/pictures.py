"""Pictures of flipped samples, small, as data URLs; only where the caller asked for them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from benchmarks.suites.image_files import find_image
from safevlm.errors import ImageFileError, InputError
from safevlm.images.image import open_image

__all__ = ["read_pictures"]

SIDE = 288
"""Pixels of the longer side: enough to see what is asked, small enough for a thousand of them."""
QUALITY = 68


def read_pictures(folder: Path, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return for each name a JPEG's data URL and why there is none; one of them is empty.

    Raises InputError when ``folder`` is none, or when it holds none of the images.
    """
    if not folder.is_dir():
        raise InputError(
            f"--images {folder}: there is no such folder. Give the folder that the suite's image names start from."
        )
    wanted = sorted(set(names))
    found = {name: _picture(folder, name) for name in wanted}
    if wanted and not any(url for url, _ in found.values()):
        raise InputError(
            f"--images {folder} has none of the {len(wanted)} images of changed samples; {wanted[0]!r}: "
            f"{found[wanted[0]][1]}. Give the folder that image names start from, or leave --images out."
        )
    return found


def _picture(folder: Path, name: str) -> tuple[str, str]:
    if "\0" in name or not (folder / name).resolve().is_relative_to(folder.resolve()):
        return "", "its name leads out of the image folder"  # a run record is no reason to read other files
    try:
        picture = open_image(find_image(folder, name) or folder / name)
    except ImageFileError as error:
        return "", str(error)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}", ""
