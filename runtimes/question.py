"""What is wrong with a question before any model has seen it: the checks that every language runner shares."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from models.errors import QuestionError

__all__ = ["MOST_CONTEXT", "Reader", "check_plain", "prompt_tokens"]

MOST_CONTEXT = 4096
"""Tokens of a prompt with its answer, by default: memory grows with what a model could read, not with what it needs."""
CONTROL = re.compile(r"<[^<>\s]+>")


class _Prompt(Protocol):
    """The pieces of a prompt that are named here; of :class:`models.family.PromptFormat` or a manifest's own."""

    @property
    def before_image(self) -> str: ...
    @property
    def image_token(self) -> str: ...
    @property
    def after_image(self) -> str: ...
    @property
    def after_question(self) -> str: ...
    @property
    def end_of_turn(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How a runner reads questions.

    ``before`` counts the prompt's tokens up to the image and those of the image; ``longest`` are the most bytes that
    one token stands for; ``control`` are the ids of tokens that are no text.
    """

    prompt: _Prompt
    tokens: Callable[[str], Sequence[int]]
    name: Callable[[int], str]
    control: Collection[int]
    before: int
    image_tokens: int
    longest: int
    context: int


def check_plain(question: str) -> None:
    """Raise QuestionError for a question that no model could be asked."""
    if all(unicodedata.category(letter) in ("Zs", "Zl", "Zp", "Cc", "Cf") for letter in question):
        raise QuestionError("the question is empty: ask something about the image in words.")
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise QuestionError(
            f"the question holds half a character (a lone surrogate, U+{ord(question[error.start]):04X}) at place "
            f"{error.start}: send whole characters."
        ) from None


def prompt_tokens(reader: Reader, question: str, max_new_tokens: int | None) -> int:
    """Return how many tokens the prompt has with its image.

    Raises QuestionError for a control token in the question, and for a prompt that leaves no room for
    ``max_new_tokens`` (None: for one); a text of any length is refused quickly.
    """
    room = reader.context - reader.before - (1 if max_new_tokens is None else max_new_tokens)
    if room < 1:
        raise _too_long(reader, reader.before, max_new_tokens)
    size = len(question.encode("utf-8"))
    if size > room * reader.longest:
        raise _too_long(reader, reader.before + size // reader.longest, max_new_tokens, at_least=True)
    prompt = reader.prompt
    pieces = (prompt.before_image, prompt.after_image, prompt.after_question, prompt.end_of_turn)
    named = {prompt.image_token, *CONTROL.findall("".join(pieces))}
    ids = reader.tokens(question)
    found = next((name for name in sorted(named) if name in question), None)
    if found is None:
        found = next((reader.name(token) for token in ids if token in reader.control), None)
    if found is not None:
        what = "stands for the image" if found == prompt.image_token else "is a control token of this model"
        raise QuestionError(f"the question contains {found!r}, which {what}: leave it out.")
    after = len(reader.tokens(prompt.after_image + question + prompt.after_question))
    if after > room:
        raise _too_long(reader, reader.before + after, max_new_tokens)
    return reader.before + after


def _too_long(reader: Reader, tokens: int, max_new_tokens: int | None, *, at_least: bool = False) -> QuestionError:
    asked = "" if max_new_tokens is None else f", and {max_new_tokens} more were asked for"
    return QuestionError(
        f"this model's context is {reader.context} tokens; the prompt has {'more than ' if at_least else ''}{tokens} "
        f"({reader.image_tokens} of them for the image){asked}. Shorten the question or ask for a shorter answer.",
        code="context_length_exceeded",
    )
