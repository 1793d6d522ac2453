"""The images that different readers show of one file: what a check for other pipelines has to judge.

A reader composites transparency on white, on black or on the grey of its window, or drops it; it applies the EXIF
orientation, a colour profile and a gamma, or ignores them; it scales 16 bits, clips or stretches them; it shows the
first image of an MPO, or another (``safevlm.images.image`` opens those). The views of an image are all of these that
its file gives occasion for, the usual one first. An opaque, upright image of 8 bits with an ordinary profile has one.
Embedded thumbnails are no views.

Views come one at a time: each may have 50 million pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops

from safevlm.errors import ImageFileError
from safevlm.images.ambiguity import ambiguity
from safevlm.images.shown_colours import other_colours
from safevlm.images.stored_image import StoredImage, before_loading

__all__ = ["USUAL", "View", "views"]

USUAL = "usual"
"""The name of a view in which nothing was to choose."""
GROUNDS = {"on white": (255, 255, 255), "on black": (0, 0, 0), "on grey": (128, 128, 128)}

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF 2.3, tag 274: what turns the stored image upright."""
BACK = {**UPRIGHT, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}

OPAQUE_MODES = frozenset(("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"))
ALPHA_MODES = frozenset(("LA", "PA", "RGBA"))
PREMULTIPLIED_MODES = {"La": "LA", "RGBa": "RGBA"}
SIXTEEN_BIT_MODES = frozenset(("I;16", "I;16B", "I;16L", "I;16N"))

Named = tuple[str, Image.Image]


@dataclass(frozen=True, eq=False)
class View:
    """An RGB image of 8 bits, and by what choice of its reader it is another than the usual one."""

    name: str
    image: Image.Image


def views(image: Image.Image, where: str) -> Iterator[View]:
    """Yield the views of an opened image, the usual one first.

    Raises ImageFileError for an unsupported colour mode and, after the usual view, for a file where it is unknown what
    other readers show. Whatever Pillow raises on damaged pixels comes through.
    """
    reason = ambiguity(image)
    stored = before_loading(image)
    image.load()
    for name, flat in _flat(image, stored, where):
        for turned, upright in _turned(flat, stored):
            yield View(", ".join(part for part in (name, turned) if part) or USUAL, upright)
            if reason is not None:
                raise _unclear(where, reason)


def _unclear(where: str, reason: str) -> ImageFileError:
    return ImageFileError(
        f"{where}: programs may show it differently: {reason}. Save it as a plain 8-bit RGB PNG or JPEG and try again."
    )


def _turned(flat: Image.Image, stored: StoredImage) -> Iterator[Named]:
    """Yield an image as EXIF turns it, and as it is stored. Pillow turns a TIFF when it loads it."""
    turn = stored.orientation
    if turn not in UPRIGHT:
        yield "", flat
        return
    yield "", flat if stored.turned_on_loading else flat.transpose(UPRIGHT[turn])
    yield "rotation ignored", flat.transpose(BACK[turn]) if stored.turned_on_loading else flat


def _flat(image: Image.Image, stored: StoredImage, where: str) -> Iterator[Named]:
    """Yield RGB images, not turned, the usual one first."""
    colour, alpha = _split(image, stored, where)
    for way, version in _colours(image, colour, stored):
        if way and alpha is not None and stored.alpha == "premultiplied":
            raise _unclear(where, f"its colours are multiplied by its transparency, and differ when {way}")
        for name, flat in [("", version)] if alpha is None else _composited(version, alpha, stored):
            yield ", ".join(part for part in (name, way) if part), flat
        if stored.frame is not None:
            yield "its frame alone", version.crop(stored.frame)


# -- colour -------------------------------------------------------------------------------------------------


def _colours(image: Image.Image, colour: Image.Image, stored: StoredImage) -> Iterator[Named]:
    """Yield the colours of an image, without its transparency, as RGB."""
    yield "", colour.convert("RGB")
    yield from other_colours(colour, image.info.get("icc_profile"), image.info.get("gamma"))
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO"):
        yield "inks inverted", ImageChops.invert(image).convert("RGB")
    if stored.raw is not None:
        yield "highest level ignored", _grey_or_rgb(stored.raw >> (8 if stored.raw.max() > 255 else 0))
        yield from _deep_versions(stored.raw)
    elif _is_deep(image):
        yield from _deep_versions(_deep(image))


def _is_deep(image: Image.Image) -> bool:
    """Say whether an image has grey levels of 16 bits."""
    return image.mode in SIXTEEN_BIT_MODES or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _deep(image: Image.Image) -> npt.NDArray[np.uint16]:
    levels: npt.NDArray[Any] = np.asarray(image)
    if levels.dtype.itemsize > 2:
        levels = np.clip(levels, 0, 65_535)
    return levels.astype(np.uint16, copy=False)


