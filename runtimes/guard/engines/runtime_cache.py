"""What TensorRT-RTX compiled for an engine on this GPU, kept so that the next start need not compile it again."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from runtimes.guard.engines.library import Library
from safevlm.errors import StorageError
from safevlm.files.user_cache import keep_newest, read_own, user_cache, write_own

__all__ = ["MAX_BYTES", "MOST_FILES", "RuntimeCache"]

MAX_BYTES = 256 * 2**20
MOST_FILES = 16
FOLDER = "runtime-caches"

_log = logging.getLogger(__name__)


class RuntimeCache:
    """The compiled kernels of one engine: read when it is attached, written by :meth:`save` where there are new ones.

    Each engine, GPU, driver and version has a file of its own. One that is damaged or of something else is passed over
    by TensorRT-RTX itself, one that somebody else may have written here. It costs time when there is none, and nothing
    else: a cache that cannot be read or kept is logged.
    """

    def __init__(self, library: Library, config: Any, engine_sha256: str) -> None:
        """Attach the cache to a runtime configuration, before an execution context is made of that."""
        self._cache = config.create_runtime_cache()
        self._known: bytes | None = None
        self._path: Path | None = None
        try:
            self._path = cache_file(library, engine_sha256)
            content = read_own(self._path, MAX_BYTES)
        except FileNotFoundError:
            pass
        except (OSError, StorageError) as error:
            _log.info("%s is skipped: %s", self._path or "the cache of compiled kernels", error)
        else:
            if self._cache.deserialize(content):
                self._known = hashlib.sha256(content).digest()
            else:
                _log.info("%s is skipped: it is damaged, or was written for another GPU, driver or version", self._path)
        if not config.set_runtime_cache(self._cache):
            _log.info("TensorRT-RTX accepts no cache of compiled kernels; they are compiled at each start")
            self._path = None

    def save(self) -> None:
        """Keep what was compiled since it was read."""
        if self._path is None:
            return
        serialized = self._cache.serialize()
        content = b"" if serialized is None else bytes(memoryview(serialized))
        digest = hashlib.sha256(content).digest()
        if not content or digest == self._known:
            return
        if len(content) > MAX_BYTES:
            _log.info("compiled kernels are not saved: %d bytes exceed the limit of %d", len(content), MAX_BYTES)
            return
        try:
            write_own(self._path, content)
            keep_newest(self._path.parent, "*.cache", MOST_FILES)
        except StorageError as error:
            _log.info("compiled kernels are not saved: %s", error)
        self._known = digest


def cache_file(library: Library, engine_sha256: str) -> Path:
    """Return where the compiled kernels of an engine lie. Raises StorageError for a user without a home."""
    about = "\n".join((library.module, library.version, library.gpu.name, library.driver, engine_sha256))
    return user_cache() / FOLDER / f"{hashlib.sha256(about.encode()).hexdigest()}.cache"
