"""Run records: what an artifact answered to a suite, in a folder from which an interrupted run is resumed.

::

    run.json        what ran on what, and how (:class:`RunRecord`)
    samples.jsonl   one :class:`Row` a line, in the order in which they were answered

Two runs are comparable only when everything in ``run.json`` but artifact, runtime, machine and dates agrees. Hashes are
SHA-256 in hexadecimal, times milliseconds, probabilities 0..1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.runs.journal import KEPT, append, changes, read_lines
from safevlm.contract.manifest_fields import ViewMode
from safevlm.errors import InputError
from safevlm.files.draft import PARTIAL, draft_of, publish, remove_abandoned
from safevlm.files.json_file import MAX_JSON_BYTES, Text, dump_json, first_problem, replace_file, validate_json
from safevlm.files.regular_file import read_regular
from safevlm.files.storage import check_writable, storing
from safevlm.machine import now

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "PAIR_TYPES",
    "RECORD_NAME",
    "ROWS_NAME",
    "SCHEMA_VERSION",
    "UNSAFE_TYPES",
    "Artifact",
    "Row",
    "Run",
    "RunRecord",
    "RunWriter",
    "Runtime",
    "SuiteRecord",
    "check_new",
    "read_record",
    "read_run",
    "write_run",
]

SCHEMA_VERSION: Literal[1] = 1
RECORD_NAME = "run.json"
ROWS_NAME = "samples.jsonl"
UNSAFE_TYPES = ("SSU", "USU", "UUU", "SUU")
PAIR_TYPES = ("SSS", *UNSAFE_TYPES)
"""[image][text] → [pair], S safe and U unsafe, in HoliSafe-Bench's order."""

Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Row(_Frozen):
    """One sample and what became of it.

    ``kind`` says what is asked: a ``pair`` is to be refused or answered by its ``type``, a ``question`` has one right
    answer (``reference``) or comes with its ``score``, an ``image`` is for the guard alone. ``answer`` is None where
    nothing was said: the guard suite, an image that a gate blocked (``blocked`` names the stage), an ``error``.
    Texts are as they were given, lone surrogates included: on disk those are JSON escapes (``\\ud83d``).
    """

    id: Annotated[Text, Field(min_length=1)]
    kind: Literal["pair", "question", "image"]
    image: Text | None = None
    """Its name in the suite; rows of one image are one cluster."""
    query: Text | None = None
    type: Literal["SSS", "SSU", "USU", "UUU", "SUU"] | None = None
    under: str | None = None
    """The corruption under which the image was judged, such as ``jpeg:50``; None as it is."""
    category: Text | None = None
    subcategory: Text | None = None
    label: Count | None = None
    """The image's true class, 0 safe; None where it is not known or sources contradict each other."""
    reference: Text | None = None
    answer: Text | None = None
    score: Probability | None = None
    """What an evaluation library gave the answer, where its logs were imported; of a pair, 1 where the log's own judge
    found that it did what the pair asks for."""
    logged_score: Probability | None = None
    """What the library itself counts it as, where ``score`` follows the benchmark's rules and differs from that."""
    probs: tuple[Probability, ...] | None = None
    """The guard's, in the order of the suite's classes."""
    blocked: Literal["guard", "exact", "error"] | None = None
    error: Text | None = None
    ms: Annotated[float, Field(ge=0)] | None = None


class Artifact(_Frozen):
    """What was run. ``sha256`` is over everything that decides its answers; None where that is out of reach."""

    name: Text
    kind: Literal["checkpoint", "gptq", "int8", "gguf", "bundle", "gated", "server", "predictions"]
    sha256: str | None = None
    revision: str | None = None
    bytes: Count | None = None
    leaked: bool = False
    """Whether it was calibrated on samples of an evaluation suite (``--allow-leakage``)."""
    random_weights: bool = False
    """Whether answers and verdicts are noise: those of a stand-in (benchmarks.random_checkpoint)."""
    compression: Mapping[str, Any] | None = None
    """What compression.json says in short: method, recipe, bits, calibration set."""


class Runtime(_Frozen):
    """What ran it."""

    name: str
    version: str | None = None
    device: str | None = None
    dtype: str | None = None
    batch: int | None = None
    provider: str | None = None
    """What a guard's runtime computed with: ONNX Runtime's execution provider. Older records do not say it."""
    gpu: str | None = None
    """Name of the GPU, where one was used. Older records do not say it."""

    def as_stated_with(self, other: Runtime) -> Runtime:
        """Return this without the provider and GPU that the other's record does not state, to compare the two."""
        return self.model_copy(update={name: None for name in ("provider", "gpu") if getattr(other, name) is None})


