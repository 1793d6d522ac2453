"""Text to calibrate on and text that is held out, from what every Python and this package hold."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pydoc_data.topics import topics

from calibration.answers import own_answers
from calibration.sets.conversations import built_in_conversations
from safevlm.checkpoint.checkpoint import Checkpoint

__all__ = ["answered_prompts", "held_out_text"]

SHORTEST = 160
SENTENCE = re.compile(r"[A-Z][^|\\{}=>]*\.")
"""A paragraph of prose: no tables, grammar, code or prompts."""


def held_out_text() -> str:
    """Return the prose of Python's language reference as the standard library has it (``pydoc_data``).

    Nothing like a chat: calibration rows are answers to everyday questions. It differs a little between versions of
    Python.
    """
    paragraphs: Sequence[str] = [
        " ".join(paragraph.split()) for name in sorted(topics) for paragraph in topics[name].split("\n\n")
    ]
    prose = [each for each in paragraphs if len(each) >= SHORTEST and SENTENCE.fullmatch(each)]
    return "\n\n".join(dict.fromkeys(prose))


def answered_prompts(checkpoint: Checkpoint, rows: int, *, max_new_tokens: int) -> str:
    """Return JSONL of the first ``rows`` built-in text prompts with the model's own answers."""
    prompts = [sample for sample in built_in_conversations().samples if sample.image is None][:rows]
    answers = own_answers(checkpoint, prompts, max_new_tokens=max_new_tokens)
    return "".join(
        json.dumps(
            {
                "kind": "text",
                "messages": [
                    {"role": "user", "content": prompt.question},
                    {"role": "assistant", "content": answer.text},
                ],
            }
        )
        + "\n"
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.text.strip()
    )
