"""What llama.cpp asks of one family, as data: the contract of the tables here.

Sources: llama.cpp's ``src/models/{llama,qwen2vl,gemma3}.cpp`` for language models, as of llama-cpp-python 0.3.36;
``clip.cpp``, ``clip-impl.h`` and ``models/`` of its ``tools/mtmd`` for vision towers and projectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from safevlm.contract.preprocessing import Preprocessing

__all__ = ["GgufFamily", "GgufLanguage", "GgufVision", "Part", "head_width", "unchanged"]


def head_width(text: Any) -> int:
    """Return how wide a head is: what the config states, or an equal share of the model's width."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def unchanged(tensor: Tensor) -> Tensor:
    """Return a tensor as it is."""
    return tensor


@dataclass(frozen=True, kw_only=True)
class GgufLanguage:
    """A language model's architecture in llama.cpp; ``text`` is transformers' config of it."""

    architecture: str
    """llama.cpp's name."""
    change: Callable[[str, Tensor, Any], Tensor] = lambda _, tensor, __: tensor
    """Makes a tensor, given with its name, what llama.cpp computes with."""
    set_keys: Callable[[Any, Any], None]
    """Sets metadata of the architecture's own: writer, text."""
    check: Callable[[Any], None] = lambda _: None
    """Refuses settings that llama.cpp's graph does not follow."""
    activations: tuple[str, ...] = ("silu",)
    unread: tuple[str, ...] = ()
    """Endings of names that the ``gguf`` library's map knows and this architecture does not load."""
    takes_factors: bool = False
    """Whether it reads factors of rotary frequencies."""
    pre_tokenizer: str | None = None
    """llama.cpp's pre-tokenizer of a byte-level BPE tokenizer, None for SentencePiece."""
    space_prefix: bool = False
    """Whether SentencePiece puts a space before a text."""


@dataclass(frozen=True)
class Part:
    """A tensor of the projector file: where it stands, its shape, and how the stored tensor becomes it."""

    place: str
    shape: tuple[int, ...]
    change: Callable[[Tensor], Tensor] = unchanged


@dataclass(frozen=True, kw_only=True)
class GgufVision:
    """A vision tower and projector in llama.cpp; ``config`` is transformers' config of the whole model."""

    projector: str
    """llama.cpp's name of the projector's type."""
    layer_prefix: str
    layer: Mapping[str, str]
    """Modules of one tower layer, and their places."""
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Modules of one layer whose rows are several places' in equal parts."""
    others: Mapping[str, str]
    """Tensors outside the layers, and their places."""
    changed: Mapping[str, Callable[[Any, str, tuple[int, ...]], Iterator[Part]]] = field(default_factory=dict)
    """Those of ``others`` that are changed or split: config, place and shape to what is written."""
    pooled: tuple[str, ...] = ()
    """Parameters that only the tower's pooled output reads; llama.cpp would apply them to the projector's input."""
    biases: Mapping[str, str] = field(default_factory=dict)
    """Places that llama.cpp adds without looking whether they are there, with the weight that each belongs to."""
    set_keys: Callable[[Any, Any], None]
    """Sets metadata of the tower's own: writer, config. Refuses what llama.cpp's graph does not compute."""
    layers_read: Callable[[Any], int]
    """How many of the tower's layers the projector's input depends on."""
    check_size: Callable[[Any, Preprocessing], None]
    """Refuses images of a size that llama.cpp does not take."""
    head_count: str = "num_attention_heads"
    channels: str = "num_channels"
    head_width_unit: int = 1
    """What a head's width is a multiple of."""
    class_token: bool = False
    """Whether llama.cpp's versions differ in where they put the tower's class token."""


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """A family's two files."""

    language: GgufLanguage
    vision: GgufVision
