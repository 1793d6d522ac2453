"""Is any of what a model is calibrated on part of a suite that it will be judged by?

Looked for are the suite's images (identical, saved anew, resized or slightly cropped, see
:mod:`calibration.sets.same_picture`), its questions (equal when case, punctuation and blanks are put aside), and the
file names of HoliSafe-Bench, which are known by their hashes even where the benchmark is not at hand.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from calibration.holisafe_mini.suite import build_suite
from calibration.sets.conversations import Conversations, Drawn, Sample, read_conversations
from calibration.sets.same_picture import PictureIndex
from safevlm.errors import InputError

__all__ = ["Evaluation", "Leak", "Leakage", "built_in_evaluation", "find_leaks", "normalised", "read_evaluation"]

FEWEST_WORDS = 4
"""Shorter questions (“What is this?”) are asked by everybody."""
MOST_PICTURES = 2
"""A question that a suite asks about more images than this is a template, and no sign of the suite."""
NAME_PARTS = 3
NAME_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A suite that calibration must keep clear of; ``samples`` are its questions and images."""

    name: str
    sha256: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class Leak:
    """A calibration sample that a suite holds, and how that was seen."""

    sample: str
    """Its place in the calibration source."""
    suite: str
    signal: str
    """``pixels``, ``picture``, ``text`` or ``name``."""
    detail: str


@dataclass(frozen=True, kw_only=True)
class Leakage:
    """What was checked, against what, and what was found."""

    checked: int
    suites: tuple[dict[str, Any], ...]
    leaks: tuple[Leak, ...] = field(default=())

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.leaks

    def record(self) -> dict[str, Any]:
        """Return what ``compression.json`` keeps."""
        return {
            "clean": self.clean,
            "samples_checked": self.checked,
            "suites": list(self.suites),
            "leaks": [vars(leak) for leak in self.leaks],
        }

    def refusal(self) -> str:
        """Return why a run must not begin."""
        shown = "; ".join(f"{leak.sample}: {leak.detail}" for leak in self.leaks[:3])
        more = f"; and {len(self.leaks) - 3} more" if len(self.leaks) > 3 else ""
        samples = len({leak.sample for leak in self.leaks})
        return (
            f"{samples} of {self.checked} calibration samples belong to an evaluation suite ({shown}{more}). A model "
            "calibrated on its own test looks better than it is. Remove them, or give --allow-leakage: the artifact "
            "then records it, and every report about it is ANOMALOUS."
        )


def built_in_evaluation() -> Evaluation:
    """Return the test part of holisafe-mini."""
    suite = build_suite("test")
    scenes = {picture.path: picture.scene for picture in suite.pictures}
    rows = [item.row for item in (*suite.pairs, *suite.questions)]
    return Evaluation(
        name="holisafe-mini, test part",
        sha256=hashlib.sha256(json.dumps([dict(row) for row in rows]).encode()).hexdigest(),
        samples=tuple(
            Sample(
                kind="safe",
                question=row["query"],
                answer=None,
                image=Drawn(scenes[row["image"]]),
                name=row["image"],
                where=f"{row['type']} {row['id']}",
            )
            for row in rows
        ),
    )


def read_evaluation(path: Path, images: Path | None = None) -> Evaluation:
    """Read a suite as calibration files are read. Raises those of ``read_conversations``."""
    read: Conversations = read_conversations(path, images, kinds=False)
    return Evaluation(name=path.name, sha256=str(read.sha256), samples=read.samples)


def find_leaks(
    samples: Sequence[Sample],
    evaluations: Iterable[Evaluation],
    *,
    report: Callable[[str], None] = lambda _: None,
) -> Leakage:
    """Look for every sample in every suite.

    Raises ImageFileError for an image that cannot be opened, of the samples or of a suite.
    """
    leaks = [
        Leak(sample=sample.where, suite="HoliSafe-Bench", signal="name", detail=f"{sample.name} is one of its images")
        for sample in samples
        if _is_bench_name(sample.name)
    ]
    suites = []
    for evaluation in evaluations:
        report(f"searching {evaluation.name} for the samples")
        pictures = _pictures(evaluation.samples)
        questions = _questions(evaluation.samples)
        suites.append(
            {
                "name": evaluation.name,
                "sha256": evaluation.sha256,
                "pictures": len(pictures),
                "questions": len(questions),
            }
        )
        shown = pictures if any(sample.image is not None for sample in samples) else []
        index, names = PictureIndex(_opened(sample) for sample in shown), [sample.name for sample in pictures]
        for sample in samples:
            leaks += _in_suite(sample, evaluation.name, index, names, questions)
    return Leakage(checked=len(samples), suites=tuple(suites), leaks=tuple(leaks))


def normalised(text: str) -> str:
    """Return words in lower case with single blanks, without punctuation and accents' encodings."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(sign if sign.isalnum() else " " for sign in folded).split())


def _in_suite(
    sample: Sample, suite: str, index: PictureIndex, names: Sequence[str], questions: dict[str, str]
) -> list[Leak]:
    found = []
    picture = sample.picture()
    match = None if picture is None else index.find(picture)
    if match is not None:
        detail = f"its image is {names[match.item]} of {suite} ({match.detail})"
        found.append(Leak(sample=sample.where, suite=suite, signal=match.signal, detail=detail))
    where = questions.get(normalised(sample.question))
    if where is not None:
        detail = f"its question is the same as that of {where} in {suite}"
        found.append(Leak(sample=sample.where, suite=suite, signal="text", detail=detail))
    return found


def _pictures(samples: Iterable[Sample]) -> list[Sample]:
    """Return one sample of each image."""
    return list({sample.name: sample for sample in samples if sample.image is not None}.values())


def _questions(samples: Iterable[Sample]) -> dict[str, str]:
    """Return the questions that tell a suite by themselves, normalised, each with its first place."""
    about: dict[str, set[str]] = defaultdict(set)
    places: dict[str, str] = {}
    for sample in samples:
        if isinstance(sample.image, Drawn):  # holisafe-mini asks all its parts the same templates
            continue
        question = normalised(sample.question)
        about[question].add(sample.name)
        places.setdefault(question, sample.where)
    return {
        question: places[question]
        for question, pictures in about.items()
        if len(question.split()) >= FEWEST_WORDS and len(pictures) <= MOST_PICTURES
    }


def _opened(sample: Sample) -> Image.Image:
    picture = sample.picture()
    if picture is None:
        raise InputError(f"{sample.where} has no image")
    return picture


def _is_bench_name(name: str) -> bool:
    tail = "/".join(name.replace("\\", "/").lower().split("/")[-NAME_PARTS:])
    return hashlib.sha256(tail.encode()).hexdigest()[:NAME_DIGITS] in _bench_names()


@cache
def _bench_names() -> frozenset[str]:
    text = resources.files("calibration.sets").joinpath("holisafe_bench_names.json").read_text(encoding="utf-8")
    return frozenset(json.loads(text)["names"].split())
