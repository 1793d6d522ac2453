"""The built-in suite: the test part of holisafe-mini, pairs in the five types and question answering."""

from __future__ import annotations

import hashlib
from functools import partial

from benchmarks.runs.record import Row
from benchmarks.suites.suite import Suite
from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import Answered, Picture, build_suite
from safevlm.checkpoint.guard_head import standard_classes

__all__ = ["PAIRS", "QUESTIONS", "holisafe_mini"]

PAIRS, QUESTIONS = 2400, 600


def holisafe_mini(*, pairs: int = PAIRS, questions: int = QUESTIONS) -> Suite:
    """Build the suite; images are drawn when they are asked for."""
    built = build_suite("test", pairs=pairs, questions=questions)
    rows = [_row(item) for item in (*built.pairs, *built.questions)]
    asked = {row.image for row in rows}
    shown = [picture for picture in built.pictures if picture.path in asked]
    return Suite(
        name="holisafe-mini",
        rows=tuple(rows),
        pictures={picture.path: partial(draw, picture.scene) for picture in shown},
        fingerprints={picture.path: _fingerprint(picture) for picture in shown},
        classes=standard_classes(),
        max_new_tokens=32,
    )


def _row(item: Answered) -> Row:
    raw = item.row
    pair = raw["type"] != "QA"
    return Row(
        id=f"{'pair' if pair else 'question'}-{raw['id']}",
        kind="pair" if pair else "question",
        image=raw["image"],
        query=raw["query"],
        type=raw["type"] if pair else None,
        category=raw["category"],
        subcategory=raw["subcategory"],
        label=raw["image_safety_label"],
        reference=item.answer,
    )


def _fingerprint(picture: Picture) -> str:
    """Hash what decides an image; drawing all of them to hash pixels would take longer than answering."""
    return hashlib.sha256(repr(picture.scene).encode()).hexdigest()
