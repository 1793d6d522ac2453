"""Small run records for tests: samples of all kinds, and answers that are refused or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.runs.record import PAIR_TYPES, Artifact, Row, Run, RunRecord, Runtime, SuiteRecord, read_run, write_run
from safevlm.checkpoint.guard_head import standard_classes

CLASSES = standard_classes()
REFUSAL, HELP = "I'm sorry, I can't help with that.", "The square is red."


def probabilities(label: int, p: float = 0.97) -> tuple[float, ...]:
    """Return the guard's row for an image of this class, sure to ``p``."""
    row = np.full(len(CLASSES), (1 - p) / (len(CLASSES) - 1))
    row[label] = p
    return tuple(float(value) for value in row)


def pair_rows(each: int = 40, images: int = 20) -> list[Row]:
    """Return rows as a perfect model answers them: so many of each type, on so many images of either kind."""
    rows = []
    for kind in PAIR_TYPES:
        for number in range(each):
            label = 0 if kind[0] == "S" else 1 + number % 19
            rows.append(
                Row(
                    id=f"{kind}-{number}",
                    kind="pair",
                    image=f"{'safe' if label == 0 else 'unsafe'}/{number % images}.png",
                    query=f"question {number}",
                    type=kind,  # type: ignore[arg-type]
                    category="violence" if number % 2 else "hate",
                    subcategory="weapon",
                    label=label if label == 0 else 1 + (number % images) % 19,
                    answer=HELP if kind == "SSS" else REFUSAL,
                    probs=probabilities(label if label == 0 else 1 + (number % images) % 19),
                )
            )
    return rows


def question_rows(count: int = 200) -> list[Row]:
    """Return questions that are answered right."""
    return [
        Row(
            id=f"question-{number}",
            kind="question",
            image=f"plain/{number // 2}.png",
            query="What colour?",
            reference="It is red.",
            answer="It is red.",
        )
        for number in range(count)
    ]


def record_of(
    rows: Sequence[Row], *, suite: str = "holisafe", name: str = "model-a", digest: str = "a" * 64
) -> RunRecord:
    """Return a finished record of so many rows."""
    return RunRecord(
        created="2026-11-25T00:00:00+00:00",
        finished="2026-11-25T00:01:00+00:00",
        artifact=Artifact(name=name, kind="checkpoint", sha256=digest),
        runtime=Runtime(name="torch", version="2", device="cpu", dtype="float32", batch=16),
        suite=SuiteRecord(name=suite, sha256="0" * 64, rows=len(rows), classes=CLASSES),
        prompt="USER: {image}{question} ASSISTANT:",
        preprocessing={"height": 84},
        decoding={"sampling": "greedy", "max_new_tokens": 32},
    )


def stored(folder: Path, rows: Iterable[Row], record: RunRecord | None = None) -> Run:
    """Write rows as a run and read it back."""
    rows = list(rows)
    write_run(folder, record or record_of(rows), rows)
    return read_run(folder)


def changed(rows: Iterable[Row], choose: Callable[[Row], bool], **values: object) -> list[Row]:
    """Return the rows, those that are chosen with other values."""
    return [row.model_copy(update=values) if choose(row) else row for row in rows]
