"""Rows of a table in text: CSV as spreadsheets and programs write it, whatever stands between its columns.

The header decides: the separator is the one by which it names the columns that are needed. A row that does not fit the
header is refused, since a value that slipped into the next column could be taken for a label.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safevlm.errors import InputError

__all__ = ["TABLE_SUFFIXES", "Columns", "cleaned", "column_name", "table_rows", "truth"]

TABLE_SUFFIXES = (".csv", ".tsv", ".tab", ".txt")
SEPARATORS = (",", ";", "\t", "|")
SPACE = " "
"""Separates columns where nothing else does, as R's ``write.table`` has it."""
EXCEL_SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
QUOTES = ("“”", "„“", "„”", "‘’", "‚‘", "«»", '""', "''")
TRUTHS = {
    **dict.fromkeys(("true", "yes", "1", "1.0", "wahr", "vrai"), True),
    **dict.fromkeys(("false", "no", "0", "0.0", "falsch", "faux"), False),
}
"""What a cell that is true or false is written as; Excel writes it in its user's language."""
INVISIBLE = "\ufeff\u200b\u200e\u200f"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What a table's header must name: one of each group in ``needed``; all that is read may stand in it once."""

    needed: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()

    def all_in(self, header: Sequence[str]) -> bool:
        """Say whether a header names what is needed."""
        return all(any(name in header for name in group) for group in self.needed)

    @property
    def stated(self) -> str:
        """The needed columns, for messages."""
        return " and ".join(f"'{group[0]}'" for group in self.needed)

    def repeated(self, header: Sequence[str]) -> list[str]:
        """Return names that are read and stand in a header more than once."""
        known = [*(name for group in self.needed for name in group), *self.optional]
        return [name for name in known if header.count(name) > 1]


def cleaned(text: str) -> str:
    """Return text without what surrounds it by accident: blanks of every kind, marks, a pair of quotes."""
    text = text.strip().strip(INVISIBLE).strip()
    if len(text) > 1 and text[0] + text[-1] in QUOTES:
        text = text[1:-1].strip()
    return text


def truth(value: object) -> bool | None:
    """Return whether a cell, or a JSON value, says true or false; ``None`` where it says neither."""
    return TRUTHS.get(cleaned(str(value)).casefold())


def column_name(text: str) -> str:
    """Return a column's name as it is looked up: ``Image Safety-Label`` is ``image_safety_label``."""
    return re.sub(r"[\s_-]+", "_", cleaned(text).casefold())


def table_rows(path: Path, text: str, columns: Columns) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each row by column name (:func:`column_name`), with its place (``FILE, line 3``, where it begins).

    Empty rows, lines of ``#`` above the header or without a second value, and Excel's ``sep=;`` are passed over.
    Values are as they stand.

    Raises: InputError, with the line, for a header without the needed ``columns``, a row with more values than the
    header has columns, and quotes that do not match.
    """
    lines = io.StringIO(text, newline="").readlines()
    first, separator = _header_line(lines)
    if first == len(lines):
        return
    header, reader = _opened(path, lines, first, separator, columns)
    end = 1 + max(index for index, name in enumerate(header) if name)
    filled_last = any(header[end - 1] in group for group in columns.needed)  # then a value that slipped would be seen
    for line, row in reader:
        where = f"{path}, line {line}"
        if not any(value.strip() for value in row) or (len(row) == 1 < end and row[0].startswith("#")):
            continue
        if any(value.strip() for value in row[end:]) or (len(row) > len(header) and not filled_last):
            raise InputError(
                f"{where} has {len(row)} values, but the header names {end} columns. Quote values that contain the "
                "separator, or name every column."
            )
        yield where, {name: value for name, value in zip(header, row, strict=False) if name}


def _header_line(lines: Sequence[str]) -> tuple[int, str | None]:
    """Return the index of the header among ``lines``, and the separator that Excel's first line states."""
    separator = None
    for index, line in enumerate(lines):
        stated = EXCEL_SEPARATOR.fullmatch(line.rstrip("\r\n"))
        if stated and separator is None:
            separator = stated[1]
        elif line.strip() and not line.startswith("#"):
            return index, separator
    return len(lines), separator


def _opened(
    path: Path, lines: Sequence[str], first: int, separator: str | None, columns: Columns
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return a table's column names and its other rows, by the one separator whose header names what is needed."""
    fitting: list[tuple[list[str], Iterator[tuple[int, list[str]]]]] = []
    for each in (separator,) if separator is not None else (*SEPARATORS, SPACE):
        if each == SPACE and fitting:
            break
        rows = _records(path, lines[first:], first + 1, each)
        try:
            header = [column_name(name) for name in next(rows)[1]]
        except InputError:
            continue  # quotes that only another separator makes sense of
        if columns.all_in(header) and header not in [other for other, _ in fitting]:
            fitting.append((header, rows))
    if len(fitting) != 1:
        found = cleaned(lines[first])[:80]
        raise InputError(
            f"{path}, line {first + 1}: the first line of a CSV file must name its columns, {columns.stated}, "
            f"separated by commas, semicolons or tabs. This one is {found!r}."
        )
    header, rows = fitting[0]
    repeated = columns.repeated(header)
    if repeated:
        raise InputError(
            f"{path}, line {first + 1}: {header.count(repeated[0])} columns are named '{repeated[0]}'. "
            "Keep one of them."
        )
    return header, rows


def _records(path: Path, lines: Sequence[str], line: int, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each record and the line that it begins in; InputError for quotes that do not match."""
    padded = re.search(re.escape(separator) + r" +\S", lines[0]) is not None  # `image, "label"`
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=padded or separator == SPACE, strict=True)
    start = line
    try:
        for row in reader:
            yield start, row
            start = line + reader.line_num
    except csv.Error as error:
        raise InputError(f"{path}, line {start} is not valid CSV ({error}). Check its quotes.") from error
