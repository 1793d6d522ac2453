"""What is wrong with a question or dialogue before any model has seen it: checks that all language runners share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from safevlm.errors import QuestionError
from safevlm.network.dialogue import ChatFormat, PromptFormat, Turn

__all__ = ["MOST_CONTEXT", "Reader", "check_turns", "prompt_tokens"]

MOST_CONTEXT = 4096
"""Tokens of a prompt with its answer, by default: memory grows with what a model could read, not with what it needs."""
CONTROL = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How a runner reads questions.

    ``count`` returns how many tokens the prompt of a dialogue has, those of the image included; ``longest`` are the
    most bytes that one token stands for; ``control`` are the ids of tokens that are no text.
    """

    chat: ChatFormat
    tokens: Callable[[str], Sequence[int]]
    name: Callable[[int], str]
    control: Collection[int]
    count: Callable[[Sequence[Turn]], int]
    image_tokens: int
    longest: int
    context: int

    @property
    def prompt(self) -> PromptFormat:
        """The prompt of one user turn."""
        return self.chat.prompt


def check_turns(reader: Reader | None, turns: Sequence[Turn], max_new_tokens: int | None) -> None:
    """Raise QuestionError for turns that a model cannot be asked; without a reader, for those that none can be.

    ``max_new_tokens`` must have room in the context, too; None leaves the answer's length to what is left.
    """
    _check_plain(turns)
    if reader is not None:
        prompt_tokens(reader, turns, max_new_tokens)


def _check_plain(turns: Sequence[Turn]) -> None:
    """Raise QuestionError for an unpaired surrogate, and where the user's last text is empty."""
    last = max((number for number, turn in enumerate(turns) if turn.role == "user"), default=-1)
    for number, turn in enumerate(turns):
        if number == last and _is_blank(turn.text):
            raise QuestionError("the question is empty. Ask something about the image in words.", turn=number)
        try:
            turn.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise QuestionError(
                f"the question holds an unpaired surrogate (U+{ord(turn.text[error.start]):04X}) at position "
                f"{error.start}. Send whole characters.",
                turn=number,
            ) from None


def _is_blank(text: str) -> bool:
    return all(unicodedata.category(letter) in ("Zs", "Zl", "Zp", "Cc", "Cf") for letter in text)


def prompt_tokens(reader: Reader, turns: Sequence[Turn], max_new_tokens: int | None) -> int:
    """Return how many tokens the prompt has with its image.

    Raises QuestionError for turns that the family's chat template does not take, for a special token in one of them,
    and for a prompt that leaves no room for ``max_new_tokens`` (None: for one); a text of any length is refused
    quickly.
    """
    reader.chat.check(turns)
    room = reader.context - (1 if max_new_tokens is None else max_new_tokens)
    size = sum(len(turn.text.encode("utf-8")) for turn in turns)
    least = reader.image_tokens + max(len(turns), size // reader.longest)
    if least > room:
        raise _too_long(reader, least, max_new_tokens, at_least=True)
    named = sorted(set(CONTROL.findall(reader.chat.all_pieces)))
    for number, turn in enumerate(turns):
        found = next((name for name in named if name in turn.text), None) or next(
            (reader.name(token) for token in reader.tokens(turn.text) if token in reader.control), None
        )
        if found is not None:
            raise QuestionError(
                f"the question contains {found!r}, a control token of this model. Leave it out.", turn=number
            )
    tokens = reader.count(turns)
    if tokens > room:
        raise _too_long(reader, tokens, max_new_tokens)
    return tokens


def _too_long(reader: Reader, tokens: int, max_new_tokens: int | None, *, at_least: bool = False) -> QuestionError:
    asked = "" if max_new_tokens is None else f", and {max_new_tokens} more were asked for"
    return QuestionError(
        f"this model's context is {reader.context} tokens; the prompt has {'more than ' if at_least else ''}{tokens} "
        f"({reader.image_tokens} of them for the image){asked}. Shorten the question, or ask for a shorter answer.",
        code="context_length_exceeded",
    )
