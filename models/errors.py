"""The exception tree of the whole project, with the exit code each ends a command with.

::

    SafeVLMError                 1  a fault of ours
    ├── ParityError              1  an export differs from the reference path
    ├── InputError               2  bad input or usage
    │   ├── CheckpointError         a checkpoint folder, shard, tensor or config is not usable
    │   │   └── GuardHeadError      the visual guard's head, classes or tap is not usable
    │   ├── HubError                a checkpoint could not be fetched
    │   ├── BundleError             a guard bundle is altered, incomplete or unknown
    │   ├── ImageFileError          an image file cannot be judged
    │   ├── StorageError            a place is full, or cannot be written
    │   └── MissingExtraError       an optional library is not installed
    └── EngineUnavailableError   6  the bundle is complete, no engine could be built here

A message says what was wrong (the value, the shape, the tensor's name), what is allowed, and what to do
next. At the command line an exception that the machine caused (a full disk, a folder that may not be written) is told
as StorageError, too: see :mod:`models.storage`. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CheckpointError",
    "EngineUnavailableError",
    "GuardHeadError",
    "HubError",
    "ImageFileError",
    "InputError",
    "MissingExtraError",
    "ParityError",
    "SafeVLMError",
    "StorageError",
]


class SafeVLMError(Exception):
    """Root of every error this project raises on purpose."""

    exit_code = 1


class ParityError(SafeVLMError):
    """An exported graph does not agree with the reference path it was made from."""


class InputError(SafeVLMError):
    """What the caller gave cannot be used."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint's folder, config, shard or tensor is missing, damaged or of an unknown kind."""


class GuardHeadError(CheckpointError):
    """A checkpoint has no guard head, or one whose shape, classes or tap cannot be used."""


class HubError(InputError):
    """A checkpoint could not be fetched from the hub."""


class BundleError(InputError):
    """A guard bundle is missing a file, was altered, leaves its folder or has an unknown schema."""


class ImageFileError(InputError):
    """An image file is unreadable, animated, of an unsupported mode or too large."""


class StorageError(InputError):
    """A place to write is full, read-only, forbidden or gone."""


class MissingExtraError(InputError):
    """A library that only some commands need is not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{library}', which is not installed: pip install 'safevlm-edge[{extra}]'"
        )


class EngineUnavailableError(SafeVLMError):
    """No engine can be built on this machine; the bundle without it is complete."""

    exit_code = 6
