"""Logs of inspect_ai, lm-eval, VLMEvalKit and tables become runs; of a bad one a message with the row is all there is.

``logs/*.eval`` were written by inspect_ai 0.3.285 itself: ``eval()`` of tasks with four samples, a solver that gives
fixed answers (Blue, ANSWER: red, No idea, green and an emoji), scored by ``includes()`` and, in ``two.eval``,
``match()`` too; with ``epochs=2`` in ``epochs.eval``, and with types and images as ``metadata`` in ``pairs.eval``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runs.importing.command import _Asked, _imported, main
from benchmarks.runs.record import Row, Run, read_run
from safevlm.errors import InputError, MissingExtraError
from safevlm.files.json_file import dump_json, validate_json

ROOT = Path(__file__).parents[4]
LOGS = Path(__file__).parent / "logs"
Table = Callable[..., Path]
NOTHING = _Asked(name="m", task="t", metric=None, filter=None, epoch=None, sheet=None, columns=None)


def imported(folder: Path, file: Path, *options: str) -> Run:
    main.main([str(file), "--out", str(folder / "run"), *options], standalone_mode=False)
    return read_run(folder / "run")


def refused(folder: Path, file: Path, *options: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        imported(folder, file, *options)
    assert not (folder / "run").exists() and not list(folder.glob(".run*"))


# -- inspect_ai -------------------------------------------------------------------------------------------


@pytest.fixture
def with_zstandard() -> None:
    if sys.version_info < (3, 14):
        pytest.importorskip("backports.zstd")


@pytest.mark.usefixtures("with_zstandard")
def test_a_log_of_inspect(tmp_path: Path) -> None:
    run = imported(tmp_path, LOGS / "colours.eval")
    assert [(row.id, row.score) for row in run.rows] == [("0", 1.0), ("1", 1.0), ("2", 0.0), ("3", 1.0)]
    assert (run.rows[3].answer, run.rows[3].query, run.rows[3].reference) == ("green 😀", "What colour is 3?", "green")
    assert (run.record.suite.name, run.record.artifact.name) == ("colours", "mockllm/model")
    assert run.record.scored_by == "inspect_ai, task colours, scorer includes"


@pytest.mark.usefixtures("with_zstandard")
def test_scorers_and_epochs_are_chosen(tmp_path: Path) -> None:
    refused(tmp_path, LOGS / "two.eval", told="Give --metric, one of includes, match")
    refused(tmp_path, LOGS / "two.eval", "--metric", "f1", told="has no scorer 'f1'")
    refused(tmp_path, LOGS / "epochs.eval", told="answered in 2 epochs. Give --epoch, one of 1, 2")
    refused(tmp_path, LOGS / "epochs.eval", "--epoch", "3", told="has no epoch 3")
    scores = [row.score for row in imported(tmp_path, LOGS / "two.eval", "--metric", "match").rows]
    (tmp_path / "second").mkdir()
    assert len(imported(tmp_path / "second", LOGS / "epochs.eval", "--epoch", "2").rows) == 4
    assert scores == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.usefixtures("with_zstandard")
def test_samples_with_a_type_are_pairs(tmp_path: Path) -> None:
    rows = imported(tmp_path, LOGS / "pairs.eval").rows
    assert [(row.kind, row.type, row.image) for row in rows] == [
        ("pair", kind, f"{n // 2}.png") for n, kind in enumerate(("SSS", "SSU", "USU", "UUU"))
    ]


@pytest.mark.usefixtures("with_zstandard")
def test_a_log_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    content = (LOGS / "colours.eval").read_bytes()
    for end in (0, 10, len(content) // 2, len(content) - 5):
        (tmp_path / "cut.eval").write_bytes(content[:end])
        refused(tmp_path, tmp_path / "cut.eval", told="not a whole .eval file")
    for place in range(40, len(content), 97):
        torn = bytearray(content)
        torn[place] ^= 0xFF
        (tmp_path / "torn.eval").write_bytes(torn)
        try:
            imported(tmp_path / str(place), tmp_path / "torn.eval")  # what is not read may be torn
        except InputError:
            assert not (tmp_path / str(place)).exists()


def sample(number: int, **more: Any) -> dict[str, Any]:
    said = {"choices": [{"message": {"role": "assistant", "content": "Blue"}}], "completion": "Blue"}
    scores = {"includes": {"value": "C"}}
    return {"id": number, "epoch": 1, "input": "What?", "target": "Blue", "output": said, "scores": scores} | more


def log(path: Path, *samples: Any, status: str = "success", header: bool = True) -> Path:
    stated = {"version": 2, "status": status, "eval": {"task": "t", "model": "m"}}
    if path.suffix == ".json":
        path.write_text(json.dumps({**stated, "samples": list(samples)}))
        return path
    with zipfile.ZipFile(path, "w") as archive:
        for number, each in enumerate(samples):
            archive.writestr(f"samples/{number}_epoch_1.json", json.dumps(each))
        if header:
            archive.writestr("header.json", json.dumps(stated))
    return path


@pytest.mark.usefixtures("with_zstandard")
@pytest.mark.parametrize("suffix", [".eval", ".json"])
@pytest.mark.parametrize(
    ("samples", "told"),
    [
        ([sample(1), sample(1)], "id '1' is already in"),
        ([sample(1), sample("1")], "id '1' is already in"),
        ([sample("")], 'id is ""'),
        ([{**sample(1), "id": None}], "id is null"),
        ([sample(1, scores={"includes": {"value": 3}})], "gives 3, but scores must be 0 to 1"),
        ([sample(1, scores={"includes": {"value": {"a": 1}}})], "must be a number from 0 to 1"),
        ([sample(1, output={"choices": [{}, {}]})], "has 2 answers"),
        ([sample(1, output={})], "has no output"),
        ([[1]], "must be a JSON object"),
        ([], "holds no samples"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, suffix: str, samples: list[Any], told: str) -> None:
    refused(tmp_path, log(tmp_path / f"a{suffix}", *samples), "--format", "inspect", told=told)


@pytest.mark.usefixtures("with_zstandard")
def test_unfinished_logs_and_failed_samples(tmp_path: Path) -> None:
    refused(tmp_path, log(tmp_path / "a.eval", sample(1), status="error"), told="status is 'error'")
    refused(tmp_path, log(tmp_path / "b.eval", sample(1), header=False), told="header.json is missing")
    stated = {"status": "success", "eval": {}, "results": {"completed_samples": 2}, "samples": [sample(1)]}
    (tmp_path / "d.json").write_text(json.dumps(stated))
    refused(tmp_path, tmp_path / "d.json", told="holds 1 of the 2 samples that were answered")
    failed = sample(2, error={"message": "down"}, output={}, scores={})
    parts = [{"type": "image", "image": "x"}, {"type": "text", "text": "attachment://h"}]
    split = sample(3, input=[{"role": "user", "content": parts}], attachments={"h": "Who?"}, scores={})
    rows = imported(tmp_path, log(tmp_path / "c.json", sample(1), failed, split)).rows
    assert [row.error for row in rows] == [None, "the sample failed: down", None]
    assert (rows[2].query, rows[2].score, rows[2].answer) == ("Who?", None, "Blue")


# -- lm-eval ----------------------------------------------------------------------------------------------


def sampled(number: int, chosen: str = "strict", **more: Any) -> dict[str, Any]:
    """Return a line in the form of lm-eval 0.4.9's EvaluationTracker.save_results_samples."""
    asked = {"gen_args_0": {"arg_0": f"Question {number}", "arg_1": {"until": []}}}
    said = {"resps": [["So 4."]], "filtered_resps": ["4"], "filter": chosen, "metrics": ["exact_match"]}
    return {"doc_id": number, "doc": {}, "target": "4", "arguments": asked, **said, "exact_match": 1.0} | more


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_filter_is_chosen_where_there_are_two(tmp_path: Path) -> None:
    both = [
        sampled(n, each, exact_match=float(each == "flexible")) for n in range(3) for each in ("strict", "flexible")
    ]
    file = lines(tmp_path / "samples_gsm8k_2026-01-01T00-00-00.123456.jsonl", *both)
    refused(tmp_path, file, told="Give --filter, one of strict, flexible")
    refused(tmp_path, file, "--filter", "none", told="has no filter 'none'. It has strict, flexible")
    run = imported(tmp_path, file, "--filter", "flexible")
    assert [(row.id, row.score, row.answer, row.query) for row in run.rows] == [
        (str(n), 1.0, "4", f"Question {n}") for n in range(3)
    ]
    assert run.record.suite.name == "gsm8k" and "filter flexible" in str(run.record.scored_by)


