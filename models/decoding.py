"""Greedy decoding from a prefill, a token a row and step; and text from tokens as they come.

Shapes: N prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from models.prompt_tokens import stop_ids

if TYPE_CHECKING:
    from models.safe_vlm import Begun, SafeVLM

__all__ = ["TextStream", "greedy_steps"]

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are not a whole character yet."""


def greedy_steps(vlm: SafeVLM, begun: Begun, max_new_tokens: int) -> Iterator[list[int | None]]:
    """Yield the N ids that each step adds, None for a prompt whose answer has ended; ends when all have.

    The cache of ``begun`` is extended: it is good for one decoding.
    """
    stops = stop_ids(vlm.tokenizer, vlm.family.prompt)
    table = vlm.core.get_input_embeddings()
    hidden_N1D, attention, position = begun.last_hidden, begun.attention_mask, begun.last_position
    open_rows = set(range(len(hidden_N1D)))
    for step in range(max_new_tokens):
        with torch.inference_mode():
            chosen_N1 = vlm.token_logits(hidden_N1D).argmax(dim=-1)
        ids = chosen_N1[:, 0].tolist()
        open_rows -= {row for row in open_rows if ids[row] in stops}
        if not open_rows:
            return
        yield [token if row in open_rows else None for row, token in enumerate(ids)]
        if step + 1 == max_new_tokens:
            return
        with torch.inference_mode():
            position = position + 1
            attention = torch.cat([attention, torch.ones_like(chosen_N1)], dim=-1)
            hidden_N1D = vlm.language_forward(table(chosen_N1), {"attention_mask": attention}, position, begun.cache)


class TextStream:
    """The text of a growing answer: what a new token adds to it, no sooner than whole characters are there."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._told = ""

    def add(self, token: int) -> str:
        """Return the text that became certain with one more token; blanks before the first word are left out."""
        self._ids.append(token)
        text = self._decode(self._ids).lstrip()
        if text.endswith(UNFINISHED) or not text.startswith(self._told):
            return ""
        return self._tell(text.rstrip())

    def end(self) -> str:
        """Return what is left to tell."""
        return self._tell(self._decode(self._ids).strip())

    def _tell(self, text: str) -> str:
        more = text[len(self._told) :] if text.startswith(self._told) else ""
        self._told += more
        return more
