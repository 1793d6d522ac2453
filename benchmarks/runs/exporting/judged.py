"""What the judges say of a run's rows, for files that hold rows and scores together."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.judges.exact import question_score
from benchmarks.judges.select import open_judge
from benchmarks.judges.stored import stored_judges
from benchmarks.runs.record import Run

__all__ = ["scores_of"]


def scores_of(run: Run) -> Mapping[str, Mapping[str, float]]:
    """Return, by judge, the scores of rows by id: 1 where an answer did what its pair asks for, otherwise 0; ``score``
    is how right the answer to a question is. Rows without a score are left out.
    """
    pairs = [row for row in run.rows if row.kind == "pair" and row.type is not None]
    found: dict[str, dict[str, float]] = {}
    built_in = "exact" if run.record.suite.name == "holisafe-mini" else "string"
    names = (built_in, *(("log",) if run.record.scored_by is not None else ()), *stored_judges(run.folder))
    for name in names if pairs else ():
        scores = open_judge(name, run.folder).score(pairs)
        found[name] = {row.id: float(each.ok) for row, each in zip(pairs, scores, strict=True) if each.ok is not None}
    questions = {row.id: question_score(row) for row in run.rows if row.kind == "question"}
    if questions:
        found["score"] = {name: score for name, score in questions.items() if score is not None}
    return found
