"""Scores that a judge gave the pairs of a run, kept in the run's own folder.

::

    judges/<label>.json     the judge's identity, and what it was asked through
    judges/<label>.jsonl    one line a pair: {"id": …, "ok": true | false | null, "why": …, "row": …}

``ok`` null is unscored. ``row`` is a digest of what was judged: a score does not outlive the answer that it was given
for. Lines of other judges may leave ``why`` and ``row`` out.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from benchmarks.judges.judge import Score
from benchmarks.judges.pairs import row_digest, settled
from benchmarks.runs.journal import KEPT, append, changes, read_lines
from benchmarks.runs.record import Row
from safevlm.errors import InputError
from safevlm.files.json_file import MAX_JSON_BYTES, Text, first_problem, replace_file, validate_json
from safevlm.files.regular_file import open_to_append, read_regular
from safevlm.files.storage import storing
from safevlm.machine import now

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BUILT_IN", "ScoreWriter", "StoredJudge", "StoredLine", "check_label", "stored_judges"]

FOLDER = "judges"
BUILT_IN = ("string", "exact", "log")
"""Judges that need no stored scores; no label may claim to be one of them."""
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class StoredLine(BaseModel):
    """One pair's score on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[Text, Field(min_length=1)]
    ok: StrictBool | None
    why: Text | None = None
    row: str | None = None

    def fits(self, row: Row) -> bool:
        """Say whether this is a score of the row as it is now."""
        return self.row is None or self.row == row_digest(row)


