"""Places that cannot be written: which one, why, what is free there, and what to do.

Writers hold :func:`storing` around what they write; what slips through is reported at the command line by
:func:`storage_problem`, which also knows libraries that hide the system's error in a text of their own.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safevlm.errors import InputError, StorageError

__all__ = [
    "check_room",
    "check_writable",
    "locale_problem",
    "refusal_to_write",
    "shown_bytes",
    "storage_problem",
    "storing",
]

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this file system or `ulimit -f` allows",
    errno.EROFS: "it is on a read-only file system",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EIO: "the device reports an input/output error",
    errno.ENAMETOOLONG: "a name in it is too long",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.EEXIST: "a file of that name exists",
    errno.ENOTEMPTY: "it exists already and is not empty",
    errno.ELOOP: "its symbolic links form a loop",
    errno.EBUSY: "it is in use, or a mount point",
    errno.EXDEV: "it is on another file system, or is a mount point",
    errno.ESTALE: "it is gone from the network file system",
    errno.ENXIO: "there is no such device",
    errno.ENODEV: "there is no such device",
    errno.EMFILE: "too many files are open in this process",
    errno.ENFILE: "too many files are open on this machine",
}
"""What the system's refusals to write mean. Anything else is no matter of the place."""
ADVICE = {
    errno.EFBIG: "Give another place, or raise the limit.",
    errno.EIO: "Check the disk and its cables, or give another place.",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.EMFILE: "Raise the limit with `ulimit -n`.",
    errno.ENFILE: "Close other programs.",
    errno.EXDEV: "Give a folder inside it.",
    errno.EBUSY: "Give a folder inside it.",
}
HIDDEN = (
    (errno.ENOSPC, re.compile(r"no space left on device|database or disk is full|os error 28\b", re.IGNORECASE)),
    (errno.ENOSPC, re.compile(r"\d requested and \d+ written|iostream error|inline_container.*unexpected pos")),
    (errno.EDQUOT, re.compile(r"disk quota exceeded|os error 122\b", re.IGNORECASE)),
    (errno.EFBIG, re.compile(r"file too large|os error 27\b", re.IGNORECASE)),
    (errno.EROFS, re.compile(r"read-only file system|readonly database|os error 30\b", re.IGNORECASE)),
    (errno.EACCES, re.compile(r"permission denied|os error 13\b", re.IGNORECASE)),
    (errno.EIO, re.compile(r"disk i/o error|input/output error|os error 5\b", re.IGNORECASE)),
    (errno.EMFILE, re.compile(r"too many open files|os error 24\b", re.IGNORECASE)),
)
"""Words in which libraries (safetensors, SQLite, numpy, torch's writer) pass the system's refusal on."""
_STRANGE = re.compile(r"[\ud800-\udfff]|\\udc[89a-f][0-9a-f]|surrogates not allowed")
"""Bytes of a name that are no letters in the locale's encoding, as Python holds and shows them, or refuses them."""
NO_ROOM = 64 * 2**10
"""Free bytes below which a file system is full: not even a small file fits."""


def shown_bytes(count: float) -> str:
    """Return bytes as people read them, in the largest unit that fits."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB" if count >= 2**10 or not count else f"{count:.0f} bytes"


def check_room(place: Path, needed: int, advice: str = "give --out another place") -> None:
    """Raise StorageError unless the file system of ``place`` has ``needed`` bytes free."""
    folder = _existing(place)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{place}: about {shown_bytes(needed)} are needed, but the file system {_mount(folder)} has only "
            f"{shown_bytes(free)} free. Make room there, or {advice}."
        )


def check_writable(place: Path, advice: str = "give --out another place") -> None:
    """Raise StorageError when nothing can be written where ``place`` is to be: before the work, not after it."""
    try:
        with tempfile.TemporaryFile(dir=_existing(place.absolute().parent), buffering=0) as file:
            file.write(b"\0")  # a full disk takes an empty file
    except OSError as error:
        raise StorageError(_told(error.errno or errno.EIO, place, "", advice)) from error


@contextmanager
def storing(place: Path, kept: str = "Nothing was left behind.", advice: str = "give another place") -> Iterator[None]:
    """Turn a refusal to write into StorageError: ``place``, the reason, what is free, what is ``kept``, what to do."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        told = refusal_to_write(error, place, kept, advice)
        if told is None and _is_full(_existing(place)):  # llama.cpp says only that it failed
            told = _told(errno.ENOSPC, place, kept, advice)
        if told is None:
            raise
        raise StorageError(told) from error


def refusal_to_write(error: BaseException, place: Path, kept: str, advice: str) -> str | None:
    """Return the message for an exception that comes from writing to ``place``, None for any other."""
    number = _number_of(error)
    return None if number is None else _told(number, _where(error, number, place), kept, advice)


def storage_problem(error: BaseException, arguments: Sequence[str] = ()) -> str | None:
    """Return the message for an exception that a place to write caused, None for any other.

    ``arguments`` of the command are looked through for the place where the exception does not name it.
    """
    if not _has_current_directory():
        return "the current directory has been removed. Change to an existing one and run the command again."
    if "No usable temporary directory" in str(error):
        return f"no temporary file can be written ({error}). Make room, or set TMPDIR to a folder with room."
    number = _number_of(error)
    if number is not None:
        place = _named(error) or next(_full_places(arguments), None)
        if place is None and number not in FULL:
            place = next((path for path in _places(arguments) if not os.access(_existing(path), os.W_OK)), None)
        return _told(number, place, "", _advice(place), "cannot be read or written")
    if isinstance(error, FileNotFoundError) and _is_output(_named(error), arguments):
        return f"{_named(error)} cannot be written: no file or folder can be created there. Give another place."
    full = next(_full_places(arguments), None)
    if full is not None:
        return f"{_told(errno.ENOSPC, full, '', _advice(full))} ({type(error).__name__}: {error})"
    return None


