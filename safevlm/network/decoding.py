"""Decoding from a prefill, a token a row and step.

Shapes: N prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from safevlm.network.prompt_tokens import stop_ids

if TYPE_CHECKING:
    from safevlm.network.prefill import Begun
    from safevlm.network.safe_vlm import SafeVLM

__all__ = ["decoding_steps"]


def decoding_steps(
    vlm: SafeVLM, begun: Begun, max_new_tokens: int, choose: Callable[[Any], int] | None = None
) -> Iterator[list[int | None]]:
    """Yield the N ids that each step adds, None for a prompt whose answer has ended; ends when all have.

    ``choose`` takes a row's V logits (float32, numpy) to its token; by default the likeliest is taken.

    The cache of ``begun`` is extended: it is good for one decoding.
    """
    stops = stop_ids(vlm.tokenizer, vlm.family.prompt) | vlm.stated_ends
    table = vlm.core.get_input_embeddings()
    hidden_N1D, attention, position = begun.last_hidden, begun.attention_mask, begun.last_position
    open_rows = set(range(len(hidden_N1D)))
    for step in range(max_new_tokens):
        with torch.inference_mode():
            logits_N1V = vlm.token_logits(hidden_N1D)
            if choose is None:
                chosen_N1 = logits_N1V.argmax(dim=-1)
            else:
                rows = [[choose(row)] for row in logits_N1V[:, 0].float().cpu().numpy()]
                chosen_N1 = torch.tensor(rows, device=hidden_N1D.device)
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
