"""The contract of every suite: rows to be answered, and the image that each is about."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from benchmarks.runs.record import Row, SuiteRecord
from calibration.labelled.corruptions import corruption_of
from safevlm.errors import InputError
from safevlm.files.json_file import dump_json

__all__ = ["Suite", "one_row_an_image"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Suite:
    """Rows without answers.

    ``pictures`` opens each image by its name; ``fingerprints`` are SHA-256 of their content. ``left_out`` names images
    whose labels contradict each other: their rows carry no label.
    """

    name: str
    rows: tuple[Row, ...]
    pictures: Mapping[str, Callable[[], Image.Image]]
    fingerprints: Mapping[str, str]
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    max_new_tokens: int = 256
    """How long answers may become, in tokens, unless said otherwise."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise InputError(f"suite {self.name} is empty, so there is nothing to run.")

    def picture(self, row: Row) -> Image.Image:
        """Return the image of a row, corrupted as the row says. Raises ImageFileError for one that cannot be read."""
        assert row.image is not None
        picture = self.pictures[row.image]()
        return picture if row.under is None else corruption_of(row.under)(picture)

    def record(self) -> SuiteRecord:
        """Return what a run record says of the suite; its hash covers rows and images, not their order."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for row in sorted(self.rows, key=lambda row: row.id):
            digest.update(dump_json(row) + f"\0{self.fingerprints[row.image or '']}\0".encode())
        return SuiteRecord(
            name=self.name,
            sha256=digest.hexdigest(),
            rows=len(self.rows),
            classes=self.classes,
            left_out=self.left_out,
        )

    def limited(self, rows: int | None) -> Suite:
        """Return at most so many rows, their kinds and types in proportion; the same for the same number."""
        if rows is None or rows >= len(self.rows):
            return self
        if rows < 1:
            raise InputError(f"--limit {rows} is too small. Give at least 1.")
        groups: dict[tuple[str, str | None], list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[row.kind, row.type].append(row)
        generator = np.random.default_rng(0)
        share = rows / len(self.rows)
        kept: set[str] = set()
        for group in groups.values():
            wanted = max(1, round(share * len(group)))
            kept |= {group[i].id for i in generator.choice(len(group), wanted, replace=False)}
        return replace(self, rows=tuple(row for row in self.rows if row.id in kept))


def one_row_an_image(suite: Suite, name: str) -> Suite:
    """Return the guard suite of another one: each image once, those with contradictory labels left out."""
    seen: dict[str, Row] = {}
    for row in suite.rows:
        if row.label is not None and row.image is not None and row.image not in seen:
            seen[row.image] = Row(
                id=row.image,
                kind="image",
                image=row.image,
                category=row.category,
                subcategory=row.subcategory,
                label=row.label,
            )
    return replace(suite, name=name, rows=tuple(seen.values()))


def without_contradictions(rows: Sequence[Row]) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """Take the label from rows whose image has another one elsewhere; return all rows, and those images' names."""
    labels: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        if row.image is not None and row.label is not None:
            labels[row.image].add(row.label)
    torn = {image for image, found in labels.items() if len(found) > 1}
    kept = tuple(row.model_copy(update={"label": None}) if row.image in torn else row for row in rows)
    return kept, tuple(sorted(torn))