def locale_problem(error: BaseException, arguments: Sequence[str] = ()) -> str | None:
    """Return the message for letters that this locale, or a library, cannot take; None for any other exception."""
    strange = [each for each in arguments if _STRANGE.search(each)]
    narrow = sys.getfilesystemencoding().lower() not in ("utf-8", "utf8")
    unicode = any(isinstance(each, UnicodeError) or _STRANGE.search(str(each)) for each in _chain(error))
    if not unicode or not (strange or narrow):
        return None
    given = f"{strange[0]!a}: " if strange else ""
    if narrow:
        return (
            f"{given}the locale's encoding, {sys.getfilesystemencoding()}, cannot represent a required name or text. "
            "Run the command with PYTHONUTF8=1 (or LC_ALL=C.UTF-8), or use plain letters."
        )
    return f"{given}the name is not valid UTF-8, which a library needs. Rename the file or folder."


def _told(number: int, place: Path | None, kept: str, advice: str, fault: str = "cannot be written") -> str:
    where = "this" if place is None else str(place)
    reason = REASONS.get(number, os.strerror(number).lower())
    if number in FULL:
        room = "" if place is None else f": {_room(_existing(place))}"
        parts = (f"{where}: {reason}{room}.", kept, f"Make room there and run the command again, or {advice}.")
    else:
        parts = (f"{where} {fault}: {reason}.", kept, ADVICE.get(number, f"{advice[0].upper()}{advice[1:]}."))
    return " ".join(part for part in parts if part)


def _room(folder: Path) -> str:
    """Return what is free on a folder's file system: bytes, or files where these have run out."""
    usage, mount = shutil.disk_usage(folder), _mount(folder)
    files = os.statvfs(folder)
    if files.f_files and not files.f_favail:
        return f"the file system {mount} can hold no more files (it has {files.f_files:,})"
    return f"the file system {mount} has {shown_bytes(usage.free)} of {shown_bytes(usage.total)} free"


def _where(error: BaseException, number: int, place: Path) -> Path:
    """Return the place that an exception is about: the one that was to be written, unless it shows another."""
    named = _named(error)
    full = next(_full_places([str(place)]), None) if number in FULL else None
    if full is not None:
        return full
    inside = named is not None and named.absolute().is_relative_to(place.absolute().parent)
    above = named is not None and place.absolute().is_relative_to(named.absolute())
    return named if named is not None and (above or not inside) else place


def _advice(place: Path | None) -> str:
    if place is not None and place.is_relative_to(_temporary()):
        return "set TMPDIR or the output to a folder elsewhere"
    return "give another place"


def _number_of(error: BaseException) -> int | None:
    """Return the system's number of a refusal to write, found in an exception or what caused it."""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in REASONS:
            about_files = each.filename is not None or each.errno not in (errno.EPERM, errno.EACCES)
            if about_files and not isinstance(each, ConnectionError):
                return each.errno
        elif not isinstance(each, OSError) or each.errno is None:
            found = next((number for number, words in HIDDEN if words.search(str(each))), None)
            if found is not None:
                return found
    return None


def _named(error: BaseException) -> Path | None:
    names = (name for each in _chain(error) if isinstance(each, OSError) for name in (each.filename, each.filename2))
    return next((Path(os.fsdecode(name)) for name in names if isinstance(name, (str, bytes)) and name), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _places(arguments: Sequence[str]) -> Iterator[Path]:
    """Yield the places that a command may write to: paths among its arguments, what temporary files go to, here."""
    values = [text.partition("=")[2] if text.startswith("--") and "=" in text else text for text in arguments]
    for text in (*_outputs(arguments), *values):
        if text and not text.startswith("-") and "\0" not in text and "://" not in text:
            yield Path(text)
    yield _temporary()
    yield Path()


def _outputs(arguments: Sequence[str]) -> list[str]:
    beside = [value for option, value in itertools.pairwise(arguments) if option == "--out"]
    return beside + [text.partition("=")[2] for text in arguments if text.startswith("--out=")]


def _is_output(named: Path | None, arguments: Sequence[str]) -> bool:
    """Say whether a path lies where a command was to write."""
    return named is not None and any(
        named.absolute().is_relative_to(Path(text).absolute().parent) for text in _outputs(arguments)
    )


def _temporary() -> Path:
    """Return where temporary files go; tempfile itself says so only where there is room."""
    return Path(os.environ.get("TMPDIR") or "/tmp")


def _full_places(arguments: Sequence[str]) -> Iterator[Path]:
    return (path for path in _places(arguments) if _is_full(_existing(path)))


def _is_full(folder: Path) -> bool:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:  # gone, or not to be asked
        return False
    return usage.free < NO_ROOM and usage.total > 0  # /proc and its like have no size


def _existing(place: Path) -> Path:
    """Return the place, or the nearest folder above it that is there."""
    return next(filter(_is_there, (place, *place.parents)), Path())


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a folder that may not be looked into
        return False


def _mount(folder: Path) -> Path:
    """Return the folder that the file system of ``folder`` begins at."""
    path = folder.resolve()
    return next((each for each in (path, *path.parents) if each.is_mount()), path)


def _has_current_directory() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True
