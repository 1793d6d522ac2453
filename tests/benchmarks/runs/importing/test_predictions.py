from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runs.importing.command import main
from benchmarks.runs.importing.predictions import import_predictions
from benchmarks.runs.record import read_run
from safevlm.errors import InputError

PUBLISHED = Path(__file__).parents[5] / "shared" / "holisafe"
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published answers are not here")


def raw(number: int = 0, **changes: Any) -> dict[str, Any]:
    row = {"id": number, "image": f"hate/{number}.jpg", "type": "USU", "category": "hate", "subcategory": "gender"}
    return row | {"image_safe": False, "image_safety_label": 1, "prediction": "No."} | changes


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@needs_published
def test_published_answers_become_a_run() -> None:
    run = import_predictions(PUBLISHED / "safellava-7b.predictions.jsonl.gz")
    other = import_predictions(PUBLISHED / "safeqwen2.5-vl-7b.predictions.jsonl.gz")
    assert run.record.artifact.name == "safellava-7b"
    assert other.record.artifact.name == "safeqwen2.5-vl-7b"
    assert Counter(row.type for row in run.rows) == {"SSS": 682, "SSU": 718, "USU": 971, "UUU": 761, "SUU": 899}
    assert run.record.settings() == other.record.settings()  # the same benchmark, so comparable
    assert len(run.record.suite.left_out) == 5
    assert len({row.image for row in run.rows}) == 1796


def test_lists_and_compressed_files_are_read_alike(tmp_path: Path) -> None:
    rows = [raw(0), raw(1, prediction="Ja.\u2028")]
    lines = written(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    found = [import_predictions(tmp_path / name) for name in ("a.jsonl", "a.json", "a.jsonl.gz")]
    assert found[0].rows == found[1].rows == found[2].rows
    assert {run.record.artifact.name for run in found} == {"a"}
    assert len({run.record.suite.sha256 for run in found}) == 1


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([raw(0), raw(1, prediction=None)], "line 2: field 'prediction' is None"),
        ([raw(0), raw(0)], "line 2: id 0 is already in .*line 1"),
        ([raw(0), {"id": 1}], "line 2: field 'image' is missing"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        import_predictions(written(tmp_path / "a.jsonl", rows))


def test_bad_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        import_predictions(tmp_path / "empty.jsonl")
    (tmp_path / "torn.jsonl").write_text('{"id": ')
    with pytest.raises(InputError, match="line 1 is not valid JSON"):
        import_predictions(tmp_path / "torn.jsonl")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b"{}" * 99)[:-12])
    with pytest.raises(InputError, match="cannot be read"):
        import_predictions(tmp_path / "torn.jsonl.gz")
    with pytest.raises(InputError, match="no such file"):
        import_predictions(tmp_path / "none.jsonl")


def test_the_command_writes_a_record(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [raw(0), raw(1)])
    main.main([str(source), "--out", str(tmp_path / "run"), "--name", "A"], standalone_mode=False)
    run = read_run(tmp_path / "run")
    assert (run.record.artifact.name, len(run.rows), run.rows[1].answer) == ("A", 2, "No.")
    with pytest.raises(InputError, match="--task is not for --format holisafe"):
        main.main([str(source), "--out", str(tmp_path / "b"), "--task", "x"], standalone_mode=False)
