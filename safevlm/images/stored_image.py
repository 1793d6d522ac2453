"""What is to be known of an opened image file before Pillow decodes its pixels, because decoding forgets it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.ImageFile import ImageFile

from safevlm.images.ambiguity import gif_background, png_background, raw_mode

__all__ = ["StoredImage", "before_loading"]

ORIENTATION = 0x0112
EXTRA_SAMPLES = 338
TIFF_EXTRA = ("LX", "PX", "RGBX", "RGBXX", "RGBXXX")
WITH_ALPHA = {"L": "LA", "La": "LA", "P": "PA", "RGB": "RGBA", "RGBA": "RGBA"}

Fourth = Literal["straight", "premultiplied", "extra", "padding"]


@dataclass(frozen=True, eq=False)
class StoredImage:
    """What a file says of its pixels.

    ``alpha`` is what a channel behind the colours means: ``extra`` (of no stated meaning) and ``padding`` are ignored
    by most readers. ``frame`` is where the one frame of a GIF lies that does not fill its screen; ``key_scale`` leads
    from a sample of 2 or 4 bits to a grey level; ``raw`` are the samples, H x W or H x W x 3, of a PNM file that says
    its highest level is neither 255 nor 65,535.
    """

    orientation: int = 1
    turned_on_loading: bool = False
    background: tuple[int, int, int] | None = None
    """What a PNG or GIF wants to be shown on."""
    alpha: Fourth = "straight"
    frame: tuple[int, int, int, int] | None = None
    key_scale: int = 1
    raw: npt.NDArray[np.uint16] | None = None


def before_loading(image: Image.Image) -> StoredImage:
    """Read it, and have a channel behind the colours decoded as it stands in the file."""
    stored = StoredImage(alpha="premultiplied" if image.mode in ("La", "RGBa") else "straight")
    if isinstance(image, ImageFile) and image.tile:
        box = image.tile[0][1]
        stored = StoredImage(
            turned_on_loading=image.format == "TIFF",
            background=gif_background(image) if image.format == "GIF" else png_background(image),
            alpha=_keep_fourth(image),
            frame=box if image.format == "GIF" and box != (0, 0, *image.size) else None,
            key_scale={"L;2": 85, "L;4": 17}.get(raw_mode(image), 1),
            raw=_raw_samples(image),
        )
    return replace(stored, orientation=image.getexif().get(ORIENTATION, 1))  # of a PNG, that loads it


def _keep_fourth(image: ImageFile) -> Fourth:
    """Change what Pillow is about to do: divide by associated alpha, or leave a further channel out."""
    bands, semicolon, depth = raw_mode(image).partition(";")
    meaning: Fourth
    if image.format == "TIFF" and "a" in bands:
        kept, meaning = bands.replace("a", "A"), "premultiplied"
    elif image.format == "TIFF" and bands in TIFF_EXTRA and EXTRA_SAMPLES in image.tag_v2:  # type: ignore[attr-defined]
        kept, meaning = bands.replace("X", "A", 1), "extra"
    elif image.format == "BMP" and bands == "BGRX" and image.info.get("compression") == 0:
        kept, meaning = "BGRA", "padding"
    else:
        return "straight"
    image._mode = WITH_ALPHA[image.mode]
    kept += semicolon + depth
    image.tile = [tile._replace(args=(kept, *tuple(tile.args or ())[1:])) for tile in image.tile]
    return meaning


def _raw_samples(image: ImageFile) -> npt.NDArray[np.uint16] | None:
    codec, _, offset, arguments = image.tile[0]
    if codec != "ppm" or image.fp is None or not isinstance(arguments, tuple) or arguments[1] == 65_535:
        return None
    width, height = image.size
    shape = (height, width, 3) if image.mode == "RGB" else (height, width)
    kind = np.dtype(">u2" if arguments[1] > 255 else np.uint8)
    position = image.fp.tell()
    image.fp.seek(offset)
    content = image.fp.read(int(np.prod(shape)) * kind.itemsize)
    image.fp.seek(position)
    if len(content) < int(np.prod(shape)) * kind.itemsize:
        raise OSError("image file is truncated")
    return np.frombuffer(content, kind).reshape(shape).astype(np.uint16)
