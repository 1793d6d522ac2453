"""Workbooks and tables that other programs wrote oddly: every row is read, or a message says why none is."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runs.importing.tables import import_table, import_vlmevalkit
from safevlm.errors import InputError

ROWS = 20


@pytest.fixture
def workbook(tmp_path: Path) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    made = openpyxl.Workbook()
    made.active.append(["index", "question", "answer", "prediction"])
    for number in range(ROWS):
        made.active.append([number, "Which?", "A", "A"])
    made.save(tmp_path / "whole.xlsx")
    return tmp_path / "whole.xlsx"


def changed(workbook: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Return a copy whose parts went through ``change``; None leaves one out."""
    path = workbook.with_name("changed.xlsx")
    with zipfile.ZipFile(workbook) as whole, zipfile.ZipFile(path, "w") as copy:
        for name in whole.namelist():
            content = change(name, whole.read(name))
            if content is not None:
                copy.writestr(name, content)
    return path


@pytest.mark.parametrize("stated", ["A1", "A1:D5", "A1:B21", "A1:XFD1048576"])
def test_rows_are_read_whatever_size_a_sheet_states(workbook: Path, stated: str) -> None:
    path = changed(
        workbook, lambda _, part: re.sub(rb'dimension ref="[^"]*"', f'dimension ref="{stated}"'.encode(), part)
    )
    assert len(import_vlmevalkit(path, task="t").rows) == ROWS


def test_a_stray_cell_far_below_is_passed_over(workbook: Path) -> None:
    cell = b'<row r="900000"><c r="XFD900000" t="n"><v>1</v></c></row></sheetData>'
    path = changed(workbook, lambda _, part: part.replace(b"</sheetData>", cell))
    assert len(import_vlmevalkit(path, task="t").rows) == ROWS


def test_whatever_part_is_missing_or_torn_is_read_or_told(workbook: Path) -> None:
    with zipfile.ZipFile(workbook) as whole:
        parts = whole.namelist()
    for lost in parts:
        for rest in (None, b"", b"<a>", b"<a/>"):
            path = changed(workbook, lambda name, part, lost=lost, rest=rest: rest if name == lost else part)  # type: ignore[misc]
            try:
                assert len(import_vlmevalkit(path, task="t").rows) == ROWS
            except InputError as error:
                assert "Save" in str(error) or "has no column" in str(error)


def test_a_chart_sheet_is_told(tmp_path: Path, workbook: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    made = openpyxl.load_workbook(workbook)
    made.create_chartsheet("chart")
    made.save(tmp_path / "chart.xlsx")
    with pytest.raises(InputError, match="cannot be read as a workbook"):
        import_vlmevalkit(tmp_path / "chart.xlsx", task="t")


def test_answers_that_a_server_did_not_give_are_errors(tmp_path: Path) -> None:
    said = ["Failed to obtain answer via API.", "Failed to obtain answer via API. ", "A", ""]
    rows = [
        {"index": number, "question": "Which?", "answer": "A", "prediction": each, "hit": int(each == "A")}
        for number, each in enumerate(said)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = import_vlmevalkit(tmp_path / "a.json", task="t").rows
    assert [(row.answer, row.score, row.error is None) for row in found] == [
        (None, None, False),
        (None, None, False),
        ("A", 1.0, True),
        ("", 0.0, True),
    ]


@pytest.mark.parametrize("name", ["a.csv.gz", "a.tsv.gz"])
def test_compressed_tables_are_read(tmp_path: Path, name: str) -> None:
    text = "n,said,kind\n1,No.,USU\n".replace(",", "\t" if "tsv" in name else ",")
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    run = import_table(tmp_path / name, {"id": "n", "answer": "said", "type": "kind"})
    assert (run.record.artifact.name, [row.answer for row in run.rows]) == ("a", ["No."])


@pytest.mark.parametrize(
    ("cell", "value", "told"),
    [("n", True, "column 'n' is true"), ("said", ["a"], "column 'said' is"), ("n", {"a": 1}, "column 'n' is")],
)
def test_cells_that_are_no_text_are_refused(tmp_path: Path, cell: str, value: Any, told: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"n": 1, "said": "No.", "kind": "USU"} | {cell: value}]))
    with pytest.raises(InputError, match=told):
        import_table(tmp_path / "a.json", {"id": "n", "answer": "said", "type": "kind"})
