"""What a picture file becomes: what a viewer shows, or one clear refusal."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from safevlm.errors import ImageFileError
from safevlm.images.image import MAX_PIXELS, open_image, open_views, to_rgb
from tests.safevlm.images.image_files import encoded, png

RNG = np.random.default_rng(7)
NOISE = Image.fromarray(RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8))


def levels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG", "JPEG2000", "GIF", "AVIF"])
def test_every_allowed_format_opens_as_rgb(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(encoded(NOISE, kind))
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", NOISE.size)
    if kind in ("PNG", "BMP", "TIFF", "PPM"):
        assert np.array_equal(levels(image), levels(NOISE))
    assert np.array_equal(levels(open_image(path.read_bytes())), levels(image))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(NOISE, kind, exif=exif, **settings)
    tagged = NOISE.copy()
    tagged.getexif()[0x0112] = orientation
    assert np.array_equal(levels(open_image(content)), levels(ImageOps.exif_transpose(tagged)))


@pytest.mark.parametrize("value", [0, 9, 40_000])
def test_an_orientation_without_meaning_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert np.array_equal(levels(open_image(encoded(NOISE, "PNG", exif=exif))), levels(NOISE))


def test_transparent_pixels_are_white_whatever_colour_they_hide() -> None:
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (levels(open_image(encoded(hidden, "PNG"))) == 255).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert (abs(levels(open_image(encoded(half, "PNG"))) - 127) <= 1).all()
    grey = Image.new("LA", (4, 4), (0, 0))
    assert (levels(open_image(encoded(grey, "PNG"))) == 255).all()


def test_palette_and_colour_key_transparency_are_white_too() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    assert levels(open_image(encoded(palette, "PNG", transparency=0))).tolist() == [[[255] * 3, [0, 255, 0]]]
    assert levels(open_image(encoded(palette, "GIF", transparency=0))).tolist() == [[[255] * 3, [0, 255, 0]]]
    key = Image.new("RGB", (2, 1), (9, 9, 9))
    key.putpixel((1, 0), (0, 0, 200))
    assert levels(open_image(encoded(key, "PNG", transparency=(9, 9, 9)))).tolist() == [[[255] * 3, [0, 0, 200]]]


def test_cmyk_is_converted_as_pillow_does() -> None:
    cmyk = NOISE.resize((64, 64)).convert("CMYK")
    for kind in ("JPEG", "TIFF"):
        content = encoded(cmyk, kind)
        assert np.array_equal(levels(open_image(content)), levels(Image.open(io.BytesIO(content)).convert("RGB")))
    red = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert (abs(levels(open_image(red)) - [255, 0, 0]) <= 4).all()


def test_sixteen_bits_keep_their_upper_eight() -> None:
    ramp = np.arange(0, 65_536, 256 * 5 + 77, dtype=np.uint16)[None]
    expected = (ramp >> 8).astype(int)
    for kind in ("PNG", "TIFF"):
        opened = levels(open_image(encoded(Image.fromarray(ramp), kind)))
        assert (opened == expected[..., None]).all()
    colour = np.repeat(ramp[0], 3).astype(">u2").tobytes()
    rgb = open_image(png(ramp.shape[1], 1, 16, 2, b"\0" + colour))
    assert (levels(rgb) == expected[..., None]).all()
    rgba = np.stack([ramp[0]] * 3 + [np.full_like(ramp[0], 65_535)], axis=1).astype(">u2").tobytes()
    assert (levels(open_image(png(ramp.shape[1], 1, 16, 6, b"\0" + rgba))) == expected[..., None]).all()


def test_a_colour_key_of_sixteen_bits_counts_all_of_them() -> None:
    row = np.array([0x1234, 0x1200], ">u2").tobytes()
    content = png(2, 1, 16, 0, b"\0" + row, (b"tRNS", b"\x12\x34"))
    assert levels(open_image(content))[0, :, 0].tolist() == [255, 0x12]
    colour = np.array([0x1234] * 3 + [0x1200] * 3, ">u2").tobytes()  # of these, Pillow keeps the upper eight bits
    content = png(2, 1, 16, 2, b"\0" + colour, (b"tRNS", b"\x12\x34" * 3))
    assert levels(open_image(content))[0, :, 0].tolist() == [0x12, 0x12]
    with pytest.raises(ImageFileError, match="16 bits per channel transparent"):
        list(open_views(content))


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr"])
def test_plain_modes_equal_pillows_own_conversion(mode: str) -> None:
    image = NOISE.convert(mode)
    assert np.array_equal(levels(to_rgb(image)), levels(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "JPEG", "JPEG2000", "GIF", "AVIF", "PPM"])
def test_a_truncated_file_is_refused(kind: str, tmp_path: Path) -> None:
    content = encoded(NOISE, kind)
    path = tmp_path / "cut.img"
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ImageFileError, match=r"cut\.img: .*Allowed is one complete JPEG.*again\."):
            open_image(path)


def test_an_empty_a_missing_and_a_strange_file_are_refused(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty.png", tmp_path / "text.png"
    empty.touch()
    text.write_text("no picture at all")
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path, reason in [
        (empty, "it is empty"),
        (text, "not an image of a known format"),
        (tmp_path / "none.png", "no such file"),
        (tmp_path, "not a regular file"),
        (pipe, "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
        (Path("nul\0.png"), "no such file|cannot be read"),
    ]:
        with pytest.raises(ImageFileError, match=reason):
            open_image(path)
    with pytest.raises(ImageFileError, match=r"the given bytes: it is empty \(0 bytes\)"):
        open_image(b"")


def test_only_formats_that_are_taken_are_offered() -> None:
    for formats, offered in (({"WEBP", "JPEG"}, "JPEG or WebP"), ({"JPEG2000"}, "JPEG 2000")):
        with pytest.raises(ImageFileError, match=f"Allowed is one complete {offered} image"):
            next(open_views(b"no image at all", formats=formats))


def test_formats_that_start_other_programs_are_not_tried() -> None:
    with pytest.raises(ImageFileError, match="not an image of a known format"):
        open_image(encoded(NOISE, "EPS"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_more_than_one_picture_is_refused(kind: str) -> None:
    content = encoded(NOISE, kind, save_all=True, append_images=[ImageOps.invert(NOISE)])
    with pytest.raises(ImageFileError, match=r"animated or has several pages.*Save each frame"):
        open_image(content)


def test_a_phones_picture_with_a_second_one_behind_it_is_its_first() -> None:
    first = Image.new("RGB", (16, 16), (200, 0, 0))
    content = encoded(first, "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16), (0, 0, 200))])
    assert (abs(levels(open_image(content)) - [200, 0, 0]) <= 3).all()


def test_a_mode_without_plain_colour_is_refused() -> None:
    with pytest.raises(ImageFileError, match=r"mode F is not supported.*save it as an RGB PNG"):
        open_image(encoded(Image.new("F", (4, 4)), "TIFF"))
    with pytest.raises(ImageFileError, match="mode I is not supported"):
        open_image(encoded(Image.new("I", (4, 4), 70_000), "TIFF"))


@pytest.mark.parametrize(("width", "height"), [(10_000, 5_001), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (65_536, 2)])
def test_a_bomb_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    with pytest.raises(ImageFileError, match=r"pixels|too large"):
        open_image(png(width, height, 8, 2, b"\0" * 1000))


def test_scans_without_end_are_refused_and_what_only_looks_like_them_is_not() -> None:
    image = NOISE.convert("RGB")
    content = encoded(image, "JPEG", progressive=True, comment=b"\xff\xda" * 600)
    last = content.rindex(b"\xff\xda")
    assert open_image(content + b"\xff\xda" * 600).size == image.size  # a phone's video behind it
    slow = content[:last] + content[last:-2] * 501 + content[-2:]
    for each in (slow, slow[:last] + b"\xff\xfe\0\4\xff\xd9" + slow[last:]):
        with pytest.raises(ImageFileError, match="more than 500 scans"):
            open_image(each)


def test_the_pixel_limit_is_the_callers_and_is_stated() -> None:
    content = encoded(Image.new("RGB", (20, 10)), "PNG")
    assert open_image(content, max_pixels=200).size == (20, 10)
    with pytest.raises(ImageFileError, match=r"20 x 10 pixels. At most 199 pixels"):
        open_image(content, max_pixels=199)
    assert MAX_PIXELS == 50_000_000


def test_damage_is_an_image_file_error_or_a_picture_and_nothing_else() -> None:
    rng = random.Random(3)
    kinds = [(NOISE, "PNG"), (NOISE.convert("P"), "GIF"), (NOISE, "JPEG"), (NOISE, "WEBP"), (NOISE, "BMP")]
    contents = [encoded(image, kind) for image, kind in kinds]
    refused = 0
    for _ in range(400):
        damaged = bytearray(rng.choice(contents))
        for _ in range(3):
            damaged[rng.randrange(min(200, len(damaged)))] = rng.randrange(256)
        try:
            assert open_image(bytes(damaged)).mode == "RGB"
        except ImageFileError:
            refused += 1
    assert refused > 50
