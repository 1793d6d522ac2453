"""Labels are read without guessing, whoever wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.judges.labels import read_labels
from safevlm.errors import InputError


def said(path: Path) -> list[tuple[str, str, bool | None]]:
    return [(label.run, str(label.id), label.ok) for _, label in read_labels(path)]


def test_a_row_of_either_run_is_labelled_once(tmp_path: Path) -> None:
    one = '{"id": "1", "ok": true}\n'
    assert len(said(labels(tmp_path, one + '{"id": "1", "run": "candidate", "ok": null}\n'))) == 2
    with pytest.raises(InputError, match="line 2: id '1' of the candidate is already on line 1"):
        read_labels(labels(tmp_path, 2 * '{"id": "1", "run": "candidate", "ok": true}\n'))


def test_a_spreadsheet_s_empty_cells_are_not_labelled_yet(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("id,run,ok,weight\n1,candidate,yes,2.5\n2,,,\n", encoding="utf-8")
    assert said(path) == [("candidate", "1", True), ("baseline", "2", None)]
    path.write_text("id,ok\n1,maybe\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2: ok"):
        read_labels(path)


def test_ids_and_answers_that_end_inside_an_emoji_are_read(tmp_path: Path) -> None:
    path = labels(tmp_path, '{"id": "a\\ud83d", "ok": true, "answer": "\\ud83d"}\n{"id": "b", "ok": false}\n')
    assert said(path) == [("baseline", "a\ud83d", True), ("baseline", "b", False)]
    assert read_labels(path)[0][1].answer == "\ud83d"


def labels(folder: Path, text: str) -> Path:
    path = folder / "labels.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_are_read(tmp_path: Path) -> None:
    path = labels(tmp_path, '{"id": "17", "ok": true}\n\n{"ok": false, "id": 18}\n')
    assert said(path) == [("baseline", "17", True), ("baseline", "18", False)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no label"),
        ('{"id": "1", "ok": true}\n{"id": 1, "ok": false}\n', "line 2: id '1' of the baseline is already on line 1"),
        ('{"id": "1", "ok": true}\n{"id": "2"}\n', "line 2: ok: Field required"),
        ('{"id": "1", "ok": 1}\n', "line 1: ok: .*bool"),
        ('{"id": "1", "ok": null}\n', "holds no labels"),
        ('{"id": "1", "ok": true, "run": "candidat"}\n', "line 1: run: .*'baseline' or 'candidate'"),
        ('{"id": "1", "ok": true, "weight": 0}\n', "line 1: weight"),
        ('{"id": "1", "ok": true, "weight": 1e308}\n', "line 1: weight"),
        ('{"id": "1", "ok": true, "by": "me"}\n', "line 1: by: Extra"),
        ('{"id": "", "ok": true}\n', "line 1: id"),
        ('{"id": true, "ok": true}\n', "line 1: id"),
        ("1 yes\n", "line 1 is not valid JSON"),
        ("[1]\n", "row 1: the whole"),
    ],
)
def test_damaged_labels_are_refused_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_labels(labels(tmp_path, text))


def test_labels_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    with pytest.raises(InputError, match="cannot be read"):
        read_labels(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-16-LE text"):
        read_labels(path)