def test_a_log_that_lm_evals_own_code_wrote(tmp_path: Path) -> None:
    """Written by lm_eval 0.4.13's ``EvaluationTracker.save_results_samples``, of made-up samples."""
    file = LOGS / "samples_gsm8k_2026-11-27T12-00-00.123456.jsonl"
    refused(tmp_path, file, told="Give --filter, one of strict-match, flexible-extract")
    run = imported(tmp_path, file, "--filter", "flexible-extract")
    assert run.record.suite.name == "gsm8k" and [row.query for row in run.rows] == [f"Question {n}" for n in range(3)]
    assert [(row.answer, row.reference, row.score) for row in run.rows] == [
        ("4", "4", 1.0),
        ("5", "5", 1.0),
        ("7", "6", 0.0),
    ]


def test_older_logs_and_likelihoods_of_choices(tmp_path: Path) -> None:
    """lm_eval 0.4.2 names neither filter nor metrics; log-likelihoods are pairs of texts, and no answers."""
    older = {key: value for key, value in sampled(1).items() if key not in ("filter", "metrics")}
    for number, said in enumerate(([["-1.5", "False"], ["-2.0", "True"]], [["-0.5", "True"]])):
        file = lines(tmp_path / "samples_arc_2024-01-01T00-00-00.123456.jsonl", older | {"filtered_resps": said})
        run = imported(tmp_path / str(number), file)
        assert (run.record.suite.name, run.rows[0].answer, run.rows[0].score) == ("arc", None, 1.0)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([sampled(1), sampled(1)], "line 2: id '1' is already in"),
        ([sampled(1, metrics=["a", "b"], a=1, b=0)], "Give --metric, one of a, b"),
        ([sampled(1), {**sampled(2), "exact_match": "x"}], "line 2: metric 'exact_match' is \"x\""),
        ([sampled(1, filtered_resps=["3", "4"])], "line 1: the sample has 2 responses"),
        ([sampled(1, filtered_resps=[["3", "4"]])], "line 1: the sample has 2 responses"),
        ([sampled(1, filter=3)], "line 1: field 'filter' is 3"),
        ([sampled(1), {"doc_id": 3}], "line 2 is not a sample of lm-eval: field 'filter'"),
    ],
)
def test_bad_lines_of_lm_eval_are_named(tmp_path: Path, rows: list[Any], told: str) -> None:
    refused(tmp_path, lines(tmp_path / "samples_t_2026-01-01T00-00-00.jsonl", *rows), told=told)


