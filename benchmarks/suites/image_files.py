"""Where a row's image lies: under ``images/`` of a benchmark's folder, or, in some copies, in the folder itself."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

__all__ = ["find_image", "is_plain"]


def is_plain(name: str) -> bool:
    """Say whether an image's name is a relative path that stays in its folder; run records may come from anywhere."""
    pure = PurePosixPath(name)
    return not (pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts)


def find_image(folder: Path, name: str) -> Path | None:
    """Return the file of a plain name, None where there is none."""
    return next((path for path in (folder / "images" / name, folder / name) if path.is_file()), None)
