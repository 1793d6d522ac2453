"""A dialogue is written as the checkpoint's own chat template writes it, and refused where that refuses it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.families import FAMILIES
from safevlm.errors import QuestionError
from safevlm.network.dialogue import ChatFormat, Turn
from safevlm.network.prompt_tokens import IMAGE, dialogue_ids, load_tokenizer, prompt_ids

TINY = {"llava": "tiny-safellava", "gemma3": "tiny-safegem", "qwen2_5_vl": "tiny-safeqwen"}
TEXTS = st.text("aB \n'?\u00e9", max_size=8)


@cache
def tokenizer_of(family: str) -> Any:
    return load_tokenizer(open_checkpoint(TINY[family]).folder)


def by_template(family: str, turns: list[Turn]) -> str:
    """Return what transformers writes, with the image token where the family's processor puts the first of them."""
    messages = []
    for turn in turns:
        parts = [{"type": "image"}] if turn.image else []
        content = turn.text if turn.role == "system" else [*parts, {"type": "text", "text": turn.text}]
        messages.append({"role": turn.role, "content": content})
    written = tokenizer_of(family).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    marks = "\n\n<start_of_image><image_soft_token><end_of_image>\n\n"  # transformers' Gemma3Processor
    return str(written.replace("<start_of_image>", marks) if family == "gemma3" else written)


def ours(family: str, turns: list[Turn]) -> str:
    chat = FAMILIES[family].chat
    around = chat.around(turns)
    return around.before + chat.image_token + around.after


@st.composite
def alternating(draw: st.DrawFn) -> list[Turn]:
    count = draw(st.integers(0, 3)) * 2 + 1
    at = draw(st.integers(0, count // 2)) * 2
    turns = [Turn("assistant" if number % 2 else "user", draw(TEXTS), number == at) for number in range(count)]
    return [Turn("system", draw(TEXTS)), *turns] if draw(st.booleans()) else turns


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, derandomize=True, max_examples=100)
@given(turns=alternating())
def test_turns_are_written_as_the_template_writes_them(family: str, turns: list[Turn]) -> None:
    assert ours(family, turns) == by_template(family, turns)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, derandomize=True, max_examples=200)
@given(roles=st.lists(st.sampled_from(("system", "user", "assistant")), min_size=1, max_size=5), data=st.data())
def test_what_the_template_refuses_is_refused(family: str, roles: list[Any], data: st.DataObject) -> None:
    users = [number for number, role in enumerate(roles) if role == "user"]
    at = data.draw(st.sampled_from(users)) if users else 0
    turns = [Turn(role, "a", number == at) for number, role in enumerate(roles)]
    try:
        wanted = by_template(family, turns)
    except TemplateError:
        wanted = None
    try:
        assert ours(family, turns) == wanted
    except QuestionError as error:
        assert error.turn is not None
        alone = not users or (FAMILIES[family].chat.strict and roles[-1] != "user")
        assert wanted is None or alone, "the template takes it"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_turn_is_the_prompt_that_the_guard_is_calibrated_on(family: str) -> None:
    tokenizer, chat = tokenizer_of(family), FAMILIES[family].chat
    for question in ("Where is the square?", "a\nb", ""):
        ids = dialogue_ids(tokenizer, chat, [Turn("user", question, image=True)], 5)
        assert ids == prompt_ids(tokenizer, chat.prompt, question, 5) and ids.count(IMAGE) == 5


@pytest.mark.parametrize("chat", [family.chat for family in FAMILIES.values()], ids=list(FAMILIES))
def test_the_image_stands_once_in_a_turn_of_the_user(chat: ChatFormat) -> None:
    user, other = Turn("user", "a", image=True), Turn("assistant", "b", image=True)
    for turns, word, turn in (
        ([], "exactly one image; 0", None),
        ([Turn("user", "a")], "exactly one image; 0", None),
        ([user, Turn("assistant", "b"), user], "exactly one image; 2", None),
        ([Turn("user", "a"), other, Turn("user", "c")], "a user turn", 1),
        ([Turn("system", "a", image=True), Turn("user", "c")], "a user turn", 0),
        ([user, Turn("assistant", f"b{chat.image_token}"), Turn("user", "c")], "stands for the image", 1),
    ):
        with pytest.raises(QuestionError, match=word) as raised:
            chat.around(turns)
        assert raised.value.turn == turn
