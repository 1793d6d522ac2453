"""Judges' answers by content, in SQLite: what was asked once is not asked, or paid for, again.

Several processes may use one file at once. Only answers that could be read are kept; what failed is asked again.

Plain SQLite and not diskcache, which unpickles what it reads (a cache that was handed on could run code) and evicts
entries once it is large, which here would be paid for again.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from safevlm.errors import InputError
from safevlm.machine import now

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AnswerCache"]

VERSION = 1
BUSY_SECONDS = 30.0
_TABLE = """CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY,
    ok INTEGER NOT NULL CHECK (ok IN (0, 1)),
    model TEXT NOT NULL,
    created TEXT NOT NULL
) WITHOUT ROWID"""


class AnswerCache:
    """A cache file, made when it is not there; a context manager.

    ``key`` is a hash over all that the judge is sent. Raises InputError for a file that is no such cache, of a later
    version, damaged, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            self._prepare(self._database)
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise self._unusable(error) from error
        except InputError:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def get(self, key: str) -> bool | None:
        """Return the answer, None where there is none."""
        found = self._run("SELECT ok FROM answers WHERE key = ?", key)
        return None if found is None else bool(found[0])

    def put(self, key: str, ok: bool, model: str) -> None:
        """Keep an answer; one that is there already stands."""
        self._run("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", key, int(ok), model, now())

    def _run(self, statement: str, *values: str | int) -> tuple[int, ...] | None:
        assert self._database is not None, "entered first"
        try:
            found: tuple[int, ...] | None = self._database.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        return found

    def _prepare(self, database: sqlite3.Connection) -> None:
        """Set the file up. Two processes may both find it new: the version is read and set under the write lock."""
        self._share(database)
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("BEGIN IMMEDIATE")
        found = database.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, VERSION):
            raise InputError(
                f"the cache {self.path} has version {found}; this release reads {VERSION}. Give another --cache."
            )
        database.execute(_TABLE)
        database.execute(f"PRAGMA user_version = {VERSION}")
        database.execute("COMMIT")

    def _share(self, database: sqlite3.Connection) -> None:
        """Switch to the journal that several processes can share.

        SQLite does not wait its busy timeout when two processes switch a new file at once, so it is tried again here.
        """
        end = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                database.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.01)

    def _unusable(self, error: Exception) -> InputError:
        return InputError(
            f"the cache {self.path} cannot be used ({error}). Give another --cache. The scores so far are kept: "
            "continue with --resume."
        )
