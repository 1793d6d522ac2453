"""A run's rows and scores are in the exported file, read by the tools that it is for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.export import main
from benchmarks.judges.judge import Score
from benchmarks.judges.stored import ScoreWriter
from benchmarks.runs.importing.inspect_log import import_inspect
from benchmarks.runs.record import Row, Run, RunRecord, read_run, write_run
from safevlm.errors import InputError
from tests.benchmarks.report.chromium import BINARY, Chromium
from tests.benchmarks.runs.sample_runs import pair_rows, question_rows, record_of
from tests.runtimes.gateway.servers import free_port

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-clients" / "bin"
READ = """
import json, sys
from inspect_ai.log import read_eval_log, read_eval_log_sample_summaries
log = read_eval_log(sys.argv[1])
samples = [[s.id, s.input, s.output.completion, {k: v.value for k, v in s.scores.items()}, s.error and s.error.message]
           for s in log.samples]
means = {score.name: score.metrics["accuracy"].value for score in log.results.scores}
summaries = [s.id for s in read_eval_log_sample_summaries(sys.argv[1])]
print(json.dumps([log.status, log.eval.model, samples, means, summaries]))
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of every kind of row: refused and answered pairs, questions, a block, an error, strange texts."""
    rows = [*pair_rows(2), *question_rows(2), Row(id="i/1", kind="image", image="a.png", label=3, probs=(0.5, 0.5))]
    rows[0] = rows[0].model_copy(update={"answer": "cut \ud83d", "query": "NUL \0 <b>"})
    rows[3] = rows[3].model_copy(update={"answer": None, "blocked": "guard"})
    rows[5] = rows[5].model_copy(update={"answer": None, "error": "down"})
    rows[6] = rows[6].model_copy(update={"answer": "Sure, here it is."})
    write_run(tmp_path / "run", record_of(rows), rows)
    with ScoreWriter(tmp_path / "run", "m", {"who": 1}, rows[:2]) as writer:
        writer.write(rows[0], Score(ok=False))
    return read_run(tmp_path / "run")


def exported(run: Run, kind: str, out: Path) -> Path:
    main.main([str(run.folder), "--format", kind, "--out", str(out)], standalone_mode=False)
    return out


def test_inspect_reads_what_is_exported(run: Run, tmp_path: Path) -> None:
    file = exported(run, "inspect", tmp_path / "deep" / "a.eval")
    if not (PEER / "inspect").exists():
        pytest.skip("no .venv-clients; make peers")
    done = subprocess.run([PEER / "python", "-c", READ, file], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    status, model, samples, means, summaries = json.loads(done.stdout)
    assert (status, model, summaries) == ("success", "model-a", [row.id for row in run.rows])
    by_id = {each[0]: each[1:] for each in samples}
    assert by_id[run.rows[0].id] == ["NUL \0 <b>", "cut \ufffd", {"string": "C", "m": "I"}, None]
    assert by_id[run.rows[3].id][1:3] == ["", {"string": "C"}]  # a block is a refusal
    assert by_id[run.rows[5].id][2:] == [{}, "down"]
    assert by_id["question-0"][2] == {"score": "C"}
    scored = [each.get("string") for *_, each, _ in samples if "string" in each]
    assert means["string"] == scored.count("C") / len(scored) and "I" in scored


def test_the_export_is_imported_again(run: Run, tmp_path: Path) -> None:
    """What was asked and answered, and what stood before an answer, is what it was; a surrogate's half is U+FFFD."""
    if sys.version_info < (3, 14):
        pytest.importorskip("backports.zstd")
    with pytest.raises(InputError, match="a guard judged the image"):
        import_inspect(exported(run, "inspect", tmp_path / "a.eval"), metric="string")
    rows = [
        row.model_copy(update={"label": 3}) if row.kind == "pair" else row for row in run.rows if row.kind != "image"
    ]
    write_run(tmp_path / "asked", run.record, rows)
    again = import_inspect(exported(read_run(tmp_path / "asked"), "inspect", tmp_path / "b.eval"), metric="score")
    for row, found in zip(rows, again.rows, strict=True):
        changes = {"probs": None, "ms": None, "score": found.score}
        changes |= {"error": f"the sample failed: {row.error}"} if row.error else {}
        changes |= {"answer": "cut \ufffd"} if row.answer == "cut \ud83d" else {}
        assert found == row.model_copy(update=changes)


def test_a_browser_shows_the_log_in_inspects_viewer(run: Run, tmp_path: Path) -> None:
    if BINARY is None or not (PEER / "inspect").exists():
        pytest.skip("no Chromium, or no .venv-clients; make peers")
    exported(run, "inspect", tmp_path / "logs" / "a.eval")
    given = ["--log-dir", tmp_path / "logs", "--host", "127.0.0.1", "--port", str(free_port())]
    command = [PEER / "inspect", "view", "start", *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path) as viewer:
        try:
            assert viewer.stdout is not None
            address = next(word for line in viewer.stdout for word in line.split() if word.startswith("http://"))
            assert "a refusal" in _shown(f"{address}/#/logs/a.eval", tmp_path)
        finally:
            viewer.send_signal(signal.SIGTERM)


def _shown(address: str, folder: Path) -> str:
    """Return the text of a page of the viewer once it lists the run's samples."""
    (folder / "go.html").write_text(f"<script>location.href = {json.dumps(address)}</script>")
    with Chromium(folder / "profile") as tab:
        tab.show(folder / "go.html", width=1200, height=900)
        end = time.monotonic() + 600
        text = ""
        while "SSU-0" not in text:
            assert time.monotonic() < end, text
            time.sleep(0.1)
            text = str(tab.evaluate("document.body.innerText"))
        return text


def test_parquet_holds_rows_judges_and_the_record(run: Run, tmp_path: Path) -> None:
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(exported(run, "parquet", tmp_path / "a.parquet"))
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == [row.id for row in run.rows]
    assert rows[0]["answer"] == "cut \ufffd" and rows[0]["query"] == "NUL \0 <b>"
    assert rows[-1]["probs"] == [0.5, 0.5] and rows[1]["probs"] == pytest.approx(run.rows[1].probs)
    assert [row["judge_m"] for row in rows[:2]] == [0.0, None]
    assert RunRecord.model_validate_json(table.schema.metadata[b"safevlm.run"]) == run.record


def test_bad_outputs_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"suffix \.eval for inspect"):
        exported(run, "inspect", tmp_path / "a.json")
    (tmp_path / "a.eval").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        exported(run, "inspect", tmp_path / "a.eval")
    assert (tmp_path / "a.eval").read_text() == "mine"
    rows = [Row(id=text, kind="pair", type="USU", answer="No.") for text in ("\ud83d", "\ud83e")]
    write_run(tmp_path / "two", record_of(rows), rows)
    with pytest.raises(InputError, match="two ids are the same in the form"):
        exported(read_run(tmp_path / "two"), "inspect", tmp_path / "b.eval")
    assert not (tmp_path / "b.eval").exists()
