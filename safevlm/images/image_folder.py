"""What lies in a folder of images: looked at by content, so that no ending hides an image and no folder is passed over.

The one way in which every command reads a folder. Nothing but the first bytes of regular files is read, and links to
folders are not followed, so that no pipe, device or circle of links holds a command up.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safevlm.errors import ImageFileError, InputError
from safevlm.files.regular_file import open_regular
from safevlm.terminal.printable import one_line

__all__ = ["FolderContent", "image_files", "no_images", "not_read", "read_folder", "shown_names"]

PREFIX = 64
"""Bytes by which an image file is recognised."""
NAMES_SHOWN = 5

JUDGED = re.compile(
    rb"""\xff\xd8\xff                                   # JPEG, MPO
    | \x89PNG\r\n\x1a\n | GIF8
    | BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0
    | RIFF....WEBP | ....ftypavi[fs]
    | (?:MM\0[*+]|II[*+]\0|MM\*\0|II\0\*)              # TIFF
    | \xff\x4f\xff\x51 | \0\0\0\x0cjP\x20\x20          # JPEG 2000
    | P[1-6f]\s+(?:[-+\d#]|\Z) | P(?:0CMYK|yP|yRGBA|yCMYK)\s   # PNM
    """,
    re.DOTALL | re.VERBOSE,
)
OTHER_IMAGES = re.compile(
    rb"""....ftyp(?:hei[cxsm]|hev[cx]|mif[12]|msf1|miaf) | \xff\x0a | \0\0\0\x0cJXL\x20
    | \0\0[\x01\x02]\0[\x01-\xff]\0 | icns | 8BP[SB] | gimp\x20xcf | v/1\x01 | \#\?R(?:ADIANCE|GBE) | DDS\x20 | qoif
    | BPG\xfb | FLIF | \x8aMNG | \x8bJNG | \xd7\xcd\xc6\x9a | (?:\xef\xbb\xbf)?\s*(?:<\?xml.{0,40})?<svg
    """,
    re.DOTALL | re.VERBOSE,
)
"""Other programs show these; here they are errors, so that nobody takes them for judged."""
NAMED_LIKE_IMAGES = frozenset(
    "." + ending
    for endings in (
        "jpg jpeg jpe jfif jfi jif jps mpo png apng pns webp avif tif tiff bmp dib gif",
        "jp2 j2k j2c jpc jpf jpx ppm pgm pbm pnm pam",
        "heic heif hif jxl ico icns psd psb svg tga pcx xbm xpm exr hdr qoi arw cr2 cr3 dng nef orf raf rw2",
    )
    for ending in endings.split()
)
"""A file of such a name is an image that is damaged, if its content is none."""


@dataclass(frozen=True)
class FolderContent:
    """The files under a folder, each in one of three lists, by name."""

    images: tuple[Path, ...]
    """To be judged; what is damaged or of a format that is not read is found out there."""
    others: tuple[Path, ...]
    """Neither content nor name says image: labels, archives; and pipes and devices, whatever their names."""
    unreadable: tuple[tuple[Path, str], ...]
    """Files, folders and links to folders that are not looked into, and why: there may be images in them."""


def read_folder(folder: Path) -> FolderContent:
    """Look at every file in a folder and below it. Raises InputError for a folder that cannot be read itself."""
    images: list[Path] = []
    others: list[Path] = []
    unreadable: list[tuple[Path, str]] = []
    for path, problem in _files(folder):
        if problem is None:
            try:
                (images if _is_image(path) else others).append(path)
                continue
            except OSError as error:
                problem = error.strerror or str(error)
        if path == folder:
            raise InputError(f"{folder}: this folder cannot be read ({problem}). Give a folder that can be read.")
        unreadable.append((path, problem))
    return FolderContent(tuple(sorted(images)), tuple(sorted(others)), tuple(sorted(unreadable)))


def image_files(folder: Path) -> tuple[Path, ...]:
    """Return the image files of a folder that is to be learnt from or checked with: all of it has to be readable.

    Raises InputError for a folder without images, ImageFileError for a file or folder that cannot be looked into.
    """
    content = read_folder(folder)
    for path, problem in content.unreadable:
        raise ImageFileError(not_read(path, problem))
    if not content.images:
        raise no_images(folder, content)
    return content.images


def no_images(folder: Path, content: FolderContent) -> InputError:
    """Return the error for a folder without images."""
    there = f"; it has {shown_names(content.others)}" if content.others else ""
    return InputError(f"{folder} is a folder without image files{there}. Give a folder of images, or image files.")


def not_read(path: Path, problem: str) -> str:
    """Return the message about a path that cannot be looked into."""
    return f"{path}: it cannot be read ({problem}). Remove it, repair it, or give the file that it points to."


def shown_names(paths: Sequence[Path]) -> str:
    """Return the first names of a list, escaped, and how many more there are."""
    more = f" and {len(paths) - NAMES_SHOWN} more" if len(paths) > NAMES_SHOWN else ""
    return ", ".join(one_line(str(path)) for path in paths[:NAMES_SHOWN]) + more


def _files(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield everything below a folder that is no folder, and folders that cannot be listed with the reason."""
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(place / entry.name)
                    elif entry.is_dir():
                        yield place / entry.name, "a link to a folder, which is not followed"
                    else:
                        yield place / entry.name, None
        except OSError as error:
            yield place, error.strerror or str(error)


def _is_image(path: Path) -> bool:
    """Say whether a file is an image by its first bytes, or at least by its name. Raises OSError."""
    if not stat.S_ISREG(path.stat().st_mode):  # not even opened: some devices act then
        return False
    with open_regular(path) as stream:
        prefix = stream.read(PREFIX)
    if JUDGED.match(prefix) or OTHER_IMAGES.match(prefix):
        return True
    return path.suffix.lower() in NAMED_LIKE_IMAGES