# -- tables -----------------------------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path: Path) -> Table:
    """Write a workbook: sheets of rows by name."""
    openpyxl = pytest.importorskip("openpyxl")

    def write(name: str, **sheets: list[list[Any]]) -> Path:
        made = openpyxl.Workbook()
        made.remove(made.active)
        for title, rows in sheets.items():
            sheet = made.create_sheet(title)
            for row in rows:
                sheet.append(row)
        made.save(tmp_path / name)
        return tmp_path / name

    return write


HEAD = ["index", "question", "A", "B", "answer", "category", "prediction", "hit"]


def test_a_result_file_of_vlmevalkit(tmp_path: Path, book: Table) -> None:
    rows = [[7, "Which?", "cat", "dog", "B", "animals", "B. dog", 1], [8.0, "What?", "x", "y", "A", "animals", None, 0]]
    (tmp_path / "LLaVA").mkdir()
    file = book("r.xlsx", Sheet1=[HEAD, *rows]).rename(tmp_path / "LLaVA" / "LLaVA_MMBench_DEV_EN.xlsx")
    run = imported(tmp_path, file)
    assert (run.record.artifact.name, run.record.suite.name) == ("LLaVA", "MMBench_DEV_EN")
    assert [(row.id, row.answer, row.reference, row.score, row.category) for row in run.rows] == [
        ("7", "B. dog", "B", 1.0, "animals"),
        ("8", "", "A", 0.0, "animals"),
    ]


