"""Tables of answers: a CSV whose columns are named on the command line, and VLMEvalKit's Excel files.

VLMEvalKit writes ``<model>_<dataset>.xlsx``, one sheet with ``index``, ``question``, ``answer`` and ``prediction``, and
after its evaluation a file with ``hit`` or ``score`` as well. Excel cuts a cell after 32,767 characters.
"""

from __future__ import annotations

import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.runs.importing.imported import distinct, id_of, imported_run, share_of, suite_of, type_of
from benchmarks.runs.importing.lines import numbered_rows, text_of, uncompressed
from benchmarks.runs.record import Row, Run
from calibration.labelled.tables import TABLE_SUFFIXES, Columns, column_name, table_rows, truth
from safevlm.errors import InputError, MissingExtraError
from safevlm.files.regular_file import open_regular

__all__ = ["EXCEL_SUFFIXES", "FIELDS", "import_table", "import_vlmevalkit", "parse_columns"]

EXCEL_SUFFIXES = (".xlsx", ".xlsm")
FIELDS = ("id", "answer", "query", "type", "reference", "score", "image", "category", "subcategory")
"""What a column can be, in ``--columns``."""
TORN = (zipfile.BadZipFile, zlib.error)
NEEDED = ("id", "answer", "type")
LONGEST_CELL = 32_767
MAX_COLUMNS = 1_000
VLMEVALKIT = {"id": "index", "answer": "prediction", "query": "question", "reference": "answer"}
SCORES = ("hit", "score")
FAILED = "Failed to obtain answer via API."
"""What VLMEvalKit writes for an answer that a server did not give."""

Found = tuple[str, Mapping[str, Any]]


def parse_columns(text: str) -> Mapping[str, str]:
    """Return which column is which field, of ``id=…,answer=…``. Raises InputError."""
    found: dict[str, str] = {}
    for part in text.split(","):
        field, equals, column = part.partition("=")
        field, column = field.strip(), column.strip()
        if not equals or field not in FIELDS or not column:
            raise InputError(f"--columns: {part.strip()!r} is not FIELD=COLUMN. Allowed fields: {', '.join(FIELDS)}.")
        if field in found:
            raise InputError(f"--columns names {field} twice. Give each field once.")
        found[field] = column
    missing = [field for field in ("id", "answer") if field not in found]
    if missing or not {"type", "reference", "score"} & found.keys():
        raise InputError("--columns needs id= and answer=, and type= for pairs, or reference= or score= for questions.")
    return found


def import_table(
    path: Path,
    columns: Mapping[str, str],
    *,
    name: str | None = None,
    task: str | None = None,
    sheet: str | None = None,
) -> Run:
    """Return the rows of a table (text, Excel or JSON) as a run: pairs where ``columns`` names their type, otherwise
    questions. ``name`` is the model's, by default the file's.

    Raises InputError, with the row, for a column that is missing, an empty or repeated id, another type than the
    five, or a score outside 0..1.
    """
    found = list(_rows(path, columns, sheet))
    rows = distinct(((where, _row(raw, columns, where)) for where, raw in found), path)
    scored_by = f"column {columns['score']}" if "score" in columns else None
    suite = suite_of(task or "table", rows, scored_by=scored_by)
    name = name or uncompressed(path).stem
    return imported_run(path, name, suite, rows, scored_by=scored_by, notes=_notes(path, rows))


