"""The views of an image file hold what readers other than Pillow show of it, or the file is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from safevlm.errors import ImageFileError
from safevlm.images.image import open_image, open_views, to_views
from tests.safevlm.images.image_files import (
    DISPLAY_P3,
    Levels,
    as_others_read,
    bmp,
    encoded,
    packed,
    png,
    profile,
    smooth,
    with_extra_samples,
)

WORLD = Path(__file__).parents[2] / "fixtures" / "world" / "images"
HEIGHT, WIDTH = 18, 23
SHOWN, HIDDEN = (Image.fromarray(smooth(seed, HEIGHT, WIDTH, 3)) for seed in (1, 2))
RAMP = np.arange(256) / 255
LOSSY = ("JPEG", "WEBP", "AVIF", "MPO")
FORMATS = ("PNG", "TIFF", "WEBP", "JPEG", "BMP", "GIF", "JPEG2000", "AVIF", "PPM")


def seen(content: bytes) -> dict[str, Levels]:
    return {view.name: np.asarray(view.image).astype(int) for view in open_views(content)}


def distance(views: dict[str, Levels], other: Levels) -> float:
    """Return the mean difference of an image from the view that is nearest to it."""
    same = [view for view in views.values() if view.shape == other.shape]
    return min((float(abs(view - other.astype(int)).mean()) for view in same), default=255.0)


def with_alpha(alpha: Levels) -> Image.Image:
    image = HIDDEN.copy()
    image.putalpha(Image.fromarray(alpha))
    return image


# -- what the world does, and the property that finds it ----------------------------------------------------


@st.composite
def by_pillow(draw: st.DrawFn) -> tuple[bytes, float]:
    """Return a file that Pillow wrote, and how far another decoder may be from Pillow's own, on average."""
    kind = draw(st.sampled_from(FORMATS))
    mode = draw(st.sampled_from(["RGB", "RGBA", "LA", "L", "P", "CMYK", "YCbCr", "I;16", "1"]))
    colour = smooth(draw(st.integers(0, 99)), HEIGHT, WIDTH, 3)
    image = Image.fromarray(colour)
    if mode in ("RGBA", "LA"):
        image = image.convert(mode[:-1])
        alpha = smooth(draw(st.integers(0, 99)), HEIGHT, WIDTH, 1)
        kinds = [alpha, np.where(alpha > 127, 255, 0).astype(np.uint8), alpha * 0, alpha | 255]
        image.putalpha(Image.fromarray(draw(st.sampled_from(kinds))))
    elif mode == "I;16":
        image = Image.fromarray(colour[..., 0].astype(np.uint16) * draw(st.sampled_from([1, 16, 257])))
    else:
        image = image.convert(mode)
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" and draw(st.booleans()) else {}
    if draw(st.booleans()) and kind in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF"):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = draw(st.integers(1, 8))
    if draw(st.booleans()) and mode in ("RGB", "RGBA") and kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        options["icc_profile"] = profile(draw(st.sampled_from([RAMP**2.2, (1 - RAMP) ** 2.2, RAMP])))
    if mode == "P" and kind in ("PNG", "GIF") and draw(st.booleans()):
        options["transparency"] = draw(st.integers(0, 255))
    if kind == "JPEG" and mode in ("RGBA", "LA", "P", "I;16"):
        image = image.convert("RGB")
    try:
        content = encoded(image, kind, **options)
    except (OSError, ValueError, KeyError):  # no such file: another kind stands for it
        content = encoded(image.convert("RGB"), "PNG")
    if kind == "TIFF" and mode == "RGBA":
        content = with_extra_samples(content, draw(st.integers(0, 2)))
    rough = kind in LOSSY or (kind == "TIFF" and mode == "RGBA")  # dividing by a small alpha is rounded, too
    by_hand = mode == "YCbCr" and kind == "JPEG2000"  # OpenCV turns it into RGB by numbers of its own
    return content, 50.0 if mode == "CMYK" else 20.0 if by_hand else 9.0 if rough else 3.0


