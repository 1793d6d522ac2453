"""lmms-eval's per-sample logs (``--log_samples``), for MMMU, MMStar, VizWiz, MME, HoliSafe and any task alike.

lmms-eval 0.7.3 asks for torchvision, whose builds bring another torch than the one pinned here, so its runs are made in
an environment of its own and their logs, ``<date>_samples_<task>.jsonl``, are read here. Its logs have one object a
sample: ``doc_id``, ``input`` (the question as it was put), ``target``, ``filtered_resps``, and what the task's
``process_results`` returned under the metrics' names: a number, or an object that holds a ``score`` or what the score
is computed from. Its ``doc_hash`` hashes images by their place in memory, so two runs never agree in it: not used.

``holisafe`` and ``holisafe_llm_judge`` become pairs, for our judges; what their own judge said is the rows' score.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.runs.importing import mmmu
from benchmarks.runs.importing.imported import answers_in, distinct, id_of, imported_run, share_of, suite_of, type_of
from benchmarks.runs.importing.lines import numbered_rows
from benchmarks.runs.record import Row, Run, SuiteRecord
from safevlm.errors import InputError
from safevlm.files.json_file import parse_json
from safevlm.files.regular_file import read_regular

__all__ = ["import_lmms_eval"]

NOT_METRICS = frozenset(
    {"doc_id", "doc_hash", "target", "input", "resps", "filtered_resps", "token_counts", "input_media", "submission"}
)
PREFERRED = ("mmmu_acc", "mme_realworld_score", "average", "exact_match")
"""Metrics of the paper's four tasks; looked for before a sample's only other metric."""
SPLIT = ("mme_perception_score", "mme_cognition_score")
"""MME's metrics: each sample has the one of its category, and all samples are the benchmark."""
HOLISAFE = "holisafe_avg_asr"
"""In each sample of HoliSafe's tasks, an object with ``type``, ``subcategory`` and ``error``: 1 where its judge found
that the answer did not do what the pair asks for."""
LOG_NAME = re.compile(r"(?P<run>.*)samples_(?P<task>[^/]+)\.jsonl(\.gz)?$")
MAX_RESULTS = 2**26
SAME = 1e-4
"""Two figures are one: logs round to five decimals."""

Logged = tuple[str, Mapping[str, Any]]


def import_lmms_eval(path: Path, *, name: str, task: str | None = None, metric: str | None = None) -> Run:
    """Return a log's samples as a run: pairs of HoliSafe's tasks, otherwise questions with scores; ``name`` is the
    model's. ``task`` is read off the file's name and ``metric`` found by itself where they are not given.

    Raises InputError, with the line, for a sample without an id or score, scores outside 0..1, an id that comes
    twice, several responses a sample, or metrics of which none is the obvious one.
    """
    found = LOG_NAME.search(path.name)
    task = task or (found["task"] if found else None)
    if task is None:
        raise InputError(f"{path.name}: the file name does not contain the task (…_samples_<task>.jsonl). Give --task.")
    logged = [(where, _sample(raw, where)) for where, raw in numbered_rows(path)]
    if any(HOLISAFE in raw for _, raw in logged):
        if metric not in (None, HOLISAFE):
            raise InputError(f"{path} holds HoliSafe's pairs, which judges score. Leave out --metric.")
        return _pairs(path, name, task, logged)
    return _questions(path, name, task, metric, logged)


def _sample(raw: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping) or "doc_id" not in raw:
        raise InputError(f"{where} is not an lmms-eval sample: field 'doc_id' is missing.")
    responses = answers_in(raw.get("filtered_resps"))
    if responses > 1:
        raise InputError(
            f"{where}: the sample has {responses} responses, and one answer a sample is read. Give the log of a "
            "run without repeats."
        )
    return raw


# -- HoliSafe ---------------------------------------------------------------------------------------------


def _pairs(path: Path, name: str, task: str, logged: Sequence[Logged]) -> Run:
    rows = distinct(((where, _pair(raw, where)) for where, raw in logged), path)
    named = any(row.image is not None for row in rows)
    notes = [] if named else ["The log does not name images: rows of one image are counted as independent."]
    return imported_run(path, name, suite_of("holisafe", rows), rows, scored_by=f"lmms-eval, task {task}", notes=notes)


def _pair(raw: Mapping[str, Any], where: str) -> Row:
    value = raw.get(HOLISAFE)
    if not isinstance(value, Mapping) or value.get("error") not in (0, 1):
        shown = json.dumps(value, default=str)[:120]
        raise InputError(f"{where}: {HOLISAFE} is {shown}; it must hold type, subcategory and error, which is 0 or 1.")
    kind = type_of(value.get("type"), where, f"{HOLISAFE}.type")
    if raw.get("target", kind) != kind:
        raise InputError(
            f"{where}: target is {raw['target']!r}, but the type is {kind}. Give the log as it was written."
        )
    media = raw.get("input_media")
    return Row(
        id=id_of(raw["doc_id"], where, "doc_id"),
        kind="pair",
        type=kind,
        subcategory=_word(value, "subcategory"),
        image=media[0] if isinstance(media, list) and media and isinstance(media[0], str) else None,
        query=_asked(raw),
        answer=_text(raw.get("filtered_resps")) or "",
        score=1.0 - value["error"],
    )


# -- questions --------------------------------------------------------------------------------------------


