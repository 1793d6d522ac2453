"""The exception tree of the whole project, with the exit code each ends a command with.

::

    SafeVLMError                 1  a fault of ours
    ├── ParityError              1  an export differs from the reference path
    ├── BusyError                1  a runner is still at an earlier call
    ├── InputError               2  bad input or usage
    │   ├── CheckpointError         a checkpoint folder, shard, tensor or config is not usable
    │   │   ├── GuardHeadError      the visual guard's head, classes or tap is not usable
    │   │   └── PrecisionError       the checkpoint's numbers leave the range of a precision
    │   ├── HubError                a checkpoint could not be fetched
    │   ├── BundleError             a guard bundle is altered, incomplete or unknown
    │   │   └── EngineRefusedError     an engine is not for this device, or answers otherwise than its ONNX file
    │   ├── QuestionError            a question cannot be asked of a model
    │   ├── ImageFileError          an image file cannot be judged
    │   │   └── ImageFormatError     its format is not taken
    │   ├── StorageError            a place is full, or cannot be written
    │   ├── MissingExtraError       an optional library is not installed
    │   └── HiddenPackageError      another package has the name of one of ours and is found first
    └── EngineUnavailableError   6  the bundle is complete, no engine could be built here

A message says what was wrong (the value, the shape, the tensor's name), what is allowed, and what to do
next. At the command line an exception that the machine caused (a full disk, a folder that may not be written) is
reported as StorageError, too: see :mod:`safevlm.files.storage`. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from typing import Literal

from safevlm.terminal.printable import one_line, printable

__all__ = [
    "BundleError",
    "BusyError",
    "CheckpointError",
    "EngineRefusedError",
    "EngineUnavailableError",
    "GuardHeadError",
    "HiddenPackageError",
    "HubError",
    "ImageFileError",
    "InputError",
    "MissingExtraError",
    "ParityError",
    "PrecisionError",
    "QuestionError",
    "SafeVLMError",
    "StorageError",
]


class SafeVLMError(Exception):
    """Root of every error this project raises on purpose.

    Names, values and other libraries' words in a message come out of files: what is not plain text is escaped here,
    once for every place that shows or logs it.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ParityError(SafeVLMError):
    """An exported graph does not agree with the reference path it was made from."""


class BusyError(SafeVLMError):
    """A runner is still at an earlier call, which may hang, and takes no other meanwhile."""


class InputError(SafeVLMError):
    """What the caller gave cannot be used."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint's folder, config, shard or tensor is missing, damaged or of an unknown kind."""


class GuardHeadError(CheckpointError):
    """A checkpoint has no guard head, or one whose shape, classes or tap cannot be used."""


class PrecisionError(CheckpointError):
    """A checkpoint's numbers leave the range of a precision that was asked for.

    ``left_out`` are the precisions that a bundle was completed without; it is empty where nothing was written.
    """

    def __init__(self, message: str, *, left_out: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.left_out = left_out


class HubError(InputError):
    """A checkpoint could not be fetched from the hub."""


class BundleError(InputError):
    """A guard bundle is missing a file, was altered, leaves its folder or has an unknown schema."""


class EngineRefusedError(BundleError):
    """An engine of a bundle does not run here, or was not shown to answer as its ONNX file does.

    ``reason`` says so of this engine alone, without the advice that ends the message.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}. {advice}")
        self.reason = reason


class ImageFileError(InputError):
    """An image file is unreadable, animated, of an unsupported mode or too large."""


class ImageFormatError(ImageFileError):
    """An image is of a format that is known, but not taken here."""


class QuestionError(InputError):
    """A question is empty, too long, or holds what is not text; ``code`` is OpenAI's word for it.

    ``turn`` is the number of the turn that is wrong where it is one of them, ``key`` what is wrong with it.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "invalid_value",
        turn: int | None = None,
        key: Literal["role", "content"] = "content",
    ) -> None:
        super().__init__(message)
        self.code, self.turn, self.key = code, turn, key


class StorageError(InputError):
    """A place to write is full, read-only, forbidden or gone."""


class MissingExtraError(InputError):
    """A library that only some commands need is not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{library}', which is not installed: pip install 'safevlm-edge[{extra}]'"
        )


class HiddenPackageError(InputError, ImportError):
    """A package of somebody else's has the name of one of ours and is found in its place."""


class EngineUnavailableError(SafeVLMError):
    """No engine can be built on this machine; the bundle without it is complete."""

    exit_code = 6

    def __init__(self, message: str) -> None:
        Exception.__init__(self, printable(message))  # the command to run on the device has a line of its own