@st.composite
def png_by_hand(draw: st.DrawFn) -> tuple[bytes, float]:
    """Return a PNG of any depth and kind, with a transparent colour or palette."""
    depth, colour = draw(st.sampled_from([(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2), (4, 3), (8, 3)]))
    bands, bits = (3 if colour == 2 else 1), min(depth, 3)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    samples = rng.integers(0, 2**bits, (HEIGHT, 16, bands)) * draw(st.sampled_from([1, 2 ** (depth - bits)]))
    chunks = []
    if colour == 3:
        chunks.append((b"PLTE", rng.bytes(3 * 2**depth)))
    if draw(st.booleans()):
        key = int(samples[0, 0, 0]) + draw(st.sampled_from([0, 0, 256]))
        chunks.append((b"tRNS", rng.bytes(8) if colour == 3 else struct.pack(">H", key & 0xFFFF) * bands))
    return png(16, HEIGHT, depth, colour, packed(samples, depth), *chunks), 3.0


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.one_of(by_pillow(), by_pillow(), png_by_hand()))
def test_what_another_reader_shows_is_among_the_views_or_the_file_is_refused(made: tuple[bytes, float]) -> None:
    pytest.importorskip("cv2", reason="reading images as others do needs the dev extra")
    pytest.importorskip("pyvips", reason="reading images as others do needs the dev extra")
    content, tolerance = made
    try:
        views = seen(content)
    except ImageFileError as error:
        assert "may show it differently" in str(error)
        return
    for reader, levels in as_others_read(content):
        assert distance(views, levels) <= tolerance, (reader, list(views))


@pytest.mark.parametrize("path", sorted(path for path in WORLD.iterdir() if path.suffix != ".md"), ids=lambda p: p.name)
def test_the_worlds_files_hold_both_of_their_images_or_are_refused(path: Path) -> None:
    try:
        views = seen(path.read_bytes())
    except ImageFileError as error:
        assert "refused" in path.name and "may show it differently" in str(error)
        return
    assert "refused" not in path.name
    means = [view.reshape(-1, 3).mean(axis=0) for view in views.values()]
    assert any(mean[1] > 200 and mean[0] < 60 for mean in means), "no view is green"
    assert any(mean[0] > 200 and mean[1] < 60 for mean in means), "no view is red"


# -- one view, where there is one image ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_ordinary_image_has_one_view(kind: str, mode: str) -> None:
    assert list(seen(encoded(SHOWN.convert(mode), kind))) == ["usual"]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG2000"])
def test_an_opaque_alpha_channel_adds_no_view(kind: str) -> None:
    opaque = with_alpha(np.full((HEIGHT, WIDTH), 255, np.uint8))
    assert list(seen(encoded(opaque, kind))) == ["usual"]


@pytest.mark.parametrize("primaries", [None, DISPLAY_P3])
def test_a_display_profile_and_a_display_gamma_add_no_view(primaries: Any) -> None:
    image = SHOWN.convert("L") if primaries is None else SHOWN
    assert list(seen(encoded(image, "JPEG", icc_profile=profile(RAMP**2.2, primaries)))) == ["usual"]
    for gamma in (45_455, 55_556):
        rows = packed(np.asarray(SHOWN), 8)
        assert list(seen(png(WIDTH, HEIGHT, 8, 2, rows, (b"gAMA", struct.pack(">I", gamma))))) == ["usual"]


def test_thumbnails_and_what_follows_a_file_are_no_views() -> None:
    thumbnail = encoded(HIDDEN, "JPEG")
    exif = b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0" + struct.pack("<I", 14) + struct.pack("<H", 2)
    exif += struct.pack("<HHII", 0x201, 4, 1, 44) + struct.pack("<HHII", 0x202, 4, 1, len(thumbnail)) + bytes(4)
    content = encoded(SHOWN, "JPEG", exif=exif + thumbnail)
    assert thumbnail in content
    for behind in (b"", b"PK\3\4" + bytes(50), b"....ftypmp42" + thumbnail):
        assert list(seen(content + behind)) == ["usual"]


# -- views by name ------------------------------------------------------------------------------------------


def test_alpha_is_judged_on_every_ground_and_without() -> None:
    clear = with_alpha(np.zeros((HEIGHT, WIDTH), np.uint8))
    views = seen(encoded(clear, "PNG"))
    assert list(views) == ["on white", "on black", "on grey", "transparency ignored"]
    assert [int(views[name].mean()) for name in list(views)[:3]] == [255, 0, 128]
    assert np.array_equal(views["transparency ignored"], np.asarray(HIDDEN))
    assert np.array_equal(views["on white"], np.asarray(open_image(encoded(clear, "PNG"))))


def test_a_background_that_a_file_wants_is_a_ground() -> None:
    rgba = np.dstack([np.asarray(HIDDEN), np.zeros((HEIGHT, WIDTH), np.uint8)])
    views = seen(png(WIDTH, HEIGHT, 8, 6, packed(rgba, 8), (b"bKGD", struct.pack(">HHH", 200, 10, 30))))
    assert views["on its own background"][0, 0].tolist() == [200, 10, 30]
    clear = HIDDEN.quantize(16)
    views = seen(encoded(clear, "GIF", transparency=clear.getpixel((0, 0)), background=clear.getpixel((9, 9))))
    assert views["on its own background"][0, 0].tolist() == views["on its own background"][9, 9].tolist()


