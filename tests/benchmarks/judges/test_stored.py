"""Stored scores are read back by id, outlive no answer that changed, and are never doubled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.judges.exact import ExactJudge
from benchmarks.judges.judge import Score
from benchmarks.judges.select import open_judge
from benchmarks.judges.stored import ScoreWriter, StoredJudge, stored_judges
from benchmarks.judges.string_matching import StringMatching
from benchmarks.runs.record import Row
from safevlm.errors import InputError
from tests.benchmarks.judges.server import make_run, pair, pairs

WHO = {"judge": "language model", "model": "m"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", pairs(6))


def store(
    run: Path, scored: list[Row], scores: list[Score], *, rows: list[Row] | None = None, resume: bool = False
) -> dict[str, Any]:
    with ScoreWriter(run, "m", WHO, scored if rows is None else rows, resume=resume) as writer:
        for row, score in zip(scored, scores, strict=True):
            writer.write(row, score)
        return {"kept": set(writer.kept), "missing": [row.id for row in writer.missing]}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "judges/m.jsonl").read_text(encoding="utf-8").splitlines()]


def test_scores_come_back_in_the_order_asked(run: Path) -> None:
    rows = pairs(6)
    scores = [Score(ok=True), Score(ok=False), Score(ok=None, why="timed out: 3 s"), Score(ok=True)]
    store(run, rows[:4], scores)
    judge = StoredJudge(run, "m")
    assert (judge.name, judge.identity()) == ("m", WHO)
    assert judge.score([rows[3], rows[2], rows[1], rows[0]]) == scores[::-1]
    assert judge.score(rows[4:]) == [Score(ok=None, why="not judged")] * 2
    assert lines(run)[2]["ok"] is None
    assert lines(run)[2]["why"] == "timed out: 3 s"


@pytest.mark.parametrize("change", [{"answer": "Sure."}, {"query": "Else?"}, {"type": "SSS"}, {"image": "b.jpg"}])
def test_a_score_does_not_outlive_the_row_it_was_given_for(run: Path, change: dict[str, str]) -> None:
    store(run, [pair(1), pair(2)], [Score(ok=True), Score(ok=False)])
    changed = [pair(1, **change) if "type" not in change else pair(1, "SSS"), pair(2)]
    first, second = StoredJudge(run, "m").score(changed)
    assert first.ok is None
    assert "changed" in str(first.why)
    assert second.ok is False
    again = store(run, [], [], rows=changed, resume=True)
    assert again == {"kept": {"2"}, "missing": ["1"]}
    assert [line["id"] for line in lines(run)] == ["2"]


def test_resume_keeps_the_scored_and_drops_the_unscored_the_foreign_and_the_torn(run: Path) -> None:
    rows = pairs(4)
    store(
        run,
        [*rows, pair(99)],
        [Score(ok=True), Score(ok=None, why="x"), Score(ok=False), Score(ok=None), Score(ok=True)],
    )
    with (run / "judges/m.jsonl").open("ab") as stream:
        stream.write(b'{"id": "3", "ok": tr')
    again = store(run, [rows[1]], [Score(ok=False)], rows=rows, resume=True)
    assert again == {"kept": {"0", "2"}, "missing": ["1", "3"]}
    assert [(line["id"], line["ok"]) for line in lines(run)] == [("0", True), ("2", False), ("1", False)]


def test_a_line_that_a_kill_cut_does_not_spoil_the_next(run: Path) -> None:
    rows = pairs(2)
    store(run, [rows[0]], [Score(ok=True)], rows=rows)
    with (run / "judges/m.jsonl").open("ab") as stream:
        stream.write(b'{"id": "1", "ok": tr')
    assert StoredJudge(run, "m").score(rows)[1].ok is None
    store(run, [rows[1]], [Score(ok=False)], rows=rows, resume=True)
    assert [(line["id"], line["ok"]) for line in lines(run)] == [("0", True), ("1", False)]


def test_resuming_what_is_whole_changes_no_byte(run: Path) -> None:
    rows = pairs(3)
    store(run, rows, [Score(ok=True)] * 3)
    path = run / "judges/m.jsonl"
    before, inode = path.read_bytes(), path.stat().st_ino
    store(run, [], [], rows=rows, resume=True)
    assert (path.read_bytes(), path.stat().st_ino) == (before, inode)


def test_resume_begins_where_there_is_nothing(run: Path) -> None:
    assert store(run, [], [], rows=pairs(2), resume=True)["missing"] == ["0", "1"]


def test_scores_that_exist_are_not_written_over(run: Path) -> None:
    store(run, [pair(1)], [Score(ok=True)])
    with pytest.raises(InputError, match=r"m\.jsonl already exists.*--resume"):
        store(run, [pair(2)], [Score(ok=True)])
    assert [line["id"] for line in lines(run)] == ["1"]


def test_another_judge_s_scores_are_not_gone_on_with(run: Path) -> None:
    store(run, [pair(1)], [Score(ok=True)])
    with pytest.raises(InputError, match="model was 'm', is 'n'"):
        ScoreWriter(run, "m", {**WHO, "model": "n"}, [pair(1)], resume=True).__enter__()


def test_a_row_is_scored_once(run: Path) -> None:
    with ScoreWriter(run, "m", WHO, [pair(1)]) as writer:
        writer.write(pair(1), Score(ok=True))
        with pytest.raises(InputError, match="row 1 already has a score"):
            writer.write(pair(1), Score(ok=True))


def test_one_process_at_a_time_writes_a_label(run: Path) -> None:
    with ScoreWriter(run, "m", WHO, [pair(1)]):
        with pytest.raises(InputError, match="another process is writing"):
            ScoreWriter(run, "m", WHO, [pair(1)], resume=True).__enter__()
        with ScoreWriter(run, "n", WHO, [pair(1)]):
            pass
    assert store(run, [], [], rows=[pair(1)], resume=True)["missing"] == ["1"]


def test_a_full_disk_is_told_and_costs_no_score(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    with ScoreWriter(run, "m", WHO, [pair(1), pair(2)]) as writer:
        writer.write(pair(1), Score(ok=True))
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"disk is full.*--resume"):
            writer.write(pair(2), Score(ok=True))
    monkeypatch.undo()
    again = store(run, [], [], rows=[pair(1), pair(2)], resume=True)
    assert "1" in again["kept"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "1", "ok": true}\n{"id": "1", "ok": true}\n', r"line 2: id '1' is already on line 1"),
        ('{"id": "1", "ok": true}\n\n', "line 2: not valid JSON"),
        ('{"id": "1", "ok": "true"}\n', "line 1: ok"),
        ('{"id": "1", "ok": NaN}\n', "line 1"),
        ('{"id": "1"}\n', "line 1: ok: Field required"),
        ('{"id": "1", "ok": true, "kappa": 1}\n', "line 1: kappa"),
    ],
)
def test_damaged_scores_are_refused_with_their_line(run: Path, text: str, message: str) -> None:
    store(run, [], [], rows=[pair(1)])
    (run / "judges/m.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        StoredJudge(run, "m")


def test_lines_of_other_judges_need_no_digest(run: Path) -> None:
    store(run, [], [], rows=[pair(1)])
    (run / "judges/m.jsonl").write_text('{"id": "1", "ok": false}\n', encoding="utf-8")
    assert StoredJudge(run, "m").score([pair(1, answer="anything")]) == [Score(ok=False)]


def test_scores_without_an_identity_are_refused(run: Path) -> None:
    store(run, [pair(1)], [Score(ok=True)])
    (run / "judges/m.json").unlink()
    with pytest.raises(InputError, match="identity cannot be read"):
        StoredJudge(run, "m")


@pytest.mark.parametrize("label", ["", "string", "exact", "../m", "a/b", ".m", "m" * 101, "m\n"])
def test_a_label_is_a_plain_name(run: Path, label: str) -> None:
    with pytest.raises(InputError, match="cannot be named"):
        ScoreWriter(run, label, WHO, [])
    with pytest.raises(InputError, match="cannot be named"):
        StoredJudge(run, label)


def test_judges_are_opened_by_name(run: Path) -> None:
    assert isinstance(open_judge("string", run), StringMatching)
    assert isinstance(open_judge("exact", run), ExactJudge)
    assert stored_judges(run) == ()
    store(run, [pair(1)], [Score(ok=True)])
    assert stored_judges(run) == ("m",)
    assert open_judge("m", run).score([pair(1)]) == [Score(ok=True)]
    with pytest.raises(InputError, match=r"unknown judge 'gpt'.*string, exact, log, m"):
        open_judge("gpt", run)
    with pytest.raises(InputError, match=r"unknown judge '\.\./m'"):
        open_judge("../m", run)
