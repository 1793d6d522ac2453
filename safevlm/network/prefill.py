"""A prompt with its images on the way through the language model, and what comes of it.

Shapes: N images (one question each), T image tokens, L positions of the padded prompt, D width of the language model,
C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import DynamicCache

__all__ = ["Answer", "Begun", "Prefill"]


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model says to one question, and the guard's C probabilities (float32) for its image."""

    text: str
    guard_probs: np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefill:
    """N prompts, padded on the left to L positions, with their images' features in place.

    ``masks`` go to the language model as they are: ``attention_mask`` N × L, 0 at padding, and for Gemma-3
    ``token_type_ids`` N × L, 1 at image tokens, which see each other both ways.
    """

    inputs_embeds: Tensor
    """N × L × D."""
    position_ids: Tensor
    """N × L, for Qwen2.5-VL 3 × N × L (time, row, column)."""
    masks: dict[str, Tensor]
    image_mask: Tensor
    """N × L, true at the T image tokens of every row."""
    features: Tensor
    """N × T × D, the projector's output before it became part of ``inputs_embeds``."""
    usual: bool = True
    """Whether every image stands behind the very tokens that it does in a prompt of one user turn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Begun:
    """N prefilled prompts: the guard's verdict on their images, and the state that decoding continues from.

    Decoding extends ``cache``, so each is finished at most once.
    """

    guard_probs: np.ndarray[Any, np.dtype[np.float32]]
    """N × C, float32, of the exact guard."""
    last_hidden: Tensor
    """N × 1 × D, at the prompts' last position; nothing else of the last hidden state is kept."""
    attention_mask: Tensor
    """N × L."""
    last_position: Tensor
    """N × 1, for Qwen2.5-VL 3 × N × 1."""
    cache: DynamicCache
