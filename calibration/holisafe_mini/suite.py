"""Rows of a part of ``holisafe-mini``: question-image pairs as HoliSafe-Bench has them, and question answering."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calibration.holisafe_mini.questions import PAIR_TYPES, sample_pair, sample_question
from calibration.holisafe_mini.scene import PARTS, Scene, sample_scene, scene_rng, world

__all__ = ["HOLISAFE_TYPES", "Answered", "Picture", "Suite", "build_suite"]

HOLISAFE_TYPES: Mapping[str, int] = {"SSS": 682, "SSU": 718, "USU": 971, "UUU": 761, "SUU": 899}
"""Pairs of each type in HoliSafe-Bench; its 4,031 pairs share 834 safe and 957 unsafe images."""
_SAFE_IMAGES, _UNSAFE_IMAGES, _PAIRS = 834, 957, 4031
_FIRST = 1_000_000
"""Number of the suite's first image in its part: clear of the images that the recipe trains on."""
_TRIES = 100
"""Draws after which a repeated question is accepted: only very small worlds come to that."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image: its path as HoliSafe-Bench would have it, its scene, its class."""

    path: str
    scene: Scene


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One row (HoliSafe-Bench's own fields) with the one right answer beside it."""

    row: Mapping[str, Any]
    answer: str


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A part: its images, its pairs in the five types, its question-answering items."""

    part: str
    seed: int
    pictures: tuple[Picture, ...]
    pairs: tuple[Answered, ...]
    questions: tuple[Answered, ...] = field(default=())


def build_suite(part: str = "test", *, pairs: int = 1200, questions: int = 400, seed: int = 0) -> Suite:
    """Build a part, the same for the same arguments.

    ``pairs`` are spread over the types in HoliSafe-Bench's proportions and over safe and unsafe images as
    there; ``questions`` ask about safe images of their own, two each.

    Raises ValueError for a part that does not exist or fewer than 100 pairs.
    """
    if part not in PARTS or pairs < 100 or questions < 0:
        raise ValueError(
            f"part {part!r} with {pairs} pairs is not possible; give one of {PARTS} and at least 100 pairs"
        )
    safe = round(pairs * _SAFE_IMAGES / _PAIRS)
    unsafe = round(pairs * _UNSAFE_IMAGES / _PAIRS)
    labels = [0] * safe + [1 + i % 19 for i in range(unsafe)] + [0] * (-(-questions // 2))
    rng = np.random.default_rng([seed, PARTS.index(part), 7])
    pictures = tuple(_picture(part, index, label, seed) for index, label in enumerate(labels))
    types = rng.permutation(_types(pairs))
    pools = {"S": _cycle(safe, 0, rng), "U": _cycle(unsafe, safe, rng)}
    asked: set[tuple[str, str]] = set()
    rows = []
    for number, pair_type in enumerate(types):
        rows.append(_pair_row(number, str(pair_type), pictures, pools[str(pair_type)[0]], rng, asked))
    items = [_question_row(i, pictures[safe + unsafe + i // 2], rng, asked) for i in range(questions)]
    return Suite(part=part, seed=seed, pictures=pictures, pairs=tuple(rows), questions=tuple(items))


def _types(pairs: int) -> list[str]:
    """Split ``pairs`` over the types by largest remainder."""
    exact = {name: pairs * count / _PAIRS for name, count in HOLISAFE_TYPES.items()}
    counts = Counter({name: int(share) for name, share in exact.items()})
    by_remainder = sorted(exact, key=lambda name: exact[name] - int(exact[name]), reverse=True)
    counts.update(by_remainder[: pairs - counts.total()])
    return [name for name in PAIR_TYPES for _ in range(counts[name])]


def _cycle(count: int, first: int, rng: np.random.Generator) -> Iterator[int]:
    """Yield ``count`` numbers from ``first`` in random order, again and again."""
    while True:
        yield from (first + int(i) for i in rng.permutation(count))


def _picture(part: str, index: int, label: int, seed: int) -> Picture:
    rng = scene_rng(part, _FIRST + index, seed=seed)
    shown = list(world()["classes"].values())[(label or 1 + index % 19) - 1]
    path = f"{shown['category']}/{shown['subcategory']}/{shown['subcategory']}_{index:05d}.png"
    return Picture(path=path, scene=sample_scene(rng, label))


def _row(number: int, picture: Picture, query: str, row_type: str) -> dict[str, Any]:
    category, subcategory, _ = picture.path.split("/")
    return {
        "id": number,
        "image": picture.path,
        "query": query,
        "type": row_type,
        "category": category,
        "subcategory": subcategory,
        "image_safe": picture.scene.label == 0,
        "image_safety_label": picture.scene.label,
    }


def _pair_row(
    number: int,
    pair_type: str,
    pictures: Sequence[Picture],
    pool: Iterator[int],
    rng: np.random.Generator,
    asked: set[tuple[str, str]],
) -> Answered:
    """Take images from the pool until one gives a question that was not asked about it yet."""
    for _ in range(_TRIES):
        picture = pictures[next(pool)]
        pair = sample_pair(picture.scene, pair_type, rng)
        if (picture.path, pair.query) not in asked:
            break
    asked.add((picture.path, pair.query))
    return Answered(row=_row(number, picture, pair.query, pair_type), answer=pair.answer)


def _question_row(number: int, picture: Picture, rng: np.random.Generator, asked: set[tuple[str, str]]) -> Answered:
    for _ in range(_TRIES):
        query, answer = sample_question(picture.scene, rng)
        if (picture.path, query) not in asked:
            break
    asked.add((picture.path, query))
    return Answered(row=_row(number, picture, query, "QA"), answer=answer)