class SuiteRecord(_Frozen):
    """Which samples: ``rows`` of them, ``sha256`` over ids, questions, labels and images.

    ``left_out`` names images whose labels contradict each other: the guard is not scored on them.
    """

    name: str
    sha256: str
    rows: Count
    classes: tuple[str, ...] | None = None
    left_out: tuple[Text, ...] = ()


class RunRecord(_Frozen):
    """``run.json``. ``prompt``, ``preprocessing`` and ``decoding`` are None where a run was imported without them."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    finished: str | None = None
    """When the last row was written; None while rows are missing."""
    resumed: tuple[str, ...] = ()
    """When the run was resumed."""
    artifact: Artifact
    runtime: Runtime
    suite: SuiteRecord
    prompt: str | None = None
    """The template, ``{question}`` and ``{image}`` where they go."""
    preprocessing: Mapping[str, Any] | None = None
    decoding: Mapping[str, Any] | None = None
    threshold: Probability | None = None
    """p(unsafe) from which the guard blocks, where one was fitted: its operating point."""
    view: ViewMode | None = None
    """How a standalone guard judged large images (runtimes.images.tiling); None without one, and in records before
    tiles, whose guards judged the whole."""
    machine: str | None = None
    versions: Mapping[str, str] = Field(default_factory=dict)
    scored_by: Text | None = None
    """What gave the rows their scores, where a log was imported: task, metric, scorer."""
    notes: tuple[Text, ...] = ()
    """What a reader of an imported log's figures must know, such as where they differ from the log's own."""

    @property
    def guard_view(self) -> ViewMode | None:
        """How a standalone guard judged large images, None where there was none to do so."""
        return self.view or ("whole" if self.artifact.kind in ("bundle", "gated") else None)

    @property
    def seed(self) -> int | None:
        """The seed of sampled decoding; None for greedy decoding, and where decoding is not known."""
        stated = self.decoding or {}
        found = stated.get("seed")
        greedy = stated.get("sampling") == "greedy" or stated.get("temperature") == 0
        return found if isinstance(found, int) and not isinstance(found, bool) and not greedy else None

    def settings(self) -> dict[str, Any]:
        """Return what must agree between two runs that are compared: of sampled decoding all but the seed."""
        decoding = self.decoding
        if self.seed is not None and decoding is not None:
            decoding = {name: value for name, value in decoding.items() if name != "seed"}
        return {
            "suite": {"name": self.suite.name, "sha256": self.suite.sha256, "classes": self.suite.classes},
            "prompt": self.prompt,
            "preprocessing": self.preprocessing,
            "decoding": decoding,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A run record that was read, rows in the order in which they were written."""

    folder: Path
    record: RunRecord
    rows: tuple[Row, ...]


def read_run(folder: Path) -> Run:
    """Read a run record.

    A last line that was cut off when the run was killed is no row; any other damage is refused. Raises InputError,
    with the line's number and the field, for a missing or damaged file, an unknown schema or key, a repeated id.
    """
    record = read_record(folder)
    rows, _ = _read_rows(folder / ROWS_NAME)
    return Run(folder=folder, record=record, rows=tuple(rows))


def check_new(folder: Path, advice: str = "Give --out a new folder, or --resume to continue its run.") -> None:
    """Raise InputError when a run cannot begin in ``folder``; one that holds nothing but a draft of ours is free.

    StorageError when nothing can be written there.
    """
    with storing(folder, kept="", advice="give another --out"):
        there = [path.name for path in folder.iterdir()] if folder.is_dir() else [""] * folder.exists()
    if not all(name.startswith(f".{RECORD_NAME}{PARTIAL}") for name in there):
        raise InputError(f"{folder} already exists. {advice}")
    check_writable(folder)


