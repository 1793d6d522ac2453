"""The pictures that an export is checked on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from export.guard.int8 import Int8Images
from safevlm.checkpoint.guard_head import standard_classes
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import InputError
from safevlm.images.image import open_image
from safevlm.images.image_folder import image_files

__all__ = ["FEWEST_HELD_OUT", "MOST_HELD_OUT", "PicturesOnDemand", "int8_images", "parity_images"]

FEWEST_HELD_OUT = 200
"""Fewer cannot show a flip of one label in a thousand, nor a change of the ranking."""
MOST_HELD_OUT = 1000


def parity_images(preprocessing: Preprocessing, count: int, folder: Path | None = None) -> NDArray[np.uint8]:
    """Return ``count`` pictures as uint8 n × H × W × 3 at the contract's size.

    They come from ``folder`` (the first by name; fewer if it has fewer), else from the calibration part of
    holisafe-mini, safe and unsafe ones mixed.

    Raises InputError for an empty folder, ImageFileError for an unreadable picture.
    """
    if folder is None:
        pictures = build_suite("calibration", pairs=400, questions=0).pictures
        spread = np.linspace(0, len(pictures) - 1, min(count, len(pictures))).astype(int)
        images = [draw(pictures[i].scene) for i in spread]
    else:
        images = [open_image(path) for path in image_files(folder)[:count]]
    return np.stack([preprocessing.apply(image) for image in images])


class PicturesOnDemand:
    """Pictures that are read or drawn, and brought to the contract's size, when they are asked for."""

    def __init__(self, makers: Sequence[Callable[[], Image]], preprocessing: Preprocessing) -> None:
        self._makers = makers
        self._preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, which: slice, /) -> NDArray[np.uint8]:
        """Return uint8 n × H × W × 3. Raises ImageFileError for an unreadable picture."""
        return np.stack([self._preprocessing.apply(make()) for make in self._makers[which]])


def int8_images(
    preprocessing: Preprocessing, calibration: int, folder: Path | None = None, *, held_out: int = MOST_HELD_OUT
) -> Int8Images:
    """Return pictures that set INT8 scales, and others, ``held_out`` at most, that judge the file.

    They come from ``folder``, every so many of them for calibration, else from the calibration part of holisafe-mini,
    whose labels are known.

    Raises InputError for a folder with too few pictures, ImageFileError for an unreadable one.
    """
    harms = None
    makers: list[Callable[[], Image]]
    if folder is None:
        suite = build_suite("calibration", pairs=3000, questions=0).pictures
        rng = np.random.default_rng(0)
        chosen = [suite[i] for i in rng.permutation(len(suite))[: calibration + held_out]]
        makers = [partial(draw, picture.scene) for picture in chosen]
        names = (None, *standard_classes()[1:])
        harms = tuple(names[picture.scene.label] for picture in chosen[calibration:])
    else:
        paths = image_files(folder)
        least = min(FEWEST_HELD_OUT, held_out)
        if len(paths) < calibration + least:
            raise InputError(
                f"{folder} has {len(paths)} images; INT8 needs {calibration} for its scales and at least "
                f"{least} more for judging. Give more, or leave int8 out of --precision."
            )
        order = np.random.default_rng(0).permutation(len(paths))[: calibration + held_out]
        makers = [partial(open_image, paths[i]) for i in order]
        for make in makers:
            make()  # an unreadable one is told now, not after hours
    return Int8Images(
        calibration=PicturesOnDemand(makers[:calibration], preprocessing),
        held_out=PicturesOnDemand(makers[calibration:], preprocessing),
        harms=harms,
    )
