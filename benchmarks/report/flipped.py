"""The samples that changed, as the page shows them: by kind and type, worse before better.

A sample that several judges saw change in the same way is shown once, with what each of them said.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.comparison.findings import Flip
from benchmarks.report.text import visible
from benchmarks.runs.record import PAIR_TYPES

__all__ = ["Changed", "Group", "Sample", "Said", "changed_samples", "choices", "group_samples"]

MOST = 3_000
"""Samples that one page holds; worse ones come first, report.json holds all."""
TEXT_BUDGET = 2_500_000
"""Characters of all samples together, so that the page stays a few MB."""
PICTURE_BUDGET = 24_000_000
"""Characters of all images together; what comes later says that there was no room."""
CUTS = (8_000, 4_000, 2_000, 1_000, 500, 250)
"""Characters a text is cut to when all of them would not fit."""

KINDS = {"pair": "Pairs", "question": "Questions", "image": "Guard, images"}
GLOSSES = {
    "SSU": "safe image, safe question, unsafe together",
    "USU": "unsafe image, safe question",
    "UUU": "unsafe image, unsafe question",
    "SUU": "safe image, unsafe question",
    "SSS": "harmless pair",
    "question": "right and wrong answers",
    "image": "blocked in one run only",
}
SIDES = {
    "unsafe": ("refused", "answered"),
    "safe": ("answered", "refused"),
    "question": ("right", "wrong"),
    "image": ("rightly judged", "wrongly judged"),
}
"""What a good and a bad score of a sample mean."""
DIRECTIONS = {
    "worse": "worse",
    "better": "better",
    "answered": "newly answered",
    "refused": "newly refused",
    "wrong": "newly wrong",
    "right": "newly right",
    "wrongly judged": "newly misjudged by the guard",
    "rightly judged": "newly judged right by the guard",
}
"""Ways to change, by what the sample became."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a judge said of both answers, or which phrase matched; empty where it said nothing."""

    judge: str
    before: str
    after: str


@dataclass(frozen=True)
class Sample:
    """A sample and direction, with every flip that says so: one a judge."""

    flips: tuple[Flip, ...]

    @property
    def first(self) -> Flip:
        """The flip whose texts are shown."""
        return self.flips[0]

    @property
    def judges(self) -> tuple[str, ...]:
        """The judges that saw it change, each once."""
        return tuple(dict.fromkeys(flip.judge for flip in self.flips if flip.judge is not None))


@dataclass(frozen=True, kw_only=True)
class Changed:
    """One sample; its texts are harmless and may be cut (``cut``). ``picture`` is a data URL, or why there is none.

    ``name`` and ``suite_name`` are JSON in ASCII: the id and suite as the run record has them, for a label; ``name``
    is empty where there is nothing to label.
    """

    id: str
    name: str
    suite: str
    suite_name: str
    kind: str
    type: str
    worse: bool
    became: str
    sides: tuple[str, str]
    judges: tuple[str, ...]
    said: tuple[Said, ...]
    category: str
    image: str
    query: str
    before: str
    after: str
    cut: bool
    picture: str = ""
    picture_missing: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """All shown samples of a kind and type."""

    key: str
    title: str
    gloss: str
    worse: tuple[Changed, ...]
    better: tuple[Changed, ...]


def changed_samples(flips: Sequence[Flip]) -> list[Sample]:
    """Return each sample and direction once; worse first, otherwise in order."""
    found: dict[tuple[str, str | None, str, bool], list[Flip]] = {}
    for flip in flips:
        found.setdefault((flip.kind, flip.suite, flip.id, flip.worse), []).append(flip)
    return sorted((Sample(tuple(own)) for own in found.values()), key=lambda sample: not sample.first.worse)


def group_samples(samples: Sequence[Sample], pictures: Mapping[str, tuple[str, str]]) -> tuple[tuple[Group, ...], int]:
    """Return groups in the report's order, and how many samples had no room.

    ``pictures`` gives, by image name, a data URL and why there is none (one of them empty).
    """
    shown = samples[:MOST]
    longest = _longest(shown)
    groups: dict[str, list[Changed]] = {}
    room = PICTURE_BUDGET
    for sample in shown:
        url, missing = pictures.get(sample.first.image or "", ("", ""))
        room -= len(url)
        if url and room < 0:
            url, missing = "", "the page holds no more images"
        groups.setdefault(_key(sample.first), []).append(_changed(sample, longest, url, missing))
    return tuple(_group(key, groups[key]) for key in sorted(groups, key=_place)), len(samples) - len(shown)


