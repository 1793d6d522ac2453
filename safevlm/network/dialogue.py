"""How a family writes a dialogue about one image: turns between a user and the model, with an optional system text.

Each family states the pieces of its own chat template as a :class:`ChatFormat`; what it writes is what transformers'
``apply_chat_template`` and the family's processor write. The image stands before the text of its turn, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from safevlm.errors import QuestionError

__all__ = ["Around", "ChatFormat", "PromptFormat", "Question", "Role", "Turn", "as_turns", "last_question"]

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one side says; ``image`` puts the dialogue's image before the text."""

    role: Role
    text: str
    image: bool = False


Question: TypeAlias = str | Sequence[Turn]
"""A question about the image, or the turns of a dialogue that holds the image once."""


def as_turns(question: Question) -> tuple[Turn, ...]:
    """Return the turns of a question: a text alone is one user turn with the image."""
    return (Turn("user", question, image=True),) if isinstance(question, str) else tuple(question)


def last_question(question: Question) -> str:
    """Return what the user said last."""
    return next((turn.text for turn in reversed(as_turns(question)) if turn.role == "user"), "")


@dataclass(frozen=True)
class Around:
    """A prompt's text before the image tokens and after them."""

    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """One user turn with one image, as text pieces around the image tokens and the question.

    The prompt is ``before_image``, the image token repeated once per image feature, ``after_image``, the
    question, ``after_question``; the model answers and ends with ``end_of_turn``. Special tokens stand in
    the text by name, the beginning-of-sequence token included. Without an image the prompt is ``before_text``,
    the question, ``after_question``.
    """

    before_image: str
    image_token: str
    after_image: str
    after_question: str
    end_of_turn: str
    before_text: str


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The pieces of a family's chat template. Special tokens stand in the text by name."""

    opening: str
    system: tuple[str, str] | None
    """Around a system text; None puts it before the first turn's own text, with ``folded_end`` behind it."""
    folded_end: str = ""
    default_system: str = ""
    """The system text where none is given; empty for none."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    image: tuple[str, str]
    """Around the image tokens."""
    image_token: str
    answer: str
    """Text after the last turn, where the model continues."""
    end_of_turn: str
    """Ends the model's answer."""
    strict: bool
    """Whether the template takes a system text as the first turn only, and then user and assistant in alternation."""
    trimmed: bool = False
    """Whether white space around a user's and an assistant's text is left out."""

    @cached_property
    def prompt(self) -> PromptFormat:
        """The prompt of one user turn with the image: what the guard behind the language model was trained on."""
        head = self.opening + self._default() + self.user[0]
        return PromptFormat(
            before_image=head + self.image[0],
            image_token=self.image_token,
            after_image=self.image[1],
            after_question=self.user[1] + self.answer,
            end_of_turn=self.end_of_turn,
            before_text=head,
        )

    @cached_property
    def all_pieces(self) -> str:
        """Every text of the template, one after another."""
        around = (*(self.system or ()), *self.user, *self.assistant, *self.image)
        return "".join((self.opening, *around, self.answer, self.end_of_turn))

    def check(self, turns: Sequence[Turn]) -> None:
        """Raise QuestionError, with the turn's number, for turns that the template does not take, or an image token."""
        self._check_image(turns)
        self._check_roles(turns)

    def _check_image(self, turns: Sequence[Turn]) -> None:
        for number, turn in enumerate(turns):
            if self.image_token in turn.text:
                raise QuestionError(
                    f"the question contains {self.image_token!r}, which stands for the image. Leave it out.",
                    turn=number,
                )
        images = [number for number, turn in enumerate(turns) if turn.image]
        if len(images) != 1:
            raise QuestionError(f"this model answers about exactly one image; {len(images)} were given.")
        if turns[images[0]].role != "user":
            raise QuestionError("the image must be in a user turn. Move it there.", turn=images[0])

    def _check_roles(self, turns: Sequence[Turn]) -> None:
        if not self.strict:
            return
        first = int(turns[0].role == "system")
        for number, turn in enumerate(turns[first:], first):
            wanted = ("user", "assistant")[(number - first) % 2]
            if turn.role == "system":
                raise QuestionError(
                    "this model's chat template takes one system text, as the first message. Move or merge it.",
                    turn=number,
                    key="role",
                )
            if turn.role != wanted:
                raise QuestionError(
                    "this model's chat template alternates user and assistant messages, beginning with the user. "
                    f"This one must be from the {wanted}, not the {turn.role}.",
                    turn=number,
                    key="role",
                )
        if turns[-1].role != "user":
            raise QuestionError("the last message must be from the user.", turn=len(turns) - 1, key="role")

    def around(self, turns: Sequence[Turn]) -> Around:
        """Write the turns as text before and after the image tokens. Raises QuestionError, see :meth:`check`."""
        self.check(turns)
        return self._written(turns)

    def text(self, turns: Sequence[Turn]) -> str:
        """Write turns without an image. Raises QuestionError for roles in an order that the template does not take."""
        self._check_roles(turns)
        return self._written(turns).before

    def _written(self, turns: Sequence[Turn]) -> Around:
        """Write turns that are known to be right; without an image all of it stands before, the rest is empty."""
        sides, folded = [[self.opening], []], ""
        if turns[0].role == "system" and self.system is None:
            folded, turns = turns[0].text + self.folded_end, turns[1:]
        elif turns[0].role != "system":
            sides[0].append(self._default())
        side = sides[0]
        for turn in turns:
            start, end = self._marks(turn.role)
            side += start, folded
            folded = ""
            if turn.image:
                side.append(self.image[0])
                side = sides[1]
                side.append(self.image[1])
            side += turn.text.strip() if self.trimmed and turn.role != "system" else turn.text, end
        side.append(self.answer)
        return Around("".join(sides[0]), "".join(sides[1]))

    def _marks(self, role: Role) -> tuple[str, str]:
        marks = {"system": self.system, "user": self.user, "assistant": self.assistant}[role]
        assert marks is not None  # a folded system text is the first, which check() has seen
        return marks

    def _default(self) -> str:
        return self.default_system.join(self.system) if self.system is not None and self.default_system else ""