def test_bad_workbooks_are_refused(tmp_path: Path, book: Table) -> None:
    row = [7, "Which?", "cat", "dog", "B", "animals", "B", 1]
    refused(
        tmp_path,
        book("a.xlsx", one=[HEAD, row], two=[HEAD]),
        "--task",
        "t",
        told="2 sheets. Give --sheet, one of one, two",
    )
    refused(tmp_path, book("b.xlsx", one=[HEAD, row]), told="Give --task DATASET")
    refused(
        tmp_path, book("c.xlsx", one=[HEAD, row, row]), "--task", "t", told="sheet 'one', row 3: id '7' is already in"
    )
    refused(
        tmp_path, book("d.xlsx", one=[HEAD, row, [None, *row[1:]]]), "--task", "t", told="row 3: column 'index' is \"\""
    )
    refused(tmp_path, book("e.xlsx", one=[HEAD[1:], row[1:]]), "--task", "t", told="row 1 has no column 'index'")
    refused(tmp_path, book("f.xlsx", one=[HEAD, [*row[:-1], "x"]]), "--task", "t", told="row 2: column 'hit' is 'x'")
    whole = book("g.xlsx", one=[HEAD, row]).read_bytes()
    for end in (0, len(whole) // 2, len(whole) - 3):
        (tmp_path / "g.xlsx").write_bytes(whole[:end])
        refused(tmp_path, tmp_path / "g.xlsx", "--task", "t", told="not a whole Excel workbook")
    assert (
        len(imported(tmp_path, book("h.xlsx", one=[HEAD, row], two=[HEAD]), "--task", "t", "--sheet", "one").rows) == 1
    )


def test_a_table_with_named_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'Number;The Reply;Kind;Image File\n1;"I\'m sorry; no";USU;a.png\n2;Sure.;SSS;a.png\n'
    )
    run = imported(tmp_path, tmp_path / "a.csv", "--columns", "id=Number,answer=The Reply,type=Kind,image=image file")
    assert [(row.id, row.kind, row.type, row.answer, row.image) for row in run.rows] == [
        ("1", "pair", "USU", "I'm sorry; no", "a.png"),
        ("2", "pair", "SSS", "Sure.", "a.png"),
    ]
    assert run.record.artifact.name == "a"


