"""HoliSafe's prediction files: the benchmark's rows with a model's answer in ``prediction``."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from benchmarks.runs.importing.imported import imported_run
from benchmarks.runs.importing.lines import numbered_rows
from benchmarks.runs.record import Row, Run, SuiteRecord
from benchmarks.suites.holisafe import row_of
from benchmarks.suites.suite import without_contradictions
from safevlm.checkpoint.guard_head import standard_classes
from safevlm.errors import InputError

__all__ = ["import_predictions"]

NAME_END = re.compile(r"(\.predictions)?\.jsonl?(\.gz)?$")


def import_predictions(path: Path, *, name: str | None = None) -> Run:
    """Return published answers as a run; ``name`` is the model's, by default the file's.

    Prompt, preprocessing and decoding are not known. Raises InputError, with the line and the field, for a row that
    is not one of the benchmark's with a ``prediction``, or an id that comes twice.
    """
    rows: list[Row] = []
    seen: dict[str, str] = {}
    for where, raw in numbered_rows(path):
        row = row_of(raw, where, query_needed=False)
        answer = raw.get("prediction")
        if not isinstance(answer, str):
            raise InputError(f"{where}: field 'prediction' is {answer!r}; it must be the model's answer, a string.")
        if row.id in seen:
            raise InputError(f"{where}: id {row.id} is already in {seen[row.id]}.")
        seen[row.id] = where
        rows.append(row.model_copy(update={"answer": answer}))
    if not rows:
        raise InputError(f"{path} holds no rows.")
    kept, left_out = without_contradictions(rows)
    content = [row.model_dump(mode="json", exclude={"answer", "query"}) for row in sorted(kept, key=lambda row: row.id)]
    suite = SuiteRecord(
        name="holisafe",
        sha256=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        rows=len(rows),
        classes=standard_classes(),
        left_out=left_out,
    )
    return imported_run(path, name or NAME_END.sub("", path.name), suite, kept)
