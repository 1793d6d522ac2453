"""The images that a judge is shown: found in a folder by the names that a run record gives them."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runs.record import Row
from benchmarks.suites.image_files import find_image, is_plain
from safevlm.errors import ImageFileError, InputError
from safevlm.files.regular_file import read_regular
from safevlm.images.image import open_image

__all__ = ["ShownImages"]

MAX_IMAGE_BYTES = 2**30
QUALITY = 90
NAMED = 5


@dataclass(frozen=True, kw_only=True)
class ShownImages:
    """Pictures under ``folder``, or its ``images``, sent as upright RGB JPEG of at most ``max_side`` pixels a side."""

    folder: Path
    max_side: int = 1024

    def identity(self) -> dict[str, Any]:
        """Return what is done to the images, not where they lie."""
        return {"max_side": self.max_side, "format": f"JPEG, quality {QUALITY}"}

    def check(self, rows: Iterable[Row]) -> None:
        """Refuse rows whose image is not there, before anything is asked. Raises InputError that names some."""
        names = sorted({row.image for row in rows if row.image is not None})
        missing = [name for name in names if self._find(name) is None]
        if missing:
            shown = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
            raise InputError(
                f"{self.folder}: {len(missing)} of {len(names)} images are missing: {shown}. Give the folder that "
                "image names start from with --images, or --no-images to judge by the text alone."
            )

    def fingerprint(self, name: str) -> dict[str, Any]:
        """Return what decides the data URL of an image. Raises ImageFileError when it cannot be read."""
        return {"sha256": hashlib.sha256(self._content(name)).hexdigest(), **self.identity()}

    def data_url(self, name: str) -> str:
        """Return an image as a data URL. Raises ImageFileError for a file that is no readable image."""
        picture = open_image(self._content(name))
        picture.thumbnail((self.max_side, self.max_side))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=QUALITY)
        return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")

    def _content(self, name: str) -> bytes:
        path = self._find(name)
        if path is None:
            raise ImageFileError(f"{name} is missing in {self.folder}.")
        try:
            return read_regular(path, MAX_IMAGE_BYTES)
        except OSError as error:
            raise ImageFileError(f"{path}: it cannot be read ({error.strerror}).") from error

    def _find(self, name: str) -> Path | None:
        """Return where an image lies. A run record may come from anywhere: its names must not leave the folder."""
        if not is_plain(name):
            raise InputError(f"image {name!r} of a row is not a relative path inside {self.folder}.")
        return find_image(self.folder, name)
