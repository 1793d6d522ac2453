"""The way of a verdict from vLLM's worker to its scheduler, two processes: a small file each, read once and removed.

A file is named by a nonce that only these two know, holds the request's id and the nonce again, and lies in a folder
that nobody else may write to. What is missing, altered or of another request is an error, never a verdict.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from safevlm.errors import StorageError
from safevlm.files.regular_file import read_regular

__all__ = ["Storage", "StoredError"]

MAX_BYTES = 16 * 2**20


class StoredError(Exception):
    """Why there is no verdict of a request, as a clause for its error."""


class Storage:
    """A folder of verdicts on their way. Raises StorageError for one that cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path) -> Storage:
        """Make the folder if it is missing, and check that it can be written, and by this user alone."""
        advice = "Give another folder as shared_storage_path (--storage of python -m runtimes.vllm)."
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.stat()
            with tempfile.NamedTemporaryFile(dir=folder, prefix="probe-") as probe:
                probe.write(b"\0")
                probe.flush()
        except OSError as error:
            raise StorageError(f"{folder} cannot hold verdicts: {error.strerror or error}. {advice}") from error
        if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o022:
            raise StorageError(f"{folder} cannot hold verdicts: others may write to it. Run chmod 700 on it. {advice}")
        return cls(folder)

    def write(self, request_id: str, nonce: str, content: dict[str, Any]) -> None:
        """Write a request's verdict, whole or not at all. Raises OSError."""
        path = self._path(nonce)
        draft = path.with_suffix(".part")
        try:
            draft.write_text(json.dumps({**content, "request": request_id, "nonce": nonce}), encoding="utf-8")
            draft.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise

    def take(self, request_id: str, nonce: str) -> dict[str, Any]:
        """Return what :meth:`write` wrote, and remove it. Raises StoredError."""
        path = self._path(nonce)
        try:
            content = json.loads(read_regular(path, MAX_BYTES))
        except FileNotFoundError:
            raise StoredError("the worker wrote no verdict; see its log") from None
        except (OSError, ValueError, RecursionError) as error:
            raise StoredError(f"the worker's verdict cannot be read: {type(error).__name__}") from None
        finally:
            self.remove(nonce)
        if not isinstance(content, dict) or (content.get("request"), content.get("nonce")) != (request_id, nonce):
            raise StoredError("the worker's verdict is not of this request")
        return content

    def remove(self, nonce: str) -> None:
        """Remove a request's verdict, if there is one."""
        with contextlib.suppress(OSError):
            self._path(nonce).unlink()

    def close(self) -> None:
        """Remove the folder if nothing is in it."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, nonce: str) -> Path:
        return self.folder / f"{nonce}.json"
