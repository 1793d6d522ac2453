"""How far judges agree with each other, and with people who labelled a sample.

*Positive* is what is counted: an answer that did not do what its pair asks for (``ok`` is False).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from calibration.labelled.rows import file_bytes, rows_of
from calibration.labelled.tables import TABLE_SUFFIXES, Columns, cleaned, truth
from safevlm.errors import InputError, MissingExtraError
from safevlm.files.json_file import first_problem

__all__ = ["Agreement", "Quality", "agreement", "judge_quality", "read_labels"]

COLUMNS = Columns(needed=(("id",), ("ok",)))
_EXAMPLE = 'A line is {"id": "17", "ok": true}.'


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two judges on the ``n`` rows that both scored.

    ``kappa`` is Cohen's (Educational and Psychological Measurement 20, 1960, 37-46); None where it is undefined: no
    rows, or both judges said one and the same thing of all of them. ``agreement`` is the share scored alike.
    """

    kappa: float | None
    agreement: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A judge against labelled rows: what Rogan and Gladen's correction needs.

    Sensitivity is true_positive / positive_labelled, specificity true_negative / negative_labelled. Rows without a
    score of the judge are not counted.
    """

    true_positive: int
    positive_labelled: int
    true_negative: int
    negative_labelled: int


def agreement(first: Sequence[bool | None], other: Sequence[bool | None]) -> Agreement:
    """Compare two judges' scores of the same rows, in the same order; None is unscored.

    Raises InputError when there are not as many of one as of the other.
    """
    if len(first) != len(other):
        raise InputError(f"scores of {len(first)} and {len(other)} rows cannot be compared. Give both for all rows.")
    both = [(one, two) for one, two in zip(first, other, strict=True) if one is not None and two is not None]
    if not both:
        return Agreement(kappa=None, agreement=None, n=0)
    alike = sum(one == two for one, two in both) / len(both)
    if len({score for pair in both for score in pair}) < 2:
        return Agreement(kappa=None, agreement=alike, n=len(both))
    try:
        from sklearn.metrics import cohen_kappa_score
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "report", "comparing judges") from error
    kappa = float(cohen_kappa_score([one for one, _ in both], [two for _, two in both]))
    return Agreement(kappa=kappa, agreement=alike, n=len(both))


class _Label(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: Annotated[StrictStr, Field(min_length=1)] | StrictInt
    ok: StrictBool


def read_labels(path: Path) -> Mapping[str, bool]:
    """Read a calibration sample that people labelled: ``{"id": …, "ok": true}`` a line, or a table with these columns.

    Ids are those of the run record.

    Raises InputError, with the line's number, for a file that cannot be read, another key or type, a repeated id, or
    no line at all.
    """
    labels: dict[str, bool] = {}
    stands: dict[str, str] = {}
    for where, row in rows_of(path, file_bytes(path, "labels"), COLUMNS, what="labels"):
        try:
            label = _Label.model_validate(_as_stated(row, path))
        except ValidationError as error:
            raise InputError(f"{where}: {first_problem(error)}. {_EXAMPLE}") from error
        name = str(label.id)
        if name in labels:
            raise InputError(f"{where}: id {name!r} is already on {stands[name].removeprefix(f'{path}, ')}.")
        labels[name], stands[name] = label.ok, where
    if not labels:
        raise InputError(f"{path} holds no labels. {_EXAMPLE}")
    return labels


def _as_stated(row: Any, path: Path) -> Any:
    """Return a table's row as JSON would state it: ``id`` and ``ok`` alone, the latter true or false."""
    if path.suffix.lower() not in TABLE_SUFFIXES:
        return row
    said = truth(row.get("ok"))
    return {"id": cleaned(row["id"]), "ok": row.get("ok") if said is None else said}


def judge_quality(labels: Mapping[str, bool], scores: Mapping[str, bool | None]) -> Quality:
    """Count where a judge's scores, by id, say of labelled rows what people said."""
    both = [(label, scores[name]) for name, label in labels.items() if scores.get(name) is not None]
    return Quality(
        true_positive=sum(not label and not score for label, score in both),
        positive_labelled=sum(not label for label, _ in both),
        true_negative=sum(label and bool(score) for label, score in both),
        negative_labelled=sum(label for label, _ in both),
    )
