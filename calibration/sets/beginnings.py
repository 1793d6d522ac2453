"""Where calibration rows begin: with the family's usual prompt, or otherwise.

Rounding that has seen one beginning only ruins text behind any other one: attention sinks and massive activations sit
in the first tokens. So a share of the rows begins with another system text, with none, with an earlier turn, or is a
piece, cut out of the row at any place.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from calibration.answers import Answer
from calibration.sets.conversations import Sample
from safevlm.errors import InputError
from safevlm.network.dialogue import ChatFormat, Turn
from safevlm.network.prompt_tokens import IMAGE, answer_ids, dialogue_ids, text_dialogue_ids, text_ids
from safevlm.network.safe_vlm import SafeVLM

__all__ = [
    "OTHER",
    "USUAL",
    "Beginning",
    "Beginnings",
    "Begun",
    "Writer",
    "begin_otherwise",
    "beginnings_record",
    "system_texts",
]

Beginning: TypeAlias = Literal["usual", "system", "none", "turns", "piece"]
"""The family's usual prompt; another system text; no system text; an earlier turn of another sample; cut anywhere."""
OTHER: tuple[Beginning, ...] = ("piece", "system", "piece", "none", "piece", "turns")
"""How rows that begin otherwise take turns: half of them are pieces."""
TURN = 30
"""Beside the seed, so that rows are chosen otherwise than samples are."""
LEAST = 8
"""Tokens that a piece has at least."""


@dataclass(frozen=True, kw_only=True)
class Beginnings:
    """Which share of the rows begins otherwise than with the family's usual prompt."""

    share: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(
                f"--other-beginnings {self.share} is not allowed. Give a share from 0 to 1; 0.3 is usual, 0 begins "
                "every row with the family's prompt."
            )


USUAL = Beginnings(share=0.0)


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A row's ids and how it begins; ``answer_length`` ids at the end are its answer's, each with one before it.

    ``sample`` is the one whose image is shown, where one is.
    """

    sample: Sample
    beginning: Beginning
    ids: tuple[int, ...]
    answer_length: int
    system: str | None = None


class Writer:
    """Writes samples with any beginning, in the family's chat template; rows are at most ``limit`` ids."""

    def __init__(self, model: SafeVLM, samples: Sequence[Sample], answers: Sequence[Answer | None], limit: int) -> None:
        self._tokenizer, self._chat = model.tokenizer, model.family.chat
        self._samples, self._answers, self.limit = samples, answers, limit
        self._image_tokens = model.prompt_ids("").count(IMAGE)

    def usual(self, place: int) -> Begun:
        """Return a sample as the family's usual prompt begins it, however long."""
        sample = self._samples[place]
        if sample.image is None:
            return self._answered("usual", place, text_ids(self._tokenizer, self._chat.prompt, sample.question))
        return self._begun("usual", place, self._chat, ())

    def otherwise(self, place: int, kind: Beginning, systems: Sequence[str], rng: np.random.Generator) -> Begun | None:
        """Return a sample with another beginning; None where it has none of this kind, or is too long with it."""
        if kind == "piece":
            found = self._piece(self.usual(place), rng)
        elif kind == "system":
            system = systems[int(rng.integers(len(systems)))]
            found = self._begun(kind, place, self._chat, (Turn("system", system),))
            found = replace(found, system=system)
        elif kind == "none":
            bare = replace(self._chat, default_system="")
            found = self._begun(kind, place, bare, ()) if self._chat.default_system else None
        else:
            found = self._second(place, rng)
        return None if found is None or len(found.ids) > self.limit else found

    def _begun(self, kind: Beginning, place: int, chat: ChatFormat, before: Sequence[Turn]) -> Begun:
        sample = self._samples[place]
        turns = (*before, Turn("user", sample.question, image=sample.image is not None))
        if any(turn.image for turn in turns):
            prompt = dialogue_ids(self._tokenizer, chat, turns, self._image_tokens)
        else:
            prompt = text_dialogue_ids(self._tokenizer, chat, turns)
        return self._answered(kind, place, prompt)

    def _answered(self, kind: Beginning, place: int, prompt: Sequence[int]) -> Begun:
        sample, answer = self._samples[place], self._answers[place]
        said: Sequence[int] = ()
        if answer is not None:
            said = answer.ids or answer_ids(self._tokenizer, self._chat.prompt, answer.text)
        return Begun(sample=sample, beginning=kind, ids=(*prompt, *said), answer_length=len(said))

    def _second(self, place: int, rng: np.random.Generator) -> Begun | None:
        """Return a sample behind another one and its answer, of which one at most has an image."""
        own = self._samples[place]
        others = [
            (sample, answer.text)
            for number, (sample, answer) in enumerate(zip(self._samples, self._answers, strict=True))
            if number != place and answer is not None and answer.text.strip()
            if own.image is None or sample.image is None
        ]
        if not others:
            return None
        first, said = others[int(rng.integers(len(others)))]
        before = (Turn("user", first.question, image=first.image is not None), Turn("assistant", said))
        found = self._begun("turns", place, self._chat, before)
        return found if first.image is None else replace(found, sample=first)

    def _piece(self, row: Begun, rng: np.random.Generator) -> Begun | None:
        """Return a row from a random place on, which is not within its image.

        Nothing stands before it, but for the token that the checkpoint's tokenizer begins every text with, if any.
        """
        ids = row.ids
        places = [
            place for place in range(1, len(ids) - LEAST + 1) if not (ids[place] == IMAGE and ids[place - 1] == IMAGE)
        ]
        if not places:
            return None
        at = places[int(rng.integers(len(places)))]
        piece = (*_always_first(self._tokenizer), *ids[at:])
        length = min(row.answer_length, len(ids) - at, len(piece) - 1)
        return replace(row, beginning="piece", ids=piece, answer_length=length)


