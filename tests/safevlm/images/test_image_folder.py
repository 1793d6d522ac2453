"""Every file of a folder is an image, no image, or cannot be read: told by content, and none is lost or waited for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from safevlm.errors import ImageFileError, InputError
from safevlm.images.image import open_image
from safevlm.images.image_folder import image_files, read_folder, shown_names
from tests.safevlm.images.image_files import encoded

IMAGE = Image.new("RGB", (8, 8), "red")
CONTENTS = {
    **{
        kind: encoded(IMAGE, kind)
        for kind in ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
    },
    "cut PNG": encoded(IMAGE, "PNG")[:30],
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "JPEG XL": b"\xff\x0a" + bytes(30),
    "SVG": b"<?xml version='1.0'?><svg xmlns='x'/>",
}
OTHERS = {
    "empty": b"",
    "labels": b'{"image": "a.png"}',
    "text": b"BMW, P3 and GIFs are words.\n",
    "archive": b"PK\3\4" + bytes(30),
    "page": b"<html><body>404</body></html>",
    "litter": b"\0\0\0\1Bud1" + bytes(30),
}
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)
ENDINGS = st.sampled_from(["", "", ".png", ".JPG", ".txt", ".jfif", ".JPG~", ".bak", ".json"])


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.parent, target_is_directory=True)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere at all")


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (fifo, "others"),
    "circle": (loop, "unreadable"),
    "dangling": (dangling, "unreadable"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "others"),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.lists(NAMES, max_size=3), NAMES, ENDINGS, st.sampled_from([*CONTENTS, *OTHERS, *SPECIAL])),
        max_size=12,
    )
)
def test_every_file_is_in_the_list_that_is_right_for_it(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[list[str], str, str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("random")
    expected: dict[Path, str] = {}
    for parents, stem, ending, kind in made:
        path = folder.joinpath(*parents, stem + ending)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):
                continue
            if kind in SPECIAL:
                SPECIAL[kind][0](path)
            else:
                path.write_bytes({**CONTENTS, **OTHERS}[kind])
        except OSError:  # a file where a folder was to be, or a name that is too long
            continue
        named = path.suffix.lower() in (".png", ".jpg", ".jfif")
        ordinary = "images" if kind in CONTENTS or named else "others"
        expected[path] = SPECIAL[kind][1] if kind in SPECIAL else ordinary
    found = read_folder(folder)
    lists = {"images": found.images, "others": found.others, "unreadable": tuple(path for path, _ in found.unreadable)}
    assert {path: name for name, paths in lists.items() for path in paths} == expected
    assert sum(map(len, lists.values())) == len(expected) and all(
        tuple(sorted(each)) == each for each in lists.values()
    )
    for path in found.others:
        if path.is_file():
            with pytest.raises(ImageFileError):
                open_image(path)


def test_a_name_of_bytes_that_are_no_text_is_read_and_shown(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(CONTENTS["PNG"])
    (path,) = read_folder(tmp_path).images
    assert open_image(path).size == (8, 8)
    assert shown_names([path]).endswith(r"caf\udce9.png")


def test_a_socket_and_a_path_beyond_the_systems_limit_hold_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("listening.png")
        assert read_folder(tmp_path).others == (tmp_path / "listening.png",)
    Path("listening.png").unlink()
    for _ in range(20):
        Path("d" * 250).mkdir()
        os.chdir("d" * 250)
    Path("deep.png").write_bytes(CONTENTS["PNG"])
    ((path, problem),) = read_folder(tmp_path).unreadable
    assert path.name == "d" * 250 and "too long" in problem
    with pytest.raises(ImageFileError, match="cannot be read"):
        image_files(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_unreadable_and_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "closed.txt").write_bytes(b"?")
    (tmp_path / "closed.txt").chmod(0)
    assert [path.name for path, _ in read_folder(tmp_path).unreadable] == ["closed", "closed.txt"]


def test_a_folder_that_cannot_be_learnt_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a folder without image files\. Give"):
        image_files(tmp_path)
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(InputError, match=r"without image files; it has .*labels\.json"):
        image_files(tmp_path)
    for path in (tmp_path / "none", tmp_path / "labels.json"):
        with pytest.raises(InputError, match="this folder cannot be read"):
            image_files(path)
    (tmp_path / "no ending").write_bytes(CONTENTS["AVIF"])
    assert image_files(tmp_path) == (tmp_path / "no ending",)