def _questions(path: Path, name: str, task: str, metric: str | None, logged: Sequence[Logged]) -> Run:
    collapsed = _collapsed(logged)
    found: list[tuple[str, Row]] = []
    asked: list[str] = []
    left_out = 0
    for where, raw in logged:
        own = _own_metric(raw, metric)
        if own is None and metric in SPLIT:
            left_out += 1
            continue
        metric = metric or (None if own in SPLIT else _metric(raw, where))
        found.append((where, _question(raw, own or metric or "", where, collapsed)))
        asked.append(json.dumps(raw.get("input"), sort_keys=True))
    if not found and left_out:
        raise InputError(f"{path}: no sample has the metric {metric!r}. Give another --metric.")
    rows = distinct(found, path)
    content = sorted((row.id, row.reference, text) for row, text in zip(rows, asked, strict=True))
    metric = metric or "mme_score"
    digest = hashlib.sha256(json.dumps([metric, content]).encode()).hexdigest()
    suite = SuiteRecord(name=task, sha256=digest, rows=len(rows))
    notes = [*_differing(rows), *_aggregate(path, task, metric, rows)]
    if left_out:
        notes.append(f"{left_out} samples have no {metric} and are left out.")
    return imported_run(path, name, suite, rows, scored_by=f"lmms-eval, task {task}, metric {metric}", notes=notes)


def _question(raw: Mapping[str, Any], metric: str, where: str, collapsed: bool) -> Row:
    if metric not in raw or metric in NOT_METRICS:
        raise InputError(f"{where} has no metric {metric!r}. It has {', '.join(_metrics(raw)) or 'none'}.")
    value, what = raw[metric], f"metric {metric!r}"
    kind = _kind(value)
    if kind is None:
        shown = json.dumps(value, default=str)[:120]
        raise InputError(f"{where}: {what} is {shown}: it must be a number or a scored object.")
    score = share_of(kind(value), where, what)
    counted = mmmu.figure_of_log(value, collapsed=collapsed) if mmmu.is_mmmu(value) else score
    return Row(
        id=id_of(raw["doc_id"], where, "doc_id"),
        kind="question",
        query=_asked(raw),
        image=_word(value, "question_id") if metric in SPLIT else None,
        category=_word(value, "category") if metric in SPLIT else None,
        reference=None if raw.get("target") is None else str(raw["target"]),
        answer=_text(raw.get("filtered_resps")),
        score=score,
        logged_score=counted if counted != score else None,
    )


def _word(value: Any, key: str) -> str | None:
    word = value.get(key) if isinstance(value, Mapping) else None
    return word if isinstance(word, str) else None


def _own_metric(raw: Mapping[str, Any], metric: str | None) -> str | None:
    """Return which of MME's two metrics a sample has, where either or this one is asked for."""
    return next((each for each in SPLIT if each in raw and metric in (None, each)), None)


def _collapsed(logged: Sequence[Logged]) -> bool:
    """Say whether a log is of the time when MMMU's candidates became one text: its letters are in lists already."""
    values = [raw["mmmu_acc"] for _, raw in logged if mmmu.is_mmmu(raw.get("mmmu_acc"))]
    letters = [value for value in values if mmmu.is_multiple_choice(value)]
    return any(isinstance(value["parsed_pred"], list) for value in letters)


def _differing(rows: Sequence[Row]) -> Iterator[str]:
    """Say which rows the log itself counts otherwise, and why."""
    for figure, told in ((0.0, "right"), (1.0, "wrong")):
        differ = [row.id for row in rows if row.logged_score == figure]
        if differ:
            shown = ", ".join(differ[:5]) + (f" and {len(differ) - 5} more" if len(differ) > 5 else "")
            yield (
                f"{len(differ)} open answers are {told} by MMMU's rules and not in the log's own figure: lmms-eval "
                "takes a list of golds that is written as text for one phrase, and compares candidates that were "
                f"logged as one text letter by letter (doc_id {shown})."
            )


def _aggregate(path: Path, task: str, metric: str, rows: Sequence[Row]) -> Iterator[str]:
    """Say where the figure in the log's own results file is not the mean of what is imported."""
    run = LOG_NAME.search(path.name)
    file = path.with_name(f"{run['run']}results.json") if run else path
    if run is None or not file.is_file():
        return
    try:
        results = parse_json(read_regular(file, MAX_RESULTS), rows=True, halves=True)["results"][task]
        figures = {key.partition(",")[0]: float(value) for key, value in results.items() if _is_figure(key, value)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield f"{file.name} cannot be read, so the log's own figure is not compared."
        return
    mean = sum(row.score or 0.0 for row in rows) / len(rows)
    for name in (metric,) if metric in figures else SPLIT if metric == "mme_score" else ():
        figure = figures.get(name)
        if figure is not None and min(abs(mean - figure), abs(mean - figure / 100)) > SAME:
            why = "lmms-eval does not average the samples' scores"
            if name in SPLIT:
                why = "lmms-eval adds the percentages of right answers and of images with both answers right"
            elif any(row.logged_score is not None for row in rows):
                why = "it counts the open answers named above otherwise"
            yield f"The log's own {name} is {figure:g}; the mean of the imported scores is {mean:.4g}: {why}."


def _is_figure(key: str, value: Any) -> bool:
    return "stderr" not in key and isinstance(value, (int, float)) and not isinstance(value, bool)


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
    if mmmu.is_mmmu(value):
        return mmmu.score
    if "pred_answer" in value and "answer" in value:
        return lambda logged: float(str(logged["pred_answer"]).strip().lower() == str(logged["answer"]).strip().lower())
    return None


def _asked(raw: Mapping[str, Any]) -> str | None:
    return raw["input"] if isinstance(raw.get("input"), str) else None


def _text(responses: Any) -> str | None:
    while isinstance(responses, list):
        if not responses:
            return None
        responses = responses[0]
    return None if responses is None else str(responses)
