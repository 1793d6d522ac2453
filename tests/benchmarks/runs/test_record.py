from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.runs.record import RECORD_NAME, ROWS_NAME, Row, RunWriter, read_run
from safevlm.errors import InputError
from tests.benchmarks.runs.sample_runs import pair_rows, question_rows, record_of, stored


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [*pair_rows(3), *question_rows(2), Row(id="i", kind="image", image="a.png", label=3, error="torn")]
    record = record_of(rows)
    run = stored(tmp_path / "run", rows, record)
    assert list(run.rows) == rows
    assert run.record == record


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_survives_one_line(text: str) -> None:
    row = Row(id="1", kind="pair", answer=text, query=text)
    line = row.model_dump_json(exclude_none=True)
    assert "\n" not in line
    assert Row.model_validate_json(line) == row


def test_a_run_from_before_providers_were_recorded_is_read_and_resumed(tmp_path: Path) -> None:
    rows = pair_rows(2)
    record = record_of(rows).model_copy(update={"finished": None})
    on_gpu, on_cpu = (record.runtime.model_copy(update={"provider": name}) for name in ("CUDA", "CPU"))
    now = record.model_copy(update={"runtime": on_gpu})
    for begun in (record.runtime, on_gpu, on_cpu):
        folder = tmp_path / str(begun.provider)
        with RunWriter.begin(folder, record.model_copy(update={"runtime": begun})):
            pass
        if begun.provider is None:
            stated = json.loads((folder / RECORD_NAME).read_text())
            stated["runtime"].pop("provider", None)
            (folder / RECORD_NAME).write_text(json.dumps(stated))
        if begun is on_cpu:
            with pytest.raises(InputError, match="holds another run: "):
                RunWriter.resume(folder, now)
        else:
            with RunWriter.resume(folder, now) as writer:
                assert writer.done == set()


def test_a_killed_run_goes_on_without_a_lost_or_doubled_row(tmp_path: Path) -> None:
    rows = pair_rows(4)
    record = record_of(rows).model_copy(update={"finished": None})
    folder = tmp_path / "run"
    with RunWriter.begin(folder, record) as writer:
        for row in rows[:7]:
            writer.write(row)
    with (folder / ROWS_NAME).open("ab") as stream:
        stream.write(b'{"id": "SSS-3", "kind": "pa')  # killed while writing
    with RunWriter.resume(folder, record) as writer:
        assert writer.done == {row.id for row in rows[:7]}
        for row in rows[7:]:
            writer.write(row)
        with pytest.raises(InputError, match="SSS-0 already has a row"):
            writer.write(rows[0])
        writer.finish("now")
    run = read_run(folder)
    assert list(run.rows) == rows
    assert run.record.finished == "now"


def test_rows_that_failed_are_tried_again(tmp_path: Path) -> None:
    rows = pair_rows(2)
    failed = rows[3].model_copy(update={"answer": None, "error": "the server is down"})
    record = record_of(rows)
    stored(tmp_path / "run", [*rows[:3], failed, *rows[4:]], record)
    with RunWriter.resume(tmp_path / "run", record) as writer:
        assert rows[3].id not in writer.done
        writer.write(rows[3])
    assert {row.id: row for row in read_run(tmp_path / "run").rows} == {row.id: row for row in rows}


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    rows = pair_rows(2)
    stored(tmp_path / "run", rows)
    other = record_of(rows).model_copy(update={"decoding": {"sampling": "greedy", "max_new_tokens": 7}})
    with pytest.raises(InputError, match=r"another run: decoding\.max_new_tokens was 32, is 7\. Give"):
        RunWriter.resume(tmp_path / "run", other)
    with pytest.raises(InputError, match="--resume to continue"):
        RunWriter.begin(tmp_path / "run", other)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"id": "x", "kind": "pair", "probs": [NaN]}', "NaN is not a number"),
        ('{"id": "x", "kind": "pair", "probs": [1.5]}', r"probs\.0.*less than or equal to 1"),
        ('{"id": "x", "kind": "riddle"}', "kind: .*riddle"),
        ('{"kind": "pair"}', "id: Field required"),
        ('{"id": "x", "kind": "pair", "colour": 1}', "colour: Extra inputs"),
        ("{", "line 11: not valid JSON"),
        ('{"id": "SSS-0", "kind": "pair"}', "id 'SSS-0' is already on line 1"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, line: str, told: str) -> None:
    stored(tmp_path / "run", pair_rows(2))
    with (tmp_path / "run" / ROWS_NAME).open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(InputError, match=told) as error:
        read_run(tmp_path / "run")
    assert "line 11" in str(error.value)


def test_an_unknown_schema_is_refused(tmp_path: Path) -> None:
    stored(tmp_path / "run", pair_rows(1))
    path = tmp_path / "run" / RECORD_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    with pytest.raises(InputError, match="schema_version"):
        read_run(tmp_path / "run")
    with pytest.raises(InputError, match="there is no such file"):
        read_run(tmp_path)


def test_a_full_disk_keeps_what_was_written(tmp_path: Path) -> None:
    rows = pair_rows(2)
    writer = RunWriter.begin(tmp_path / "run", record_of(rows))
    writer.write(rows[0])
    writer._stream.close()
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(InputError, match=r"disk is full.*--resume"):
        writer._stream = full  # type: ignore[assignment]
        writer.write(rows[1])
    assert [row.id for row in read_run(tmp_path / "run").rows] == [rows[0].id]
