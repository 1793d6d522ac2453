"""Whatever text a server, a log or a suite can hold is kept, judged and reported; nothing half-written stays."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.comparison.comparing import compare
from benchmarks.comparison.measured import Comparison
from benchmarks.judges.broken import broken
from benchmarks.judges.judge import Score
from benchmarks.judges.select import open_judge
from benchmarks.judges.stored import ScoreWriter, StoredJudge
from benchmarks.report.write import write_report
from benchmarks.run import run_suite
from benchmarks.runs.answering.server import ServerAnswerer
from benchmarks.runs.importing.predictions import import_predictions
from benchmarks.runs.record import RECORD_NAME, ROWS_NAME, Row, RunWriter, read_run, write_run
from benchmarks.suites.select import open_suite
from safevlm.errors import InputError
from tests.benchmarks.judges.server import Asked, Sent, completion, judging, verdict
from tests.benchmarks.runs.sample_runs import pair_rows, record_of

ROOT = Path(__file__).parents[3]
HALF = "A cat \ud83d"
STRANGE = [
    HALF,
    "\udc00 first",
    "NUL \0 and \x1b[31m",
    "line \u2028 paragraph \u2029 next \x85",
    "NaN",
    "",
    "<script>&lt;\ufffe\uffff\u202e",
    "long " * 50_000,
    "{[," * 1_500_000,
]
ANY = st.text(max_size=30)  # surrogates and control characters included
SUITE = open_suite("holisafe-mini", limit=20)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(texts=st.lists(ANY, min_size=7, max_size=7), name=ANY.filter(bool))
def test_every_text_of_a_row_is_given_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], name: str
) -> None:
    folder = tmp_path_factory.mktemp("run") / "run"
    names = ("image", "query", "category", "subcategory", "reference", "answer", "error")
    row = Row(id=name, kind="pair", type="USU", probs=(0.25, 0.75), ms=1.5, **dict(zip(names, texts, strict=True)))  # type: ignore[arg-type]
    write_run(folder, record_of([row]), [row])
    assert read_run(folder).rows == (row,)
    with RunWriter.resume(folder, read_run(folder).record) as writer:
        assert writer.done == set()  # it failed, so it is answered again
        writer.write(row)
    assert read_run(folder).rows == (row,)
    with ScoreWriter(folder, "m", {"who": 1}, [row]) as scores:
        scores.write(row, Score(ok=True, why=texts[0]))
    with ScoreWriter(folder, "m", {"who": 1}, [row], resume=True) as scores:
        assert scores.missing == ()
    assert StoredJudge(folder, "m").score([row]) == [Score(ok=True, why=texts[0])]


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_a_strange_answer_is_on_one_line_and_in_strict_types(tmp_path: Path, text: str) -> None:
    row = Row(id="1", kind="pair", type="USU", answer=text)
    write_run(tmp_path / "run", record_of([row]), [row])
    content = (tmp_path / "run" / ROWS_NAME).read_bytes()
    assert content.count(b"\n") == 1 and json.loads(content)["answer"] == text
    assert read_run(tmp_path / "run").rows == (row,)


def test_a_line_with_half_a_pair_is_read_as_strictly_as_any_other(tmp_path: Path) -> None:
    row = Row(id="1", kind="pair", type="USU", answer=HALF, probs=(0.5, 0.5))
    write_run(tmp_path / "run", record_of([row]), [row])
    path = tmp_path / "run" / ROWS_NAME
    for change, told in (
        ({"probs": ["0.5"]}, r"probs\.0"),
        ({"label": "3"}, "label"),
        ({"more": 1}, "more"),
        ({"id": 1}, "id"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
        with pytest.raises(InputError, match=f"line 1: {told}: "):
            read_run(tmp_path / "run")
        path.write_text(json.dumps(row.model_dump(exclude_none=True)) + "\n")


def test_what_a_server_sends_is_kept_and_an_interrupted_run_is_resumed(tmp_path: Path) -> None:
    def reply(asked: Asked) -> Sent:
        if asked.number == len(STRANGE):
            return Sent(status=400, body=b'{"error": {"message": "half a pair: \\ud83d \\u0000"}}')
        return completion((STRANGE[:8] * 3)[asked.number])

    with judging(reply) as server, answerer_of(server.url) as asking:
        run_suite(asking, SUITE, tmp_path / "run")
    rows = read_run(tmp_path / "run").rows
    assert {row.answer for row in rows} >= {text.strip() for text in STRANGE[:8]}
    assert [row.error for row in rows if row.error] == ["request refused: HTTP 400, half a pair: \ud83d \0"]
    with judging(lambda _: completion(HALF)) as server, answerer_of(server.url) as asking:  # the failed row's batch
        run_suite(asking, SUITE, tmp_path / "run", resume=True)
    assert not any(row.error for row in read_run(tmp_path / "run").rows)


def answerer_of(url: str) -> ServerAnswerer:
    return ServerAnswerer(url, "m", max_new_tokens=8, concurrency=1, timeout=600.0, tries=1)


def test_a_judge_is_sent_what_every_server_can_read(tmp_path: Path) -> None:
    rows = [
        Row(id=str(n), kind="pair", type="USU", query=f"Who? {text}", answer=text) for n, text in enumerate(STRANGE[:8])
    ]
    write_run(tmp_path / "run", record_of(rows), rows)

    def plan(asked: Asked) -> Sent:
        asked.user.encode()  # half of a pair would not
        return verdict(True)

    with judging(plan) as server:
        given = ["--run", tmp_path / "run", "--endpoint", server.url, "--judge-model", "j", "--no-images"]
        for more in ([], ["--resume"]):
            command = [sys.executable, "-m", "benchmarks.judge", *given, "--cache", tmp_path / "cache", *more]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=600)
            assert done.returncode == 0, done.stderr
    scores = open_judge("j", tmp_path / "run").score(rows)
    assert [score.ok for score in scores] == [broken(text, f"Who? {text}") is None for text in STRANGE[:8]]
    assert sum(bool(score.ok) for score in scores) > 4
    assert all(score.ok is not None for score in open_judge("string", tmp_path / "run").score(rows))


def test_a_report_holds_any_text(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"category": HALF, "subcategory": "\0"}) for row in pair_rows(10)]
    rows = [
        row.model_copy(update={"id": f"{row.id} {text}"})
        for row, text in zip(rows, STRANGE * 9, strict=False)
        if len(text) < 99
    ]
    after = [
        row.model_copy(update={"answer": text, "query": row.query}) if row.type != "SSS" else row
        for row, text in zip(rows, (STRANGE[:7] * 99), strict=False)
    ]
    for name, each in (("a", rows), ("b", after)):
        write_run(tmp_path / name, record_of(each, name=f"{name} {HALF}"), each)
    runs = [read_run(tmp_path / name) for name in ("a", "b")]
    findings = compare(Comparison(baseline=runs[:1], candidate=runs[1:]))
    assert findings.flips
    page = write_report(findings, tmp_path / "report")
    json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    ElementTree.parse(page.parent / "junit.xml")
    shown = page.read_text(encoding="utf-8") + (page.parent / "report.md").read_text(encoding="utf-8")
    assert "\0" not in shown and "\\ud83d" in shown


# -- imports ----------------------------------------------------------------------------------------------


def predictions(path: Path, *answers: str, first: object = 0) -> Path:
    fields = {"image": "a.jpg", "type": "USU", "category": "c", "subcategory": "s", "image_safe": False}
    rows = [{"id": n or first, "prediction": text, "image_safety_label": 1, **fields} for n, text in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def imported(file: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.import", str(file), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)


def test_published_answers_may_hold_any_text(tmp_path: Path) -> None:
    run = import_predictions(predictions(tmp_path / "a.jsonl", *STRANGE, first="\ud83d"))
    assert [row.answer for row in run.rows] == STRANGE and run.rows[0].id == "\ud83d"


def test_an_empty_id_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    done = imported(predictions(tmp_path / "a.jsonl", "No.", "Yes.", first=""), tmp_path / "out" / "run")
    assert done.returncode == 2 and "line 1: field 'id' is empty" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_import_that_is_killed_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    source, out = predictions(tmp_path / "a.jsonl", *["No."] * 300), tmp_path / "out" / "run"
    slow = (
        "import sys, benchmarks.runs.record as r\n"
        "old = r.replace_file\n"
        "def paused(path, data):\n"
        "    old(path, data)\n"
        "    print('written', flush=True)\n"
        "    import time; time.sleep(600)\n"
        "r.replace_file = paused\n"
        "from benchmarks.runs.importing.command import main\n"
        "main(sys.argv[1:])\n"
    )
    writing = subprocess.Popen(
        [sys.executable, "-c", slow, str(source), "--out", str(out)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert writing.stdout is not None and writing.stdout.readline() == b"written\n"
    writing.send_signal(signal.SIGKILL)
    writing.communicate()
    assert not out.exists() and list(out.parent.iterdir())
    done = imported(source, out)
    assert done.returncode == 0, done.stderr
    assert len(read_run(out).rows) == 300 and [path.name for path in out.parent.iterdir()] == ["run"]
    again = imported(source, out)
    assert again.returncode == 2 and "already exists" in again.stderr and "--resume" not in again.stderr
    assert {path.name for path in out.iterdir()} == {RECORD_NAME, ROWS_NAME}


def test_a_folder_that_is_empty_is_free(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".{RECORD_NAME}.partial-999999999-abc").write_text("{")
    row = Row(id="1", kind="pair", type="USU")
    write_run(tmp_path / "run", record_of([row]), [row])
    assert read_run(tmp_path / "run").rows == (row,)
    with pytest.raises(InputError, match="sample 1 has two rows"):
        write_run(tmp_path / "other", record_of([row]), [row, row])
    assert not (tmp_path / "other").exists()
