"""What goes upstream of an image: its pixels and nothing else, as every reader sees them, in about as many bytes."""

from __future__ import annotations

import base64
import ctypes
import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import pyvips
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from runtimes.gateway.images.encoding import ALWAYS_ALLOWED_BYTES, MOST_GROWTH, Encoded, encode
from safevlm.images.image import open_image
from tests.benchmarks.report.chromium import BINARY, Chromium
from tests.safevlm.images.image_files import DISPLAY_P3, profile, smooth

Levels = npt.NDArray[np.uint8]
Reader = Callable[[bytes, str], Levels]
ROUNDING = 2
"""Grey levels by which two decoders of one JPEG without subsampling may differ, libjpeg's and stb_image's."""
MARKERS = {0xE0: "JFIF", 0xDB: "tables", 0xC0: "frame", 0xC4: "codes", 0xDA: "scan"}
P3 = profile(np.linspace(0, 1, 64) ** 1.8, DISPLAY_P3)


def opencv(content: bytes, kind: str) -> Levels:
    read = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    assert read is not None and read.dtype == np.uint8
    return read[..., ::-1] if read.ndim == 3 else np.repeat(read[..., None], 3, axis=2)


def libvips(content: bytes, kind: str) -> Levels:
    image = pyvips.Image.new_from_buffer(content, "")
    assert not image.get_typeof("icc-profile-data") and not image.hasalpha()
    return np.asarray(image.colourspace("srgb").numpy())