def test_an_opened_image_has_the_views_of_its_pixels() -> None:
    premultiplied = Image.frombytes("RGBa", HIDDEN.size, with_alpha(np.zeros((HEIGHT, WIDTH), np.uint8)).tobytes())
    names = {view.name for view in to_views(premultiplied)}
    assert {"on white", "on black", "on grey", "transparency ignored"} <= names


def test_every_image_of_an_mpo_is_a_view_whatever_its_index_says() -> None:
    content = encoded(SHOWN, "MPO", save_all=True, append_images=[HIDDEN, SHOWN])
    without_index = content.replace(b"MPF\0", b"MPX\0")
    gain_map = content.replace(b"\xff\xe2", b"\xff\xe1\0\x20" + b"hdrgm:Version='".ljust(30) + b"\xff\xe2", 1)
    for each in (content, without_index, gain_map, encoded(SHOWN, "JPEG") + encoded(HIDDEN, "JPEG")):
        views = seen(each)
        assert list(views)[:2] == ["usual", "image 2"]
        assert distance({"image 2": views["image 2"]}, np.asarray(HIDDEN)) < 9
    with pytest.raises(ImageFileError, match="cannot be decoded"):
        seen(content[:-60])
    with pytest.raises(ImageFileError, match="more than 16 images"):
        seen(encoded(SHOWN, "JPEG") * 17)


def test_a_frame_that_does_not_fill_a_gif_is_judged_alone_too() -> None:
    content = bytearray(encoded(HIDDEN.quantize(16), "GIF"))
    content[6:10] = struct.pack("<HH", 4 * WIDTH, 4 * HEIGHT)
    views = seen(bytes(content))
    assert views["its frame alone"].shape == (HEIGHT, WIDTH, 3) and views["on white"][-1, -1].tolist() == [255] * 3


def test_padding_that_could_be_alpha_is_judged_both_ways() -> None:
    rgbx = np.dstack([np.asarray(HIDDEN)[::-1, :, ::-1], np.zeros((HEIGHT, WIDTH), np.uint8)])
    assert list(seen(bmp(rgbx.tobytes(), WIDTH, HEIGHT, 32))) == ["usual"], "all zero is no alpha"
    rgbx[0, 0, 3] = 1
    assert next(iter(seen(bmp(rgbx.tobytes(), WIDTH, HEIGHT, 32)))) == "transparency ignored"


# -- refused: what other readers show cannot be told --------------------------------------------------------

PALETTE = bytes(range(16)) * 64
ONE_ROW = packed(np.asarray(SHOWN), 8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bmp(b"\2\1\0\0\4\3\0\1", 4, 2, 8, compression=1, palette=PALETTE), "skip pixels"),
        (bmp(b"\2\1\0\2\2\0\0\0\4\3\0\1", 4, 2, 8, compression=1, palette=PALETTE), "skip pixels"),
        (b"P5 2 1 255\nab" * 2, "several images"),
        (b"P6 2 1 65535\n" + bytes(12) + b"\nP6 2 1 255\n" + bytes(6), "several images"),
        (b"P4 9 1\nab" * 2, "several images"),
        (b"P2 2 1 255\n1 2\n" * 2, "several images"),
        (b"P2 2 1 9\n1 2\n", "go up to 9"),
        (png(WIDTH, HEIGHT, 8, 2, ONE_ROW, (b"cICP", bytes((9, 16, 0, 1)))), "HDR"),
        (
            png(WIDTH, HEIGHT, 8, 2, ONE_ROW, *[(b"gAMA", struct.pack(">I", value)) for value in (45_455, 1)]),
            "two gAMA",
        ),
        (
            png(WIDTH, HEIGHT, 8, 2, ONE_ROW, (b"cHRM", struct.pack(">8I", *[31_270, 32_900, 30_000, 60_000] * 2))),
            "cHRM",
        ),
        (encoded(SHOWN.convert("CMYK"), "TIFF", tiffinfo={330: 8}), "SubIFDs"),
        (encoded(SHOWN.convert("YCbCr"), "TIFF"), "some readers read as RGB"),
    ],
)
def test_a_file_whose_other_image_cannot_be_told_is_refused_and_still_opens(content: bytes, reason: str) -> None:
    with pytest.raises(ImageFileError, match=rf"may show it differently: .*{reason}.*plain 8-bit RGB PNG"):
        seen(content)
    assert open_image(content).mode == "RGB"


def test_run_lengths_that_name_every_pixel_are_judged() -> None:
    for runs in (b"\4\1\0\0\2\3\2\5\0\1", b"\0\4\1\2\3\4\0\0\0\3\1\2\3\0\1\5\0\0\0\1"):
        assert list(seen(bmp(runs, 4, 2, 8, compression=1, palette=PALETTE))) == ["usual"]
    assert list(seen(bmp(b"\4\x12\0\0\0\4\x12\x34\0\1", 4, 2, 4, compression=2, palette=PALETTE[:64]))) == ["usual"]
