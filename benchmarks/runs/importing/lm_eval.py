"""lm-evaluation-harness' per-sample logs (``--log_samples``): ``samples_<task>_<date>.jsonl``.

One object a sample and filter: ``doc_id``, ``target``, ``arguments`` (what was asked), ``filtered_resps``, ``filter``,
the names of its ``metrics``, and each metric's value under its name. A task with two filters logs each sample twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.runs.importing.imported import answers_in, distinct, id_of, imported_run, number_of, share_of, suite_of
from benchmarks.runs.importing.lines import numbered_rows
from benchmarks.runs.record import Row, Run
from safevlm.errors import InputError

__all__ = ["LOG_NAME", "import_lm_eval"]

LOG_NAME = re.compile(r"samples_(?P<task>.+?)(?P<date>_\d{4}-\d\d-\d\dT[\d.+-]+)?\.jsonl(\.gz)?$")


UNNAMED = "none"
"""lm-eval's name of the filter that does nothing; older logs do not name filters."""


def import_lm_eval(
    path: Path, *, name: str, task: str | None = None, metric: str | None = None, chosen: str | None = None
) -> Run:
    """Return a log's samples under the filter ``chosen`` as questions with scores; ``name`` is the model's.

    Raises InputError, with the line, for a sample without id, filter or metric, several filters or metrics of which
    none was chosen, scores outside 0..1, or an id that comes twice under one filter.
    """
    of_task = LOG_NAME.search(path.name)
    task = task or (of_task["task"] if of_task else None)
    if task is None:
        raise InputError(
            f"{path.name}: the file name does not contain the task (samples_<task>_<date>.jsonl). Give --task."
        )
    found = list(numbered_rows(path))
    named = any(isinstance(raw, Mapping) and "filter" in raw for _, raw in found)
    logged = [(where, _sample(raw, where, named=named)) for where, raw in found]
    filters = list(dict.fromkeys(raw["filter"] for _, raw in logged))
    chosen = _chosen(filters, chosen, path)
    logged = [(where, raw) for where, raw in logged if raw["filter"] == chosen]
    where, first = logged[0]
    metric = _metric(first, metric, where)
    rows = distinct(((where, _row(raw, metric, where)) for where, raw in logged), path)
    scored_by = f"lm-eval, task {task}, filter {chosen}, metric {metric}"
    return imported_run(path, name, suite_of(task, rows, scored_by=scored_by), rows, scored_by=scored_by)


def _sample(raw: Any, where: str, *, named: bool) -> Mapping[str, Any]:
    """Return a sample with the filter's name, which it must hold where any does (``named``)."""
    needed = ("doc_id", "filter") if named else ("doc_id",)
    missing = [key for key in needed if not isinstance(raw, Mapping) or key not in raw]
    if missing:
        raise InputError(f"{where} is not a sample of lm-eval: field {missing[0]!r} is missing.")
    chosen = raw.get("filter", UNNAMED)
    if not isinstance(chosen, str):
        raise InputError(f"{where}: field 'filter' is {chosen!r}; it must be the filter's name.")
    return {**raw, "filter": chosen}


def _chosen(filters: list[str], chosen: str | None, path: Path) -> str:
    if not filters:
        raise InputError(f"{path} holds no samples.")
    if chosen is None and len(filters) > 1:
        raise InputError(f"{path} holds every sample once for each filter. Give --filter, one of {', '.join(filters)}.")
    if chosen is not None and chosen not in filters:
        raise InputError(f"{path} has no filter {chosen!r}. It has {', '.join(filters)}.")
    return filters[0] if chosen is None else chosen


def _metric(raw: Mapping[str, Any], metric: str | None, where: str) -> str:
    named = raw.get("metrics")
    names = [str(each) for each in named] if isinstance(named, list) else list(raw)
    there = [each for each in names if each not in ("doc_id", "filter") and number_of(raw.get(each)) is not None]
    if metric is not None and (metric not in raw or metric in ("doc_id", "filter")):
        raise InputError(f"{where} has no metric {metric!r}. It has {', '.join(there) or 'none'}.")
    if metric is None and len(there) != 1:
        raise InputError(
            f"{where}: the metric is not clear. Give --metric, one of {', '.join(there) or '(it has none)'}."
        )
    return metric or there[0]


def _row(raw: Mapping[str, Any], metric: str, where: str) -> Row:
    if metric not in raw:
        raise InputError(f"{where} has no metric {metric!r}. Give the log as it was written.")
    responses = raw.get("filtered_resps")
    said = answers_in(responses)
    if said > 1:
        raise InputError(
            f"{where}: the sample has {said} responses, and one answer a sample is read. Give --filter, or "
            "the log of a run without repeats."
        )
    answer = responses[0] if isinstance(responses, list) and responses else responses
    return Row(
        id=id_of(raw["doc_id"], where, "doc_id"),
        kind="question",
        query=_asked(raw.get("arguments")),
        reference=None if raw.get("target") is None else str(raw["target"]),
        answer=answer if isinstance(answer, str) else None,  # log-likelihoods of choices are not an answer's text
        score=share_of(raw[metric], where, f"metric {metric!r}"),
    )


def _asked(arguments: Any) -> str | None:
    """Return the prompt: the first argument of the first request, logged as a list or under made-up names."""
    while isinstance(arguments, (list, Mapping)) and arguments:
        arguments = next(iter(arguments.values())) if isinstance(arguments, Mapping) else arguments[0]
    return arguments if isinstance(arguments, str) else None
