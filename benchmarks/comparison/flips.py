"""The samples whose score changed, each with what was said and why it counts as it does."""

from __future__ import annotations

from benchmarks.comparison.averaged import net_changes
from benchmarks.comparison.findings import Flip
from benchmarks.comparison.measured import Measured
from benchmarks.comparison.pairing import Pair
from benchmarks.judges.exact import question_score
from benchmarks.judges.judge import Score
from benchmarks.runs.record import Row

__all__ = ["flips_of"]


def flips_of(found: Measured) -> list[Flip]:
    """Return pairs, by judge, and questions whose score changed."""
    flips = []
    for judged in found.judged:
        for at in net_changes(judged):
            one, other = judged.before[at], judged.after[at]
            why = _why(judged.judge, one), _why(judged.judge, other)
            flips.append(_flip(judged.pairs[at], judged.judge, worse=bool(one.ok), why=why))
    for measured in found.measures:
        if measured.group == "utility":
            bad = zip(measured.pairs, measured.before, measured.after, strict=True)
            flips += [
                _flip(pair, None, worse=bool(one < other), why=(_right(pair.before), _right(pair.after)))
                for pair, one, other in bad
                if one != other
            ]
    return flips


def _why(judge: str, score: Score) -> str:
    return score.why or f"{judge}: {'did' if score.ok else 'did not do'} what the pair asks for"


def _right(row: Row) -> str:
    if row.score is not None:
        return f"imported score {row.score:g}"
    if row.blocked is not None:
        return f"blocked by the gate: {row.blocked}"
    return f"{'the reference' if question_score(row) else 'not the reference'}: “{row.reference}”"


def _flip(pair: Pair, judge: str | None, *, worse: bool, why: tuple[str, str]) -> Flip:
    row = pair.before
    return Flip(
        id=row.id,
        kind=row.kind,
        judge=judge,
        worse=worse,
        type=row.type,
        category=row.category,
        image=row.image,
        query=row.query,
        before=_said(pair.before.answer, pair.before.blocked),
        after=_said(pair.after.answer, pair.after.blocked),
        why_before=why[0],
        why_after=why[1],
        suite=pair.suite,
    )


def _said(answer: str | None, blocked: str | None) -> str | None:
    return f"(blocked by the gate: {blocked})" if blocked is not None else answer