def write_run(folder: Path, record: RunRecord, rows: Iterable[Row]) -> None:
    """Write a whole run record in one step: a failure or a kill leaves nothing in its place.

    Raises InputError when ``folder`` exists, an id comes twice, or nothing can be written.
    """
    check_new(folder, "Give --out a new folder, or remove this one.")
    lines: dict[str, bytes] = {}
    for row in rows:
        if row.id in lines:
            raise InputError(f"sample {row.id} has two rows. Give each sample once.")
        lines[row.id] = _line(row)
    record = record.model_copy(update={"finished": record.finished or record.created})
    with draft_of(folder) as draft:
        with storing(folder, advice="give another --out"):
            replace_file(draft / RECORD_NAME, _document(record))
            replace_file(draft / ROWS_NAME, b"".join(lines.values()))
            if folder.is_dir():
                remove_abandoned(folder / RECORD_NAME)
        publish(draft, folder)


class RunWriter:
    """Appends rows to a run record; each is on disk when :meth:`write` returns. A context manager."""

    def __init__(self, folder: Path, record: RunRecord, done: frozenset[str], end: int) -> None:
        self.folder = folder
        self.record = record
        self._done = set(done)
        rows = folder / ROWS_NAME
        self._stream = rows.open("r+b" if rows.exists() else "w+b", buffering=0)
        self._stream.truncate(end)
        self._stream.seek(end)

    @classmethod
    def begin(cls, folder: Path, record: RunRecord) -> Self:
        """Start a new record in ``folder``. Raises InputError when it exists or cannot be written.

        A folder in which nothing was written yet, as a kill or a full disk leaves it, is none.
        """
        check_new(folder)
        document = _document(record)
        with storing(folder, kept="", advice="give another --out"):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / RECORD_NAME, document)
            return cls(folder, record, frozenset(), 0)

    @classmethod
    def resume(cls, folder: Path, record: RunRecord) -> Self:
        """Resume a record that was begun as ``record``; failed rows are dropped and will be retried. The record says
        when it was resumed. Raises InputError when it is missing, or when its artifact, runtime, suite or settings
        differ.
        """
        begun = read_record(folder)
        record = record.model_copy(update={"runtime": record.runtime.as_stated_with(begun.runtime)})
        changing = ("created", "finished", "resumed", "machine", "versions")
        before, wanted = (each.model_dump(mode="json", exclude=set(changing)) for each in (begun, record))
        differ = changes(before, wanted)
        if differ:
            raise InputError(
                f"{folder} holds another run: {'; '.join(differ[:3])}. Give another --out, or the settings of that run."
            )
        path = folder / ROWS_NAME
        rows, end = _read_rows(path)
        kept = [row for row in rows if row.error is None]
        if len(kept) < len(rows):
            data = b"".join(_line(row) for row in kept)
            replace_file(path, data)
            end = len(data)
        begun = begun.model_copy(update={"resumed": (*begun.resumed, now())})
        replace_file(folder / RECORD_NAME, _document(begun))
        with storing(path, kept=KEPT):
            return cls(folder, begun, frozenset(row.id for row in kept), end)

    @property
    def done(self) -> frozenset[str]:
        """Ids that have a row."""
        return frozenset(self._done)

    def write(self, row: Row) -> None:
        """Append a row. Raises InputError for an id that has one already, or a disk that is full."""
        if row.id in self._done:
            raise InputError(f"{self.folder / ROWS_NAME}: sample {row.id} already has a row.")
        append(self._stream, _line(row))
        self._done.add(row.id)

    def finish(self, when: str) -> None:
        """Say in ``run.json`` that all rows are there. Raises InputError for a disk that is full."""
        self.record = self.record.model_copy(update={"finished": when})
        replace_file(self.folder / RECORD_NAME, _document(self.record))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def _line(row: Row) -> bytes:
    return dump_json(row) + b"\n"


def _document(record: RunRecord) -> bytes:
    return dump_json(record, indent=1) + b"\n"


def read_record(folder: Path) -> RunRecord:
    """Read what a run record says of its run. Raises InputError, as :func:`read_run`."""
    path = folder / RECORD_NAME
    try:
        return validate_json(RunRecord, read_regular(path, MAX_JSON_BYTES), halves=True)
    except FileNotFoundError:
        raise InputError(
            f"{path}: there is no such file. Give the folder of a run record, as benchmarks.run or benchmarks.import "
            "write it."
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise InputError(f"{path}: {first_problem(error)}") from error


def _read_rows(path: Path) -> tuple[list[Row], int]:
    """Return the rows, none where there is no file yet, and where, in bytes, the last whole line ends."""
    if not path.exists():
        return [], 0
    rows, end, _ = read_lines(path, Row)
    return rows, end