def _deep_versions(levels: npt.NDArray[np.uint16]) -> Iterator[Named]:
    """Yield levels of 16 bits as readers show them that do not take the upper eight."""
    yield "levels clipped at 255", _grey_or_rgb(np.minimum(levels, 255))
    least, most = int(levels.min()), int(levels.max())
    if most > least:
        yield "levels stretched", _grey_or_rgb((levels.astype(np.float32) - least) * (255 / (most - least)))


def _grey_or_rgb(levels: npt.NDArray[Any]) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


# -- transparency -------------------------------------------------------------------------------------------


def _split(image: Image.Image, stored: StoredImage, where: str) -> tuple[Image.Image, Image.Image | None]:
    """Return an image's colour, of mode L, RGB or CMYK, and its alpha, None where it is opaque throughout."""
    mode, alpha = image.mode, _key_alpha(image, stored)
    if _is_deep(image):
        colour = Image.fromarray((_deep(image) >> 8).astype(np.uint8))
    elif mode in ALPHA_MODES or mode in PREMULTIPLIED_MODES or (mode == "P" and image.has_transparency_data):
        layer = image
        if mode in PREMULTIPLIED_MODES:
            layer = Image.frombytes(PREMULTIPLIED_MODES[mode], image.size, image.tobytes())
        layer = layer if layer.mode == "RGBA" else layer.convert("RGBA")
        colour, alpha = layer.convert("RGB"), layer.getchannel("A")
    elif mode in OPAQUE_MODES:
        colour = image if mode in ("L", "RGB", "CMYK") else image.convert("RGB")
    else:
        raise ImageFileError(
            f"{where}: mode {mode} is not supported. Allowed are grey, palette, RGB, CMYK and YCbCr "
            "with or without transparency, at 8 or 16 bits; save it as an RGB PNG and try again."
        )
    if stored.frame is not None:
        inside = Image.new("L", image.size, 0)
        inside.paste(255 if alpha is None else alpha.crop(stored.frame), stored.frame)
        alpha = inside
    least, most = (255, 255) if alpha is None else alpha.getextrema()
    is_opaque = least == 255 or (stored.alpha == "padding" and most == 0)
    return colour, None if is_opaque else alpha


def _key_alpha(image: Image.Image, stored: StoredImage) -> Image.Image | None:
    """Return the alpha of an image one colour of which is transparent."""
    key = image.info.get("transparency")
    if key is None or not (image.mode in ("1", "L", "RGB") or _is_deep(image)):
        return None
    wanted = np.array(key, dtype=np.int64) * stored.key_scale
    if _is_deep(image):
        same = _deep(image) == wanted
    else:
        same = np.asarray(image.convert("L") if image.mode == "1" else image) == wanted
    if same.ndim == 3:
        same = same[..., 0] & same[..., 1] & same[..., 2]
    return Image.fromarray(np.where(same, np.uint8(0), np.uint8(255)))


def _composited(colour: Image.Image, alpha: Image.Image, stored: StoredImage) -> Iterator[Named]:
    """Yield an image with its transparency on each ground and without it, what its file means by it first."""
    grounds = GROUNDS if stored.background is None else {**GROUNDS, "on its own background": stored.background}
    for number, reading in enumerate(READINGS[stored.alpha]):
        note = f", taken as {reading}" if number else ""
        if reading == "ignored":
            yield "transparency ignored", colour
        elif reading == "divided":
            yield "transparency divided by and ignored", _divided(colour, alpha)
            if ImageChops.subtract(colour, Image.merge("RGB", [alpha] * 3)).getbbox() is not None:
                for name, ground in grounds.items():  # colours that are brighter than they can be are cut off
                    yield name + note, _on(ground, _divided(colour, alpha), alpha, premultiplied=False)
        else:
            for name, ground in grounds.items():
                yield name + note, _on(ground, colour, alpha, premultiplied=reading == "premultiplied")


def _divided(colour: Image.Image, alpha: Image.Image) -> Image.Image:
    """Return the colours that were multiplied by alpha."""
    multiplied = Image.merge("RGBA", (*colour.split(), alpha))
    return Image.frombytes("RGBa", colour.size, multiplied.tobytes()).convert("RGBA").convert("RGB")


def _on(ground: tuple[int, int, int], colour: Image.Image, alpha: Image.Image, *, premultiplied: bool) -> Image.Image:
    below = Image.new("RGB", colour.size, ground)
    if not premultiplied:
        return Image.composite(colour, below, alpha)
    rest = Image.merge("RGB", [ImageChops.invert(alpha)] * 3)
    return ImageChops.add(colour, ImageChops.multiply(below, rest))


READINGS = {
    "straight": ("straight", "ignored"),
    "premultiplied": ("premultiplied", "ignored", "divided", "straight"),
    "extra": ("ignored", "straight", "premultiplied"),
    "padding": ("ignored", "straight"),
}
"""How a fourth channel is read, by what the file says it is; the usual reading first."""
