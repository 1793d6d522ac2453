"""A run as a log of inspect_ai (``.eval``), for its viewer and its readers: a ZIP file of JSON.

::

    header.json                    what ran, and each judge's share of right answers
    samples/<id>_epoch_1.json      one sample
    summaries.json                 the list that the viewer shows
    _journal/start.json            what ran, as it stood at the start

Written without inspect_ai, whose log reader takes any subset of its fields. Half of a surrogate pair, which its JSON
cannot hold, becomes U+FFFD. An id, which names a file in the log, has its control characters escaped, and is cut where
it is longer than a name may be.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

from benchmarks.judges.pairs import wants_refusal
from benchmarks.runs.exporting.judged import scores_of
from benchmarks.runs.record import Row, Run
from safevlm.errors import InputError
from safevlm.files.json_file import dump_json, without_halves
from safevlm.terminal.printable import one_line

__all__ = ["inspect_log"]

VERSION = 2
"""Of the log's schema, as inspect_ai 0.3 writes it."""
LONGEST_ID = 200
METADATA = ("kind", "type", "image", "under", "category", "subcategory", "label", "probs", "blocked", "ms")


def inspect_log(run: Run) -> bytes:
    """Return the log. Raises InputError for two ids that are one in the form that a log can hold."""
    scores = scores_of(run)
    samples = [_sample(row, run, scores) for row in run.rows]
    ids = [sample["id"] for sample in samples]
    if len(set(ids)) < len(ids):
        raise InputError(f"{run.folder}: two ids are the same in the form that a log can hold. Export to Parquet.")
    start = {"version": VERSION, "eval": _asked(run, ids), "plan": {"name": "plan", "steps": [], "config": {}}}
    status = "success" if run.record.finished is not None else "cancelled"
    header = {**start, "status": status, "results": _results(run, scores), "stats": _stats(run)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("_journal/start.json", _json(start))
        for sample in samples:
            archive.writestr(f"samples/{sample['id']}_epoch_1.json", _json(sample))
        archive.writestr("summaries.json", _json([_summary(sample) for sample in samples]))
        archive.writestr("header.json", _json(header))
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return without_halves(json.dumps(value, ensure_ascii=False, allow_nan=False)).encode()


def _asked(run: Run, ids: list[str]) -> Mapping[str, Any]:
    record = run.record
    name = hashlib.sha256(dump_json(record)).hexdigest()[:22]
    stated = record.model_dump(mode="python", exclude_none=True)
    return {
        "eval_id": name,
        "run_id": name,
        "task_id": name,
        "created": record.created,
        "task": record.suite.name,
        "dataset": {"name": record.suite.name, "samples": len(ids), "sample_ids": ids, "shuffled": False},
        "model": record.artifact.name,
        "config": {"epochs": 1},
        "packages": dict(record.versions),
        "metadata": {"run.json": stated},
    }


def _results(run: Run, scores: Mapping[str, Mapping[str, float]]) -> Mapping[str, Any]:
    found = [
        {
            "name": name,
            "scorer": name,
            "scored_samples": len(values),
            "metrics": {"accuracy": {"name": "accuracy", "value": sum(values.values()) / len(values)}},
        }
        for name, values in scores.items()
        if values
    ]
    answered = sum(row.error is None for row in run.rows)
    return {"total_samples": len(run.rows), "completed_samples": answered, "scores": found}


def _stats(run: Run) -> Mapping[str, Any]:
    return {"started_at": run.record.created, "completed_at": run.record.finished or run.record.created}


def _sample(row: Row, run: Run, scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    target = row.reference or ""
    if row.kind == "pair" and row.type is not None:
        target = "a refusal" if wants_refusal(row) else "an answer"
    asked, said = row.query or "", row.answer or ""
    sample: dict[str, Any] = {
        "id": _id(row),
        "epoch": 1,
        "input": asked,
        "target": target,
        "messages": [{"role": "user", "content": asked, "source": "input"}],
        "output": {"model": run.record.artifact.name, "choices": [], "completion": ""},
        "scores": {name: _score(values[row.id], said) for name, values in scores.items() if row.id in values},
        "metadata": {key: getattr(row, key) for key in METADATA if getattr(row, key) is not None},
    }
    if row.error is not None:
        return sample | {"error": {"message": row.error, "traceback": "", "traceback_ansi": ""}}
    if row.answer is not None or row.blocked is not None:
        message = {"role": "assistant", "content": said, "source": "generate"}
        reason = "stop" if row.blocked is None else "content_filter"
        sample["messages"].append(message)
        sample["output"] |= {"choices": [{"message": message, "stop_reason": reason}], "completion": said}
    return sample


def _id(row: Row) -> str:
    shown = one_line(without_halves(row.id))
    if len(shown) <= LONGEST_ID:
        return shown
    return f"{shown[:LONGEST_ID]}…{hashlib.sha256(row.id.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _score(value: float, said: str) -> Mapping[str, Any]:
    return {"value": {1.0: "C", 0.0: "I"}.get(value, value), "answer": said}


def _summary(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    kept = {key: sample[key] for key in ("id", "epoch", "input", "target", "scores", "metadata")}
    failed = {"error": sample["error"]["message"]} if "error" in sample else {}
    return {**kept, **failed, "completed": True}
