"""What goes upstream: the judged pixels to every reader, nothing of the client's file, and not much larger than it."""

from __future__ import annotations

import ctypes
import io
import struct
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import pyvips
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from models.preprocessing import Preprocessing
from runtimes.gateway.decoder import _answer
from runtimes.gateway.encoding import FLOOR, GROWTH, encode, stated_quality
from tests.models.image_files import profile
from tests.runtimes.gateway.servers import SAFE

Levels = npt.NDArray[np.uint8]
SIZE = Preprocessing(height=24, width=24, fit="squash", filter="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]
JPEG_ROUNDING = 4
"""Grey levels between libjpeg's decoder and stb_image's, which rounds and smooths colours in another way."""
PICTURES = {
    "flat": np.full((40, 50, 3), 90, np.uint8),
    "noise": np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8),
    "scene": np.asarray(SAFE.resize((50, 40))),
    "few colours": np.random.default_rng(2).integers(0, 2, (40, 50, 3), np.uint8) * 255,
    "grey": np.repeat(np.random.default_rng(3).integers(0, 256, (40, 50, 1), np.uint8), 3, axis=2),
}


def opencv(content: bytes) -> Levels:
    return np.asarray(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1])


def libvips(content: bytes) -> Levels:
    return np.asarray(pyvips.Image.new_from_buffer(content, "").colourspace("srgb").numpy())[..., :3]


def llamacpp(content: bytes) -> Levels:
    """Read it as llama-server does."""
    mtmd = pytest.importorskip("llama_cpp.mtmd_cpp")
    buffer = (ctypes.c_uint8 * len(content)).from_buffer_copy(content)
    bitmap = mtmd.mtmd_helper_bitmap_init_from_buf(None, buffer, len(content), False)
    assert bitmap is not None
    try:
        shape = mtmd.mtmd_bitmap_get_ny(bitmap), mtmd.mtmd_bitmap_get_nx(bitmap), 3
        data = ctypes.string_at(mtmd.mtmd_bitmap_get_data(bitmap), mtmd.mtmd_bitmap_get_n_bytes(bitmap))
        return np.frombuffer(data, np.uint8).reshape(shape)
    finally:
        mtmd.mtmd_bitmap_free(bitmap)


READERS = (opencv, libvips, llamacpp)


def sent(content: bytes, mode: str = "whole") -> bytes:
    """Return what goes on of a client's file."""
    answer, parts = _answer(content, SIZE, formats=FORMATS, mode=mode, max_pixels=10**7)
    assert "refused" not in answer, answer
    return parts[0]


@st.composite
def client_files(draw: st.DrawFn) -> bytes:
    """Image files of many kinds, with what a client's file has beside its pixels."""
    image = Image.fromarray(PICTURES[draw(st.sampled_from(sorted(PICTURES)))])
    kind = draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    modes = {
        "PNG": ("RGB", "L", "LA", "RGBA", "P", "1", "I;16"),
        "JPEG": ("RGB", "L", "CMYK"),
        "WEBP": ("RGB", "RGBA"),
        "GIF": ("P", "L"),
        "BMP": ("RGB", "P", "L"),
        "TIFF": ("RGB", "L", "RGBA"),
    }
    mode = draw(st.sampled_from(modes[kind]))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(draw(st.integers(1, 255)))
    more: dict[str, Any] = {}
    if kind in ("PNG", "JPEG", "WEBP") and draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(1, 8))
        exif[0x010E] = "a secret"
        more["exif"] = exif
    if kind in ("PNG", "JPEG") and mode == "RGB" and draw(st.booleans()):
        more["icc_profile"] = profile(np.linspace(0, 1, 64) ** 1.8)
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("secret", "a secret")
        info.add(b"gAMA", struct.pack(">I", draw(st.sampled_from([45455, 100000]))))
        more["pnginfo"] = info
        if mode in ("L", "P"):
            more["transparency"] = draw(st.integers(0, 255))
    if kind == "JPEG":
        more |= {"quality": draw(st.integers(1, 100)), "comment": b"a secret"}
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue() + draw(st.sampled_from([b"", b"a secret behind it" * 20])) * (kind in ("PNG", "JPEG"))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(client_files())
def test_readers_that_are_not_pillow_see_the_judged_pixels(content: bytes) -> None:
    answer, parts = _answer(content, SIZE, formats=FORMATS, mode="whole", max_pixels=10**7)
    if "refused" in answer:
        return
    file, pixels = parts[0], np.frombuffer(parts[1], np.uint8).reshape(answer["shape"])
    judged = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    np.testing.assert_array_equal(SIZE.apply(Image.fromarray(judged)), pixels[0])
    for reader in READERS:
        seen = reader(file)
        most = 0 if answer["kind"] == "image/png" else JPEG_ROUNDING
        assert seen.shape == judged.shape
        assert np.abs(seen.astype(int) - judged).max() <= most, reader.__name__
    assert len(file) <= max(FLOOR, GROWTH * len(content))
    _check_plain(file)


def _check_plain(file: bytes) -> None:
    """Nothing but what the pixels need."""
    assert b"secret" not in file
    if file.startswith(b"\x89PNG"):
        at, names = 8, []
        while at < len(file):
            (length,) = struct.unpack_from(">I", file, at)
            names.append(file[at + 4 : at + 8])
            at += 12 + length
        assert set(names) <= {b"IHDR", b"PLTE", b"IDAT", b"IEND"} and names[-1] == b"IEND" and at == len(file)
        return
    at, markers = 2, []
    while file[at + 1] != 0xDA:
        markers.append(file[at + 1])
        at += 2 + struct.unpack_from(">H", file, at + 2)[0]
    assert set(markers) <= {0xE0, 0xDB, 0xC0, 0xC4} and file.endswith(b"\xff\xd9")


@pytest.mark.parametrize("picture", sorted(PICTURES))
def test_a_png_is_exact(picture: str) -> None:
    image = Image.fromarray(PICTURES[picture])
    found = encode(image, 100_000, lossy=None)
    assert found.kind == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found.content)).convert("RGB")), PICTURES[picture])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(came=st.integers(1, 60_000), lossy=st.none() | st.integers(1, 95), side=st.integers(1, 300))
def test_what_goes_on_is_not_much_larger_than_what_came(came: int, lossy: int | None, side: int) -> None:
    noise = np.random.default_rng(side).integers(0, 256, (side, 2 * side, 3), np.uint8)
    assert len(encode(Image.fromarray(noise), came, lossy=lossy).content) <= max(FLOOR, GROWTH * came)


@pytest.mark.parametrize("quality", [25, 30, 50, 75, 90, 95])
def test_the_quality_of_a_jpeg_is_read_from_its_tables(quality: int) -> None:
    buffer = io.BytesIO()
    SAFE.save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as image:
        assert abs(stated_quality(image.quantization) - quality) <= 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["tiles", "judged", "whole"])
def test_a_photograph_stays_a_jpeg_of_its_own_quality(mode: str) -> None:
    buffer = io.BytesIO()
    SAFE.resize((400, 300)).save(buffer, "JPEG", quality=60)
    with Image.open(io.BytesIO(sent(buffer.getvalue(), mode))) as image:
        assert image.format == "JPEG" and stated_quality(image.quantization) >= 57  # type: ignore[attr-defined]