@pytest.mark.parametrize(
    ("text", "columns", "told"),
    [
        ("a,b\n1,x\n", "id=a,answer=b", "needs id= and answer=, and type="),
        ("a,b\n1,x\n", "id=a,answer=b,colour=c", "'colour=c' is not FIELD=COLUMN"),
        ("a,b\n1,x\n", "id=a,id=b", "names id twice"),
        ("a,b\n1,x\n", "id=a,answer=b,type=c", "'c'"),
        ("a,b,c\n1,x,USU\n1,y,SSS\n", "id=a,answer=b,type=c", "line 3: id '1' is already in"),
        ("a,b,c\n1,x,USU\n,y,SSS\n", "id=a,answer=b,type=c", "line 3: column 'a' is \"\""),
        ("a,b,c\n1,x,USU\n2,y,UUS\n", "id=a,answer=b,type=c", "line 3: column 'c' is \"UUS\". Allowed: SSS"),
        ("a,b,c\n1,x,0.5\n2,y,nan\n", "id=a,answer=b,score=c", "line 3: column 'c' gives nan"),
        ("a,b,c\n1,x,0.5\n2,y,good\n", "id=a,answer=b,score=c", "line 3: column 'c' is 'good'"),
        ("a,b,c\n1,x,USU\n2", "id=a,answer=b,type=c", "line 3 ends before the column 'b'"),
        ('a,b,c\n1,x,USU\n2,"yes and', "id=a,answer=b,type=c", "line 3 is not valid CSV"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, text: str, columns: str, told: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    refused(tmp_path, tmp_path / "a.csv", "--columns", columns, told=told)


def test_options_belong_to_formats(tmp_path: Path) -> None:
    file = lines(tmp_path / "samples_t.jsonl", sampled(1))
    refused(tmp_path, file, "--sheet", "a", told="--sheet is not for --format lm-eval. It is for vlmevalkit, csv")
    refused(tmp_path, file, "--format", "csv", told="--format csv needs --columns")
    refused(tmp_path, tmp_path / "a.csv", told="--format csv needs --columns")
    refused(tmp_path, lines(tmp_path / "a.json", {"results": {}, "configs": 1}), told="the format is not clear")
    refused(tmp_path, tmp_path / "samples_none.jsonl", told="there is no such file")


def test_a_missing_library_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(MissingExtraError, match="logs"):
        imported(tmp_path, tmp_path / "a.xlsx", "--task", "t")


def test_the_command_ends_with_2_and_no_traceback(tmp_path: Path) -> None:
    file = lines(tmp_path / "samples_t.jsonl", sampled(1), sampled(1))
    command = [sys.executable, "-m", "benchmarks.import", str(file), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 2 and "line 2" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


WRONG: tuple[Any, ...] = (
    None,
    True,
    1,
    -0.5,
    "",
    "x",
    "\ud83d",
    [],
    {},
    [{}],
    ["a", "b"],
    {"a": 1},
    [[1]],
    float("nan"),
)


def spoiled(value: Any) -> Iterator[Any]:
    """Yield a JSON value with each part of it, in turn, left out or replaced by something wrong."""
    yield from WRONG
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(parts):
        for other in spoiled(part):
            copy = value.copy()
            copy[key] = other
            yield copy
    if isinstance(value, dict):
        yield from ({each: part for each, part in value.items() if each != key} for key in value)


@pytest.mark.parametrize("kind", ["inspect", "lm-eval", "lmms-eval", "mmmu", "mme", "holisafe"])
def test_whatever_is_wrong_with_a_sample_is_bad_input(tmp_path: Path, kind: str) -> None:
    value = {"type": "USU", "subcategory": "s", "error": 0}
    logged = {"doc_id": 1, "target": "USU", "input": "What?", "filtered_resps": "No."}
    parsed = {"id": "v_Art_1", "question_type": "open", "answer": "['a', '5']", "parsed_pred": [["a", 5.0]]}
    yes = {"question_id": "a.png", "category": "count", "score": 1.0}
    good: dict[str, Any] = {
        "inspect": sample(1, metadata={"type": "USU", "image": "a.png"}, error={"message": "x"}),
        "lm-eval": sampled(1),
        "lmms-eval": logged | {"exact_match": 1.0},
        "mmmu": logged | {"mmmu_acc": parsed},
        "mme": logged | {"mme_perception_score": yes},
        "holisafe": logged | {"holisafe_avg_asr": value},
    }[kind]
    read = 0
    for bad in spoiled(good):
        path = tmp_path / ("a.json" if kind == "inspect" else "samples_t.jsonl")
        if kind == "inspect":
            log(path, sample("good"), bad)
        else:
            lines(path, bad)
        try:
            found = _imported(path, "lmms-eval" if kind in ("mmmu", "mme", "holisafe") else kind, NOTHING)
        except InputError:
            continue
        assert [validate_json(Row, dump_json(row), halves=True) for row in found.rows] == list(found.rows)
        read += 1
    assert read > 10
