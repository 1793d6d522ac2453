"""What people say of answers: the file that ``benchmarks.regress --labels`` reads.

::

    {"id": "17", "ok": true}
    {"id": "17", "run": "candidate", "suite": "holisafe", "ok": false}

``ok``: the answer did what its pair asks for. Files of ``benchmarks.labels`` also hold what people need to see, and the
``weight`` of each line: how many answers of its stratum it stands for. ``ok`` null there is not labelled yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from calibration.labelled.rows import file_bytes, rows_of
from calibration.labelled.tables import TABLE_SUFFIXES, Columns, cleaned, truth
from safevlm.errors import InputError
from safevlm.files.json_file import Text, first_problem

__all__ = ["AnswerLabel", "Side", "labelled_twice", "read_labels"]

Side = Literal["baseline", "candidate"]
_OPTIONAL = ("run", "suite", "weight", "stratum", "type", "image", "query", "answer")
COLUMNS = Columns(needed=(("id",), ("ok",)), optional=_OPTIONAL)
_EXAMPLE = 'A line is {"id": "17", "ok": true}.'


class AnswerLabel(BaseModel):
    """One line; ``weight`` is how many answers it stands for, ``answer`` the one that was labelled, where stated."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: Annotated[Text, Field(min_length=1)] | StrictInt
    ok: StrictBool | None
    run: Side = "baseline"
    suite: Text | None = None
    weight: Annotated[float, Field(ge=1e-6, le=1e9)] = 1.0
    stratum: Text | None = None
    type: Text | None = None
    image: Text | None = None
    query: Text | None = None
    answer: Text | None = None


def read_labels(path: Path) -> tuple[tuple[str, AnswerLabel], ...]:
    """Read the lines of a file of labels, JSON Lines or a table, each with its place.

    Raises InputError, with the line's number, for a file that cannot be read, another key or type, one answer that is
    labelled twice, or no label at all.
    """
    found: list[tuple[str, AnswerLabel]] = []
    stands: dict[tuple[str, str, str | None], str] = {}
    for where, row in rows_of(path, file_bytes(path, "labels"), COLUMNS, what="labels", halves=True):
        try:
            label = AnswerLabel.model_validate(_as_stated(row, path))
        except ValidationError as error:
            raise InputError(f"{where}: {first_problem(error)}. {_EXAMPLE}") from error
        key = label.run, str(label.id), label.suite
        if key in stands:
            raise labelled_twice(where, label, stands[key], path)
        stands[key] = where
        found.append((where, label))
    if not any(label.ok is not None for _, label in found):
        raise InputError(f"{path} holds no labels. {_EXAMPLE}")
    return tuple(found)


def labelled_twice(where: str, label: AnswerLabel, before: str, path: Path) -> InputError:
    """Return the error of an answer that another line has labelled before."""
    return InputError(
        f"{where}: id {str(label.id)!r} of the {label.run} is already on {before.removeprefix(f'{path}, ')}. Keep one "
        "of the two lines."
    )


def _as_stated(row: Any, path: Path) -> Any:
    """Return a table's row as JSON would state it; an empty cell is left out, an empty ``ok`` is not labelled."""
    if path.suffix.lower() not in TABLE_SUFFIXES:
        return row
    stated = row.get("ok")
    said = truth(stated)
    if said is None and stated is not None and cleaned(str(stated)):
        said = stated
    kept = {key: row[key] for key in _OPTIONAL if row.get(key) not in (None, "")}
    return {"id": cleaned(row["id"]), "ok": said, **kept}