def import_vlmevalkit(
    path: Path, *, name: str | None = None, task: str | None = None, metric: str | None = None, sheet: str | None = None
) -> Run:
    """Return a result file of VLMEvalKit as questions; ``metric`` is the column of their scores, by default ``hit`` or
    ``score`` where there is one. Model and data set are read off ``<model>/<model>_<dataset>.xlsx``.

    Raises those of :func:`import_table`, and InputError where the data set is not clear.
    """
    name, task = _names(path, name, task)
    found = list(_rows(path, VLMEVALKIT, sheet))
    header = list(found[0][1]) if found else []
    if metric is not None and column_name(metric) not in header:
        raise InputError(f"{path} has no column {metric!r}. It has {', '.join(filter(None, header))}.")
    score = metric or next((each for each in SCORES if each in header), None)
    columns = dict(VLMEVALKIT) | ({"category": "category"} if "category" in header else {})
    columns |= {} if score is None else {"score": score}
    rows = distinct(((where, _answered(_row(raw, columns, where))) for where, raw in found), path)
    scored_by = None if score is None else f"VLMEvalKit, {task}, column {score}"
    notes = [*_notes(path, rows)]
    if score is None:
        notes.append(
            "The file has no scores: an answer is right where it equals the reference. VLMEvalKit's own rules choose "
            "the option first; import the file that its evaluation wrote."
        )
    suite = suite_of(task, rows, scored_by=scored_by)
    return imported_run(path, name, suite, rows, scored_by=scored_by, notes=notes)


def _answered(row: Row) -> Row:
    """Return a row of VLMEvalKit, with an error where that found no answer: it scores such rows as wrong ones."""
    failed = row.answer is not None and row.answer.strip() == FAILED
    return row.model_copy(update={"answer": None, "score": None, "error": FAILED}) if failed else row


def _names(path: Path, name: str | None, task: str | None) -> tuple[str, str]:
    """Return model and data set, the latter from ``--task``, or from a folder that is named as the model."""
    for folder in path.absolute().parents[:2]:
        if task is None and path.stem.startswith(f"{folder.name}_"):
            return name or folder.name, path.stem.removeprefix(f"{folder.name}_")
    if task is None:
        raise InputError(f"{path.name}: the file name does not say where the model's name ends. Give --task DATASET.")
    return name or path.stem.removesuffix(f"_{task}"), task


def _notes(path: Path, rows: Sequence[Row]) -> list[str]:
    cut = sum(len(row.answer or "") >= LONGEST_CELL for row in rows) if path.suffix.lower() in EXCEL_SUFFIXES else 0
    return [f"{cut} answers end where Excel cuts a cell, after {LONGEST_CELL:,} characters."] if cut else []


