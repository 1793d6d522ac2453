"""lmms-eval's per-sample logs (``--log_samples``), for MMMU, MMStar, VizWiz, MME-RealWorld and any task alike.

lmms-eval 0.7.3 asks for torchvision, whose builds bring another torch than the one pinned here, so its runs are made in
an environment of its own and their logs, ``<date>_samples_<task>.jsonl``, are read here. Its logs have one object a
sample: ``doc_id``, ``input`` (the question as it was put), ``target``, ``filtered_resps``, and what the task's
``process_results`` returned under the metrics' names: a number, or an object that holds a ``score`` or what the score
is computed from. Its ``doc_hash`` hashes images by their place in memory, so two runs never agree in it: not used.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.runs.importing.imported import imported_run
from benchmarks.runs.importing.lines import numbered_rows
from benchmarks.runs.record import Row, Run, SuiteRecord
from safevlm.errors import InputError

__all__ = ["import_lmms_eval"]

NOT_METRICS = frozenset(
    {"doc_id", "doc_hash", "target", "input", "resps", "filtered_resps", "token_counts", "input_media", "submission"}
)
PREFERRED = ("mmmu_acc", "mme_realworld_score", "average", "exact_match")
"""Metrics of the paper's four tasks; looked for before a sample's only other metric."""
LOG_NAME = re.compile(r"samples_(?P<task>[^/]+)\.jsonl(\.gz)?$")


def import_lmms_eval(path: Path, *, name: str, task: str | None = None, metric: str | None = None) -> Run:
    """Return a log's samples as a run of questions with scores; ``name`` is the model's.

    ``task`` is read off the file's name and ``metric`` found by itself where they are not given.

    Raises InputError, with the line, for a sample without an id or score, scores outside 0..1, an id that comes
    twice, or metrics of which none stands out.
    """
    told = LOG_NAME.search(path.name)
    task = task or (told["task"] if told else None)
    if task is None:
        raise InputError(f"{path.name}: the file name does not contain the task (…_samples_<task>.jsonl). Give --task.")
    rows: list[Row] = []
    asked: list[str] = []
    seen: dict[str, str] = {}
    for where, raw in numbered_rows(path):
        if not isinstance(raw, Mapping) or "doc_id" not in raw:
            raise InputError(f"{where} is not an lmms-eval sample: field 'doc_id' is missing.")
        metric = metric or _metric(raw, where)
        if metric not in raw:
            raise InputError(f"{where} has no metric {metric!r}. It has {', '.join(_metrics(raw)) or 'none'}.")
        row = Row(
            id=str(raw["doc_id"]),
            kind="question",
            reference=str(raw.get("target")),
            answer=_text(raw.get("filtered_resps")),
            score=_score(raw[metric], f"{where}: metric {metric!r}"),
        )
        if row.id in seen:
            raise InputError(f"{where}: doc_id {row.id} is already in {seen[row.id]}.")
        seen[row.id] = where
        rows.append(row)
        asked.append(json.dumps(raw.get("input"), sort_keys=True))
    if not rows:
        raise InputError(f"{path} holds no samples.")
    content = sorted((row.id, row.reference, text) for row, text in zip(rows, asked, strict=True))
    digest = hashlib.sha256(json.dumps([metric, content]).encode()).hexdigest()
    return imported_run(path, name, SuiteRecord(name=task, sha256=digest, rows=len(rows)), rows)


def _metrics(raw: Mapping[str, Any]) -> list[str]:
    return [key for key, value in raw.items() if key not in NOT_METRICS and _kind(value) is not None]


def _metric(raw: Mapping[str, Any], where: str) -> str:
    there = _metrics(raw)
    chosen = [name for name in PREFERRED if name in there][:1] or there
    if len(chosen) != 1:
        raise InputError(
            f"{where}: the metric is not clear. Give --metric, one of {', '.join(there) or '(it has none)'}."
        )
    return chosen[0]


def _kind(value: Any) -> Callable[[Any], float] | None:
    """Return what makes a score of a metric's value: a number, or one of the forms that tasks log."""
    if isinstance(value, (int, float)):
        return float
    if not isinstance(value, Mapping):
        return None
    if isinstance(value.get("score"), (int, float)):
        return lambda logged: float(logged["score"])
    if "parsed_pred" in value and "answer" in value:
        return _mmmu
    if "pred_answer" in value and "answer" in value:
        return lambda logged: float(str(logged["pred_answer"]).strip().lower() == str(logged["answer"]).strip().lower())
    return None


def _score(value: Any, where: str) -> float:
    kind = _kind(value)
    if kind is None:
        raise InputError(f"{where} is {json.dumps(value, default=str)[:120]}: it must be a number or a scored object.")
    score = kind(value)
    if not 0 <= score <= 1:  # false for NaN, too
        raise InputError(f"{where} gives {score}, but scores must be 0 to 1. Give another --metric.")
    return score


def _mmmu(logged: Mapping[str, Any]) -> float:
    """Score MMMU's parsed answer: the letter; for open questions a number or phrase among the right ones."""
    predicted, answer = logged["parsed_pred"], logged["answer"]
    first = predicted[0] if isinstance(predicted, list) and predicted else predicted
    if logged.get("question_type", "multiple-choice") == "multiple-choice":
        return float(str(first) == str(answer))
    right = _listed(answer)
    candidates = first if isinstance(first, list) else [first]
    numbers = {value for value in map(_number, right) if value is not None}
    phrases = [str(value).strip().lower() for value in right]
    return float(
        any(
            _number(candidate) in numbers
            if _number(candidate) is not None
            else any(phrase in str(candidate).lower() for phrase in phrases)
            for candidate in candidates
        )
    )


def _listed(answer: Any) -> list[Any]:
    """Return the right answers, which are logged as one text, a list, or a list written as text."""
    if isinstance(answer, str) and answer.startswith("["):
        try:
            answer = ast.literal_eval(answer)
        except (ValueError, SyntaxError):
            return [answer]  # a text that only looks like a list
    return answer if isinstance(answer, list) else [answer]


def _number(value: Any) -> float | None:
    try:
        return round(float(str(value).replace(",", "")), 2)
    except ValueError:
        return None


def _text(responses: Any) -> str | None:
    while isinstance(responses, list):
        if not responses:
            return None
        responses = responses[0]
    return None if responses is None else str(responses)
