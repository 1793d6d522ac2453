"""Logs in the forms that lmms-eval 0.7.3's tasks give them.

``logs/*_samples_{mmmu_val,mme}.jsonl`` hold what the tasks' own ``process_results`` (lmms-eval 0.7.3) returned for
made-up questions and answers, in the fields that its log writer keeps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison.comparing import compare
from benchmarks.comparison.measured import Comparison
from benchmarks.judges.select import open_judge
from benchmarks.runs.importing.lmms_eval import import_lmms_eval
from benchmarks.runs.record import PAIR_TYPES, Run, read_run, write_run
from safevlm.errors import InputError


def sample(number: int, **metrics: Any) -> dict[str, Any]:
    base = {"doc_id": number, "target": "B", "filtered_resps": [f"answer {number}"], "token_counts": [None]}
    return base | {"doc_hash": str(id(metrics)), "input": f"What is {number}?"} | metrics


def mmmu(parsed: Any, answer: Any, kind: str = "multiple-choice") -> dict[str, Any]:
    logged = {"id": "x", "subdomain": "Art", "question_type": kind, "answer": answer, "parsed_pred": [parsed]}
    return {"mmmu_acc": logged, "mmmu_acc_pass_at_k": logged, "submission": {"x": "B"}}


def world(predicted: str, answer: str) -> dict[str, Any]:
    return {
        "mme_realworld_score": {"question_id": 1, "category": "Perception", "pred_answer": predicted, "answer": answer}
    }


def star(score: float) -> dict[str, Any]:
    each = {"question_id": 1, "l2_category": "a", "score": score}
    return {"coarse perception": each, "average": each}


def written(folder: Path, task: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"20260101_000000_samples_{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("task", "metrics", "scores"),
    [
        ("mmstar", [star(1.0), star(0.0)], [1.0, 0.0]),
        ("vizwiz_vqa_val", [{"exact_match": 0.6}, {"exact_match": 1}], [0.6, 1.0]),
        ("mmerealworld", [world("B", "B"), world("", "C")], [1.0, 0.0]),
        ("mmmu_val", [mmmu("B", "B"), mmmu("A", "B")], [1.0, 0.0]),
        (
            "mmmu_val",
            [mmmu([24.0, "24.0"], "24", "open"), mmmu(["no idea"], "['seven', '7']", "open")],
            [1.0, 0.0],
        ),
    ],
)
def test_each_task_s_log_becomes_scores(
    tmp_path: Path, task: str, metrics: list[dict[str, Any]], scores: list[float]
) -> None:
    rows = [sample(number, **each) for number, each in enumerate(metrics)]
    run = import_lmms_eval(written(tmp_path, task, rows), name="m")
    assert [row.score for row in run.rows] == scores
    assert run.record.suite.name == task
    assert run.rows[0].answer == "answer 0"


def test_two_models_logs_are_of_one_suite_only_for_the_same_questions(tmp_path: Path) -> None:
    def digest(name: str, rows: list[dict[str, Any]]) -> str:
        (tmp_path / name).mkdir()
        return import_lmms_eval(written(tmp_path / name, "mmstar", rows), name=name).record.suite.sha256

    rows = [sample(0, **star(1)), sample(1, **star(0))]
    first = digest("a", rows)
    assert digest("b", [sample(1, **star(1)), sample(0, **star(1))]) == first
    assert digest("c", [rows[0], rows[1] | {"input": "Who?"}]) != first


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (sample(0, cider=3.5), "gives 3.5, but scores must be 0 to 1"),
        (sample(0, f1=0.5, em=1), r"the metric is not clear\. Give --metric, one of f1, em"),
        (sample(0), r"it has none"),
        ({"target": "B"}, "field 'doc_id' is missing"),
        (sample(0, exact_match=float("nan")), "gives nan"),
        (sample(0, f1=1) | {"filtered_resps": [["a", "b"]]}, "has 2 responses"),
    ],
)
def test_bad_logs_are_told(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        import_lmms_eval(written(tmp_path, "task", [row]), name="m")


def test_a_named_metric_and_repeats(tmp_path: Path) -> None:
    rows = [sample(0, f1=0.5, em=1), sample(1, f1=0.25, em=0)]
    assert [row.score for row in import_lmms_eval(written(tmp_path, "t", rows), name="m", metric="f1").rows] == [
        0.5,
        0.25,
    ]
    with pytest.raises(InputError, match="line 2: id '0' is already in"):
        import_lmms_eval(written(tmp_path, "t", [rows[0], rows[0]]), name="m", metric="f1")
    for metric in ("bleu", "doc_id"):
        with pytest.raises(InputError, match=f"has no metric '{metric}'"):
            import_lmms_eval(written(tmp_path, "t", rows), name="m", metric=metric)
    with pytest.raises(InputError, match="Leave out --metric"):
        import_lmms_eval(written(tmp_path, "t", [holisafe(0, "USU", "No.", 0)]), name="m", metric="f1")
    (tmp_path / "log.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(InputError, match="Give --task"):
        import_lmms_eval(tmp_path / "log.jsonl", name="m", metric="f1")


# -- HoliSafe ---------------------------------------------------------------------------------------------


def holisafe(number: int, kind: str, said: str, error: int, **more: Any) -> dict[str, Any]:
    """Return a line as lmms-eval 0.7.3 logs it: every metric holds the same record."""
    value = {"type": kind, "subcategory": "gender", "error": error}
    names = ("avg_asr", "rr", "asr_ssu", "asr_usu", "asr_uuu", "asr_suu")
    metrics = {f"holisafe_{name}": dict(value) for name in names}
    return sample(number, **metrics) | {"target": kind, "filtered_resps": said} | more


def stored(folder: Path, run: Run) -> Run:
    write_run(folder, run.record, run.rows)
    return read_run(folder)


def test_holisafes_own_log_becomes_pairs_for_every_judge(tmp_path: Path) -> None:
    rows = [holisafe(n, kind, "I cannot help.", int(kind == "SSS")) for n, kind in enumerate(PAIR_TYPES * 4)]
    rows.append(holisafe(99, "USU", "Sure.", 0))  # a language model's word, which string matching does not share
    run = import_lmms_eval(written(tmp_path, "holisafe_llm_judge", rows), name="m")
    assert [(row.kind, row.type, row.subcategory) for row in run.rows[:2]] == [
        ("pair", "SSS", "gender"),
        ("pair", "SSU", "gender"),
    ]
    assert run.rows[0].query == "What is 0?" and run.record.suite.name == "holisafe"
    assert any("agree on 20 of 21 pairs; they differ on 99" in note for note in run.record.notes)
    one, other = stored(tmp_path / "one", run), stored(tmp_path / "other", run)
    scores = {name: open_judge(name, one.folder).score(one.rows) for name in ("string", "log")}
    assert [each.ok for each in scores["log"]] == [row.score == 1.0 for row in run.rows]
    assert [a.ok == b.ok for a, b in zip(scores["string"], scores["log"], strict=True)] == [True] * 20 + [False]
    findings = compare(Comparison(baseline=[one], candidate=[other], judges=("string", "log")))
    assert {line.judge for line in findings.lines if line.judge} == {"string", "log"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (holisafe(0, "UUS", "x", 0), 'holisafe_avg_asr.type is "UUS". Allowed: SSS'),
        (holisafe(0, "USU", "x", 2), "error, which is 0 or 1"),
        (holisafe(0, "USU", "x", 0, target="SSS"), "target is 'SSS', but the type is USU"),
        (holisafe(0, "USU", "x", 0, holisafe_avg_asr=None), "it must hold type, subcategory and error"),
        (holisafe(0, "USU", "x", 0, filtered_resps=["a", "b"]), "the sample has 2 responses"),
        (holisafe(0, "USU", "x", 0, doc_id=""), 'doc_id is ""'),
        (holisafe(0, "USU", "x", 0, doc_id=None), "doc_id is null"),
    ],
)
def test_bad_lines_of_holisafe_are_named(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    good = holisafe(7, "USU", "No.", 1)
    with pytest.raises(InputError, match=f"line 2: .*{told}"):
        import_lmms_eval(written(tmp_path, "holisafe", [good, row]), name="m")


def test_a_run_without_scores_has_no_judge_of_its_log(tmp_path: Path) -> None:
    run = import_lmms_eval(written(tmp_path, "holisafe", [holisafe(0, "USU", "No.", 0)]), name="m")
    folder = stored(
        tmp_path / "a", Run(folder=Path(), record=run.record.model_copy(update={"scored_by": None}), rows=run.rows)
    ).folder
    with pytest.raises(InputError, match="holds no scores of an imported log"):
        open_judge("log", folder)


# -- MME and MMMU -----------------------------------------------------------------------------------------


LOGS = Path(__file__).parent / "logs"


def test_mmes_two_metrics_are_one_benchmark() -> None:
    file = LOGS / "20261127_120000_samples_mme.jsonl"
    run = import_lmms_eval(file, name="m")
    assert [(row.score, row.image, row.category) for row in run.rows] == [
        (1.0, "code_reasoning/20.png", "code_reasoning"),
        (0.0, "code_reasoning/20.png", "code_reasoning"),
        (1.0, "existence/1.jpg", "existence"),
        (1.0, "existence/1.jpg", "existence"),
    ]
    part = import_lmms_eval(file, name="m", metric="mme_cognition_score")
    assert len(part.rows) == 2 and "2 samples have no mme_cognition_score" in part.record.notes[0]


def test_mmmus_open_answers_follow_its_rules() -> None:
    """The figures are those of MMMU's own eval_open, given the golds as lists."""
    run = import_lmms_eval(LOGS / "20261127_120000_samples_mmmu_val.jsonl", name="m")
    right = [0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1]
    assert [row.score for row in run.rows] == right
    assert [row.id for row in run.rows if row.logged_score is not None] == ["6", "7"]  # golds: ['seven', '7']
    assert "2 open answers are right by MMMU's rules and not in the log's own figure" in run.record.notes[0]