def begin_otherwise(
    writer: Writer, count: int, beginnings: Beginnings, systems: Sequence[str], seed: int
) -> dict[int, Begun]:
    """Return those of ``count`` rows that begin otherwise; the same for the same seed.

    A row that has no beginning of the kind whose turn it is takes the next kind; one that has none at all stays usual.
    """
    rng = np.random.default_rng((seed, TURN))
    found = {}
    for turn, place in enumerate(rng.permutation(count)[: round(beginnings.share * count)].tolist()):
        for kind in dict.fromkeys(OTHER[turn % len(OTHER) :] + OTHER):
            begun = writer.otherwise(place, kind, systems, rng)
            if begun is not None:
                found[place] = begun
                break
    return found


def system_texts(of: Literal["calibration", "held_out"]) -> tuple[str, ...]:
    """Return system texts to calibrate on, or others that are kept for measuring."""
    return tuple(_system_texts()[of])


class _Row(Protocol):
    @property
    def beginning(self) -> Beginning: ...
    @property
    def system(self) -> str | None: ...


def beginnings_record(rows: Iterable[_Row], beginnings: Beginnings) -> dict[str, Any]:
    """Return how many rows began how, and the system texts that they began with."""
    rows = list(rows)
    return {
        "share": beginnings.share,
        "rows": dict(Counter(row.beginning for row in rows)),
        "system_prompts": dict(sorted(Counter(row.system for row in rows if row.system is not None).items())),
    }


def _always_first(tokenizer: Any) -> tuple[int, ...]:
    first = tokenizer.bos_token_id
    return (first,) if first is not None and tokenizer.encode("a")[:1] == [first] else ()


@cache
def _system_texts() -> dict[str, list[str]]:
    text = resources.files("calibration.sets").joinpath("system_prompts.json").read_text(encoding="utf-8")
    found: dict[str, list[str]] = json.loads(text)
    return found