def _row(raw: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Row:
    given = {field: raw.get(column_name(column)) for field, column in columns.items()}
    absent = next((columns[field] for field in NEEDED if column_name(columns.get(field, "")) not in {"", *raw}), None)
    if absent is not None:
        raise InputError(f"{where} ends before the column {absent!r}. Give the whole table.")
    kind = type_of(_text(given["type"]), where, f"column {columns['type']!r}") if "type" in columns else None
    texts = {field: _text(given.get(field)) for field in ("query", "reference", "image", "category", "subcategory")}
    row = Row(
        id=id_of(
            given["id"] if isinstance(given["id"], bool) else _text(given["id"]), where, f"column {columns['id']!r}"
        ),
        kind="question" if kind is None else "pair",
        type=kind,
        answer=_text(given["answer"]),
        score=_score(given.get("score"), where, f"column {columns.get('score')!r}"),
    )
    return row.model_copy(update={field: text for field, text in texts.items() if text})


def _score(value: Any, where: str, what: str) -> float | None:
    """Return a score, None for an empty cell: such a row is unscored."""
    text = _text(value)
    if text.strip() == "":
        return None
    said = truth(text)
    try:
        return share_of(float(text) if said is None else said, where, what)
    except ValueError:
        raise InputError(f"{where}: {what} is {text[:80]!r}; it must be a number from 0 to 1, true or false.") from None


def _text(value: Any) -> str:
    """Return a cell as text: an empty one as none at all, a whole number without its fraction."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else str(value)


# -- files ------------------------------------------------------------------------------------------------


def _rows(path: Path, columns: Mapping[str, str], sheet: str | None) -> Iterator[Found]:
    """Yield rows by column name, with their places."""
    suffix = path.suffix.lower()
    if sheet is not None and suffix not in EXCEL_SUFFIXES:
        raise InputError(f"--sheet is for Excel files, and {path.name} is not one.")
    if suffix in EXCEL_SUFFIXES:
        yield from _excel(path, columns, sheet)
    elif uncompressed(path).suffix.lower() in TABLE_SUFFIXES:
        names = [column_name(column) for column in columns.values()]
        yield from table_rows(path, text_of(path), Columns(needed=tuple((each,) for each in names)))
    else:
        for where, raw in numbered_rows(path):
            if not isinstance(raw, Mapping):
                raise InputError(f"{where}: a row must be a JSON object, not {type(raw).__name__}.")
            row = {column_name(str(key)): value for key, value in raw.items()}
            _check(list(row), columns, where)
            for column in columns.values():
                value = row[column_name(column)]
                if isinstance(value, (list, Mapping)):
                    shown = json.dumps(value)[:80]
                    raise InputError(f"{where}: column {column!r} is {shown}. Give one text or number in each cell.")
            yield where, row


def _check(header: Sequence[str], columns: Mapping[str, str], where: str) -> None:
    missing = [column for column in columns.values() if column_name(column) not in header]
    if missing:
        raise InputError(f"{where} has no column {missing[0]!r}. It has {', '.join(filter(None, header)) or 'none'}.")
    twice = [column for column in columns.values() if header.count(column_name(column)) > 1]
    if twice:
        raise InputError(f"{where} has the column {twice[0]!r} twice. Rename one of them.")


def _excel(path: Path, columns: Mapping[str, str], sheet: str | None) -> Iterator[Found]:
    try:
        import openpyxl
        from openpyxl.utils.exceptions import InvalidFileException
    except ModuleNotFoundError as error:
        raise MissingExtraError("openpyxl", "logs", "reading Excel files") from error
    try:
        with open_regular(path) as stream:
            book = _workbook(path, partial(openpyxl.load_workbook, stream, read_only=True, data_only=True))
            name = _sheet(path, book.sheetnames, sheet)
            book[name].reset_dimensions()  # a program may state fewer rows than it wrote: the others would be lost
            yield from _sheet_rows(f"{path}, sheet {name!r}", partial(book[name].iter_rows, values_only=True), columns)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file.") from None
    except (OSError, EOFError, KeyError, SyntaxError, TypeError, ValueError, *TORN, InvalidFileException) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} is not a whole Excel workbook ({reason}). Save it again as .xlsx, or as CSV."
        ) from error


def _workbook(path: Path, load: Callable[[], Any]) -> Any:
    """Return a workbook. Raises InputError for one that openpyxl trips over, such as one with a chart sheet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # openpyxl tells of styles that it does not know
            return load()
    except (AttributeError, IndexError) as error:
        raise InputError(f"{path} cannot be read as a workbook ({error}). Save the sheet alone, or as CSV.") from error


def _sheet(path: Path, names: Sequence[str], sheet: str | None) -> str:
    if not names:
        raise InputError(f"{path} has no sheet with cells. Save it again as .xlsx, or as CSV.")
    if sheet is None and len(names) > 1:
        raise InputError(f"{path} has {len(names)} sheets. Give --sheet, one of {', '.join(names)}.")
    if sheet is not None and sheet not in names:
        raise InputError(f"{path} has no sheet {sheet!r}. It has {', '.join(names)}.")
    return names[0] if sheet is None else sheet


def _sheet_rows(
    where: str, cells_of: Callable[..., Iterator[Sequence[Any]]], columns: Mapping[str, str]
) -> Iterator[Found]:
    header = [column_name(_text(cell)) for cell in next(cells_of(max_row=1, max_col=MAX_COLUMNS), ())]
    _check(header, columns, f"{where}, row 1")
    width = max(index for index, name in enumerate(header, 1) if name)
    for number, cells in enumerate(cells_of(min_row=2, max_col=width), 2):
        if any(_text(cell).strip() for cell in cells):
            yield f"{where}, row {number}", dict(zip(header, cells, strict=False))
