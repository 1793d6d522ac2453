"""A run as a Parquet table: a row a sample, a column a field and judge; ``run.json`` is in the file's metadata."""

from __future__ import annotations

from typing import Any

from benchmarks.runs.exporting.judged import scores_of
from benchmarks.runs.record import Row, Run
from safevlm.errors import MissingExtraError
from safevlm.files.json_file import dump_json, without_halves

__all__ = ["RECORD_KEY", "parquet"]

RECORD_KEY = b"safevlm.run"
NUMBERS = {"label": "int64", "score": "float64", "logged_score": "float64", "ms": "float64"}


def parquet(run: Run) -> bytes:
    """Return the file. Columns are the rows' fields, and ``judge_<name>``: 1 where that judge found an answer right.

    Half of a surrogate pair, which Parquet's UTF-8 cannot hold, becomes U+FFFD.

    Raises MissingExtraError without pyarrow.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet as writer
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "logs", "writing Parquet files") from error
    columns: dict[str, Any] = {}
    for name in Row.model_fields:
        kind = pa.list_(pa.float64()) if name == "probs" else getattr(pa, NUMBERS.get(name, "string"))()
        columns[name] = pa.array([_cell(getattr(row, name)) for row in run.rows], kind)
    for name, scores in scores_of(run).items():
        if name != "score":
            columns[f"judge_{name}"] = pa.array([scores.get(row.id) for row in run.rows], pa.float64())
    table = pa.table(columns).replace_schema_metadata({RECORD_KEY: dump_json(run.record)})
    stream = pa.BufferOutputStream()
    writer.write_table(table, stream)
    content: bytes = stream.getvalue().to_pybytes()
    return content


def _cell(value: Any) -> Any:
    return without_halves(value) if isinstance(value, str) else value