@pytest.mark.parametrize(
    ("gold", "candidates", "right"),
    [
        ("5", ["15 cm"], False),
        ("5", ["15 cm", 15.0], False),
        ("5", ["it is 5", 5.0], True),
        ("5", ["5.0"], True),
        ("5.004", [5.0], True),
        ("1,000", [1000.0], True),
        ("[1, 2]", ["[1, 2]"], True),
        ("x", ["exact"], False),
        ("x", [" x", "x "], True),
        ("x", ["it is x"], True),
        ("['six', '6']", [6.0], True),
        (["six", "6"], ["sixty"], True),
        ("apple pie", ["an apple pie"], True),
    ],
)
def test_every_form_of_candidates_is_scored_alike(
    tmp_path: Path, gold: Any, candidates: list[Any], right: bool
) -> None:
    for form in ([candidates], candidates):  # a list a response, and the list alone
        logged = {"id": "x", "question_type": "open", "answer": gold, "parsed_pred": form}
        run = import_lmms_eval(written(tmp_path, "mmmu_val", [sample(0, mmmu_acc=logged)]), name="m")
        assert run.rows[0].score == float(right)


def test_candidates_that_became_one_text_are_scored_and_told(tmp_path: Path) -> None:
    logged = {"id": "x", "question_type": "open", "answer": "24", "parsed_pred": ["24.0"]}
    rows = [sample(0, **mmmu("B", "B")), sample(1, mmmu_acc=logged)]
    file = written(tmp_path, "mmmu_val", rows)
    (tmp_path / "20260101_000000_results.json").write_text(
        json.dumps({"results": {"mmmu_val": {"mmmu_acc,none": 0.5}}})
    )
    run = import_lmms_eval(file, name="m")
    assert [(row.score, row.logged_score) for row in run.rows] == [(1.0, None), (1.0, 0.0)]
    assert "letter by letter (doc_id 1)" in run.record.notes[0]
    assert "own mmmu_acc is 0.5; the mean of the imported scores is 1: it counts" in run.record.notes[1]
    (tmp_path / "20260101_000000_results.json").write_text("{")
    assert "results.json cannot be read" in import_lmms_eval(file, name="m").record.notes[1]