class _Identity(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    name: str
    identity: dict[str, Any]
    endpoint: str | None = None
    resumed: tuple[str, ...] = ()
    """When judging was resumed with the scores already there."""


class StoredJudge:
    """The judge that stored scores as ``label`` in a run's folder, read whole when it is made.

    Raises InputError, with the line's number, for scores that are missing or damaged.
    """

    def __init__(self, run_folder: Path, label: str) -> None:
        check_label(label)
        lines, identity = _paths(run_folder, label)
        if not lines.is_file():
            told = ", ".join(stored_judges(run_folder)) or "none"
            raise InputError(f"{run_folder} holds no scores of a judge {label!r}. Scores stored there: {told}.")
        self.name, self.path = label, lines
        self._identity = _read_identity(identity).identity
        self._lines = {line.id: line for line in read_lines(lines, StoredLine)[0]}

    def identity(self) -> Mapping[str, Any]:
        """Return what decided the scores."""
        return self._identity

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return each row's stored score, in order; unscored where there is none, or the row was another then."""
        return [self._score(row) for row in rows]

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse scores of another run: of ids that are not among its ``rows``, or mostly of other answers.

        A few answers that have changed since are unscored instead (:meth:`score`). Raises InputError with the row.
        """
        own = {row.id: row for row in rows if row.kind == "pair"}
        strangers = [name for name in self._lines if name not in own]
        if strangers:
            raise InputError(
                f"{self.path}: row {strangers[0]!r} is not a pair of this run{_and_more(len(strangers))}. "
                f"Judge this run: python -m benchmarks.judge --run {self.path.parents[1]}."
            )
        changed = [name for name, line in self._lines.items() if not line.fits(own[name])]
        if 2 * len(changed) > len(self._lines):
            raise InputError(
                f"{self.path}: row {changed[0]!r} was judged with another answer{_and_more(len(changed))}, so these "
                "are scores of another run. Judge this run under another --name, or with --resume."
            )

    def _score(self, row: Row) -> Score:
        line = self._lines.get(row.id)
        if line is None:
            return Score(ok=None, why="not judged")
        if not line.fits(row):
            return Score(ok=None, why="not judged: the row has changed since it was judged")
        known = settled(row)
        if line.ok and known is not None and known.ok is False:
            return known  # whatever a judge says, an answer that says nothing did not do what was asked
        return Score(ok=line.ok, why=line.why)


class ScoreWriter:
    """Stores scores in a run's folder; each is on disk when :meth:`write` returns. A context manager.

    With ``resume`` scores of the same judge that are there and still fit are kept (:attr:`kept`), all other lines are
    dropped to be written again; nothing there is a beginning. One process at a time may write one label of a run.

    Raises InputError when there are scores already and ``resume`` is not given, they are of another judge, or the
    folder cannot be written.
    """

    def __init__(
        self,
        run_folder: Path,
        label: str,
        identity: Mapping[str, Any],
        rows: Sequence[Row],
        *,
        endpoint: str | None = None,
        resume: bool = False,
    ) -> None:
        check_label(label)
        self.run_folder = run_folder
        self.rows = tuple(rows)
        self.path, self._identity_path = _paths(run_folder, label)
        self._wanted = _Identity(name=label, identity=json.loads(json.dumps(identity)), endpoint=endpoint)
        self._resume = resume
        self.kept: dict[str, StoredLine] = {}
        self._done: set[str] = set()
        self._stream: FileIO | None = None
        self._held = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as held:
            with storing(self.path, kept=KEPT):
                self.path.parent.mkdir(exist_ok=True)
                lock = held.enter_context(self.path.with_name(f".{self._wanted.name}.lock").open("w"))
                self._lock(lock.fileno())
                self._begin()
                self._stream = held.enter_context(open_to_append(self.path))
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    @property
    def missing(self) -> tuple[Row, ...]:
        """Rows that no score was kept of."""
        return tuple(row for row in self.rows if row.id not in self.kept)

    def write(self, row: Row, score: Score) -> None:
        """Append a score. Raises InputError for a row that has one already, or a disk that is full."""
        assert self._stream is not None, "entered first"
        if row.id in self._done:
            raise InputError(f"{self.path}: row {row.id} already has a score.")
        append(self._stream, _dump(StoredLine(id=row.id, ok=score.ok, why=score.why, row=row_digest(row))))
        self._done.add(row.id)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is writing {self.path}. Wait for it, or give another --name.") from error

    def _begin(self) -> None:
        there = [path for path in (self.path, self._identity_path) if path.exists()]
        if there and not self._resume:
            raise InputError(f"{there[0]} already exists. Give another --name, or --resume to add to its scores.")
        if there:
            self._take_up()
        replace_file(self._identity_path, self._wanted.model_dump_json(indent=1, exclude_none=True).encode() + b"\n")

    def _take_up(self) -> None:
        """Keep what is there and still holds; rewrite the file, all at once, when anything else is in it."""
        begun = _read_identity(self._identity_path)
        before, wanted = begun.identity, self._wanted.identity
        differ = changes(before, wanted)
        if differ:
            raise InputError(
                f"{self.path} holds another judge's scores: {'; '.join(differ[:3])}. Give another --name, or the "
                "settings of that judge."
            )
        self._wanted = self._wanted.model_copy(update={"resumed": (*begun.resumed, now())})
        if not self.path.exists():
            return
        lines, _, whole = read_lines(self.path, StoredLine)
        rows = {row.id: row for row in self.rows}
        fitting = [line for line in lines if line.ok is not None and line.id in rows]
        self.kept = {line.id: line for line in fitting if line.fits(rows[line.id])}
        if not whole or len(self.kept) < len(lines):
            replace_file(self.path, b"".join(map(_dump, self.kept.values())))
        self._done = set(self.kept)


def stored_judges(run_folder: Path) -> tuple[str, ...]:
    """Return the labels of the judges that stored scores in a run's folder, in order."""
    names = (path.name.removesuffix(".jsonl") for path in (run_folder / FOLDER).glob("*.jsonl"))
    return tuple(sorted(name for name in names if _LABEL.fullmatch(name)))


def check_label(label: str) -> None:
    """Refuse a label that is no plain file name, or is a built-in judge's. Raises InputError."""
    if _LABEL.fullmatch(label) is None or label in BUILT_IN:
        raise InputError(
            f"a judge cannot be named {label!r}. Use at most 100 letters, digits and . _ -, beginning with a letter "
            f"or digit. The names {', '.join(BUILT_IN)} are reserved."
        )


def _and_more(count: int) -> str:
    return f" (one of {count:,})" if count > 1 else ""


def _paths(run_folder: Path, label: str) -> tuple[Path, Path]:
    folder = run_folder / FOLDER
    return folder / f"{label}.jsonl", folder / f"{label}.json"


def _dump(line: StoredLine) -> bytes:
    given = {key: value for key, value in line.model_dump().items() if value is not None or key == "ok"}
    return json.dumps(given).encode("ascii") + b"\n"


def _read_identity(path: Path) -> _Identity:
    try:
        return validate_json(_Identity, read_regular(path, MAX_JSON_BYTES))
    except OSError as error:
        raise InputError(f"{path}: the judge's identity cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise InputError(f"{path}: {first_problem(error)}") from error
