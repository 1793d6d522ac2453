"""The samples that changed, as the page shows them: by kind and type, worse before better.

A sample that several judges saw change in the same way is shown once, with their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.comparison.findings import Flip
from benchmarks.report.text import visible
from benchmarks.runs.record import PAIR_TYPES

__all__ = ["Changed", "Group", "changed_samples", "group_samples"]

MOST = 3_000
"""Samples that one page holds; worse ones come first, report.json holds all."""
TEXT_BUDGET = 2_500_000
"""Characters of all samples together, so that the page stays a few MB."""
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
CHANGES = {
    ("unsafe", True): "refused → answered",
    ("unsafe", False): "answered → refused",
    ("safe", True): "answered → refused",
    ("safe", False): "refused → answered",
}


@dataclass(frozen=True, kw_only=True)
class Changed:
    """One sample; its texts are harmless and may be cut (``cut``). ``picture`` is a data URL, or why there is none."""

    id: str
    worse: bool
    what: str
    judges: tuple[str, ...]
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


def changed_samples(flips: Sequence[Flip]) -> list[tuple[Flip, tuple[str, ...]]]:
    """Return each sample and direction once, with the judges that say so; worse first, otherwise in order."""
    found: dict[tuple[str, str, bool], tuple[Flip, list[str]]] = {}
    for flip in flips:
        _, judges = found.setdefault((flip.kind, flip.id, flip.worse), (flip, []))
        if flip.judge is not None and flip.judge not in judges:
            judges.append(flip.judge)
    ordered = sorted(found.values(), key=lambda each: not each[0].worse)
    return [(flip, tuple(judges)) for flip, judges in ordered]


def group_samples(
    samples: Sequence[tuple[Flip, tuple[str, ...]]], pictures: Mapping[str, tuple[str, str]]
) -> tuple[tuple[Group, ...], int]:
    """Return groups in the report's order, and how many samples had no room.

    ``pictures`` gives, by image name, a data URL and why there is none (one of them empty).
    """
    shown = samples[:MOST]
    longest = _longest([flip for flip, _ in shown])
    groups: dict[str, list[Changed]] = {}
    for flip, judges in shown:
        url, missing = pictures.get(flip.image or "", ("", ""))
        groups.setdefault(_key(flip), []).append(_changed(flip, judges, longest, url, missing))
    return tuple(_group(key, groups[key]) for key in sorted(groups, key=_place)), len(samples) - len(shown)


def _changed(flip: Flip, judges: tuple[str, ...], longest: int, picture: str, missing: str) -> Changed:
    texts = [visible(text or "") for text in (flip.query, flip.before, flip.after)]
    short = [text if len(text) <= longest else f"{text[:longest]}…" for text in texts]
    return Changed(
        id=visible(flip.id),
        worse=flip.worse,
        what=_what(flip),
        judges=tuple(visible(name) for name in judges),
        category=visible(flip.category or ""),
        image=visible(flip.image or ""),
        query=short[0],
        before=short[1],
        after=short[2],
        cut=short != texts,
        picture=picture,
        picture_missing=visible(missing),
    )


def _what(flip: Flip) -> str:
    if flip.kind != "pair":
        return "worse" if flip.worse else "better"
    return CHANGES["safe" if flip.type == "SSS" else "unsafe", flip.worse]


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


def _longest(flips: Sequence[Flip]) -> int:
    """Return how long a text may be for all to fit."""
    lengths = [len(text) for flip in flips for text in (flip.query, flip.before, flip.after) if text]
    return next((cut for cut in CUTS if sum(min(length, cut) for length in lengths) <= TEXT_BUDGET), CUTS[-1])
