"""Logs in the forms that lmms-eval 0.7.3's tasks give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runs.importing.lmms_eval import import_lmms_eval
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
    with pytest.raises(InputError, match="has no metric 'bleu'"):
        import_lmms_eval(written(tmp_path, "t", rows), name="m", metric="bleu")
    (tmp_path / "log.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(InputError, match="Give --task"):
        import_lmms_eval(tmp_path / "log.jsonl", name="m", metric="f1")
