"""The pictures that an export is checked on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.errors import InputError
from models.holisafe_mini.scene import draw
from models.holisafe_mini.suite import build_suite
from models.image import open_image
from models.preprocessing import Preprocessing

__all__ = ["parity_images"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def parity_images(preprocessing: Preprocessing, count: int, folder: Path | None = None) -> NDArray[np.uint8]:
    """Return ``count`` pictures as uint8 n × H × W × 3 at the contract's size.

    They come from ``folder`` (the first by name; fewer if it has fewer), else from the calibration part of
    holisafe-mini, safe and unsafe ones mixed.

    Errors: InputError for an empty folder, ImageFileError for an unreadable picture.
    """
    if folder is None:
        pictures = build_suite("calibration", pairs=400, questions=0).pictures
        spread = np.linspace(0, len(pictures) - 1, min(count, len(pictures))).astype(int)
        images = [draw(pictures[i].scene) for i in spread]
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[:count]
        if not paths:
            raise InputError(f"{folder} has no pictures; {', '.join(SUFFIXES)} files are looked for.")
        images = [open_image(path) for path in paths]
    return np.stack([preprocessing.apply(image) for image in images])