def llamacpp(content: bytes, kind: str) -> Levels:
    """Read it as llama-server does, by stb_image."""
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


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    if BINARY is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")

    with Chromium(tmp_path_factory.mktemp("profile")) as browser:

        def read(content: bytes, kind: str) -> Levels:
            url = f"data:{kind};base64,{base64.b64encode(content).decode()}"
            size, packed = browser.evaluate(
                "(async () => { const image = new Image(); "
                f"image.src = '{url}'; await image.decode(); "
                "const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight); "
                "const pen = canvas.getContext('2d'); pen.drawImage(image, 0, 0); "
                "const found = pen.getImageData(0, 0, canvas.width, canvas.height).data; "
                "return [[canvas.height, canvas.width, 4], "
                "btoa(Array.from(found, each => String.fromCharCode(each)).join(''))]; })()"
            )
            rgba = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(size)
            assert (rgba[..., 3] == 255).all()
            return rgba[..., :3]

        yield read


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Return an image file of any mode, with as much beside its pixels as its format takes."""
    mode = draw(st.sampled_from(["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "CMYK"]))
    kinds = {"CMYK": ["JPEG"], "L": ["JPEG", "PNG", "BMP", "GIF"], "RGB": ["JPEG", "PNG", "WEBP", "BMP", "GIF"]}
    kind = draw(st.sampled_from(kinds.get(mode, ["PNG"])))
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    levels = smooth(draw(st.integers(0, 99)), height, width, 4)
    if draw(st.booleans()):
        levels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, levels.shape, np.uint8)
    image = Image.fromarray(levels, "RGBA")
    if mode == "I;16":
        image = Image.fromarray(levels[..., 0].astype(np.uint16) * 255)
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode) if mode != "LA" else image.convert("LA")
    more: dict[str, Any] = {}
    exif = Image.Exif()
    exif[0x0112] = draw(st.integers(1, 8))
    exif[0x010E] = "words of the client's"
    if kind in ("JPEG", "PNG", "WEBP") and draw(st.booleans()):
        more["exif"] = exif
    if kind in ("JPEG", "PNG", "WEBP") and mode in ("RGB", "RGBA") and draw(st.booleans()):
        more["icc_profile"] = P3
    if kind == "JPEG":
        more |= {"quality": draw(st.integers(1, 100)), "progressive": draw(st.booleans()), "comment": b"words"}
        more["subsampling"] = 0 if mode in ("L", "CMYK") else draw(st.integers(0, 2))
    if kind == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("words", "of the client's", zip=True)
        if draw(st.booleans()):
            text.add(b"gAMA", struct.pack(">I", draw(st.integers(20_000, 250_000))))
        more["pnginfo"] = text
        if mode in ("1", "L", "P", "RGB") and draw(st.booleans()):
            more["transparency"] = (1, 2, 3) if mode == "RGB" else draw(st.integers(0, 255 if mode != "1" else 1))
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue() + draw(st.sampled_from([b"", b"trailing words"]))


def parts(content: bytes) -> list[str]:
    """Return the chunks of a PNG or the segments of a JPEG; nothing else may be in it."""
    found, at = [], 8
    if content.startswith(b"\x89PNG"):
        while at < len(content):
            length, name = struct.unpack(">I4s", content[at : at + 8])
            found.append(name.decode())
            at += 12 + length
        assert at == len(content)
        return found
    at = 2
    while content[at + 1] != 0xDA:
        found.append(MARKERS[content[at + 1]])
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    end = content.index(b"\xff\xd9", at)
    assert end == len(content) - 2
    return [*found, "scan"]


def encoded(content: bytes) -> Encoded:
    return encode(open_image(content), content)


def test_all_readers_see_the_judged_pixels(chromium: Reader) -> None:
    kinds = set()

    @settings(deadline=None, derandomize=True, max_examples=150, database=None, suppress_health_check=list(HealthCheck))
    @given(files())
    def check(content: bytes) -> None:
        written = encoded(content)
        judged = np.asarray(written.image).astype(int)
        kinds.add(written.kind)
        for reader in (opencv, libvips, llamacpp, chromium):
            seen = reader(written.content, written.kind)
            assert seen.shape == judged.shape
            most = int(np.abs(seen - judged).max())
            assert most <= (0 if written.kind == "image/png" else ROUNDING), (reader.__name__, most)
        if written.kind == "image/png":
            assert (judged == np.asarray(open_image(content))).all()
            assert set(parts(written.content)) <= {"IHDR", "PLTE", "IDAT", "IEND"}
        else:
            assert set(parts(written.content)) <= set(MARKERS.values())
        assert b"words" not in written.content
        assert len(written.content) <= max(ALWAYS_ALLOWED_BYTES, MOST_GROWTH * len(content))

    check()
    assert kinds == {"image/png", "image/jpeg"}


def photo(width: int, height: int) -> Image.Image:
    grain = np.random.default_rng(1).integers(-8, 9, (height, width, 3))
    return Image.fromarray(np.clip(smooth(1, height, width, 3) + grain, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "more", "becomes"),
    [
        *(("JPEG", {"quality": quality}, "image/jpeg") for quality in (5, 30, 75, 90, 100)),
        ("JPEG", {"quality": 80, "progressive": True, "optimize": True}, "image/jpeg"),
        ("PNG", {}, "image/png"),
        ("GIF", {}, "image/png"),
        ("BMP", {}, "image/png"),
        ("WEBP", {"quality": 60}, "image/jpeg"),
        ("WEBP", {"lossless": True, "quality": 100}, "image/png"),
        ("AVIF", {"quality": 40}, "image/jpeg"),
        ("TIFF", {"compression": "tiff_lzw"}, "image/png"),
    ],
)
def test_no_file_grows_by_more_than_half(kind: str, more: dict[str, Any], becomes: str) -> None:
    image, buffer = photo(400, 300), io.BytesIO()
    image.save(buffer, kind, **more)
    written = encoded(buffer.getvalue())
    assert written.kind == becomes and len(written.content) <= MOST_GROWTH * len(buffer.getvalue())
    if kind == "JPEG" and more["quality"] >= 30:
        came, went = (np.asarray(each).astype(float) for each in (open_image(buffer.getvalue()), written.image))
        assert went.shape == came.shape and np.abs(went - came).mean() < 3, "it is as good as what came"


@pytest.mark.parametrize("size", [(65_535, 1), (1, 65_535), (1, 1), (3000, 2)])
def test_long_and_small_images(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for levels in (np.zeros((size[1], size[0], 3), np.uint8), rng.integers(0, 256, (size[1], size[0], 3), np.uint8)):
        for kind in ("PNG", "WEBP"):
            if kind == "WEBP" and max(size) > 16_383:
                continue
            buffer = io.BytesIO()
            Image.fromarray(levels).save(buffer, kind)
            written = encoded(buffer.getvalue())
            assert len(written.content) <= max(ALWAYS_ALLOWED_BYTES, MOST_GROWTH * len(buffer.getvalue()))


def test_a_long_image_that_no_png_holds_is_shrunk_to_what_a_jpeg_can_hold(tmp_path: Path) -> None:
    image = photo(65_535, 3)
    written = encode(image, b"x" * 40_000)
    assert written.kind == "image/jpeg" and written.image.width < 65_500 and len(written.content) <= 60_000