def choices(groups: Iterable[Group]) -> dict[str, list[tuple[str, str]]]:
    """Return what the page can be filtered by: for each field the values that occur, with their names.

    A field in which all samples agree is left out.
    """
    samples = [each for group in groups for each in (*group.worse, *group.better)]
    kinds = {each.kind for each in samples}
    types = {each.type for each in samples}
    became = {each.became for each in samples} | {"worse" if each.worse else "better" for each in samples}
    found = {
        "kind": [(kind, name) for kind, name in KINDS.items() if kind in kinds],
        "type": [(type_, type_) for type_ in sorted(types - {""}, key=lambda name: _place(f"pair/{name}"))],
        "category": [(name, name) for name in sorted({each.category for each in samples} - {""})],
        "way": [(way, name) for way, name in DIRECTIONS.items() if way in became],
        "judge": [(name, name) for name in sorted({name for each in samples for name in each.judges})],
        "suite": [(name, name) for name in sorted({each.suite for each in samples} - {""})],
    }
    return {field: values for field, values in found.items() if len(values) > 1}


def _changed(sample: Sample, longest: int, picture: str, missing: str) -> Changed:
    flip = sample.first
    texts = [visible(text or "") for text in (flip.query, flip.before, flip.after)]
    short = [_cut(text, longest) for text in texts]
    good, bad = SIDES[flip.kind if flip.kind != "pair" else "safe" if flip.type == "SSS" else "unsafe"]
    sides = (good, bad) if flip.worse else (bad, good)
    return Changed(
        id=visible(flip.id),
        name=json.dumps(flip.id) if flip.kind == "pair" and flip.id else "",
        suite=visible(flip.suite or ""),
        suite_name=json.dumps(flip.suite) if flip.suite else "",
        kind=flip.kind,
        type=visible(flip.type or ""),
        worse=flip.worse,
        became=sides[1],
        sides=sides,
        judges=tuple(visible(name) for name in sample.judges),
        said=tuple(_said(each, longest) for each in sample.flips if each.why_before or each.why_after),
        category=visible(flip.category or ""),
        image=visible(flip.image or ""),
        query=short[0],
        before=short[1],
        after=short[2],
        cut=short != texts,
        picture=picture,
        picture_missing=visible(missing),
    )


def _said(flip: Flip, longest: int) -> Said:
    before, after = (_cut(visible(text or ""), longest) for text in (flip.why_before, flip.why_after))
    return Said(judge=visible(flip.judge or ""), before=before, after=after)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"


def _group(key: str, samples: Sequence[Changed]) -> Group:
    kind, _, type_ = key.partition("/")
    return Group(
        key=visible(key),
        title=visible(f"{KINDS[kind]}, {type_}" if type_ else KINDS[kind]),
        gloss=GLOSSES.get(type_ or kind, ""),
        worse=tuple(each for each in samples if each.worse),
        better=tuple(each for each in samples if not each.worse),
    )


def _key(flip: Flip) -> str:
    return f"{flip.kind}/{flip.type}" if flip.type else flip.kind


def _place(key: str) -> tuple[int, int, str]:
    """Say where a group stands: pairs in the order of the main table, then questions, then images."""
    kind, _, type_ = key.partition("/")
    types = (*PAIR_TYPES[1:], PAIR_TYPES[0])
    return list(KINDS).index(kind), types.index(type_) if type_ in types else len(types), type_


def _longest(samples: Sequence[Sample]) -> int:
    """Return how long a text may be for all to fit."""
    texts = [text for sample in samples for text in (sample.first.query, sample.first.before, sample.first.after)]
    texts += [text for sample in samples for flip in sample.flips for text in (flip.why_before, flip.why_after)]
    lengths = [len(text) for text in texts if text]
    return next((cut for cut in CUTS if sum(min(length, cut) for length in lengths) <= TEXT_BUDGET), CUTS[-1])
