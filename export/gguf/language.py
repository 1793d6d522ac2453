"""The language model as llama.cpp knows it: architecture, metadata, tensor names and layouts, family by family.

Names come from the ``gguf`` library's own map of Hugging Face names. Source of layouts and keys: llama.cpp's
``src/models/{llama,qwen2vl,gemma3}.cpp``, as of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from export.gguf.families import gguf_family_of
from export.gguf.families.family import GgufLanguage
from export.gguf.layout import parameters, stored_as
from export.gguf.rotary import rotary_of
from export.gguf.writing import GgufTensor, StoredType, gguf_library
from safevlm.checkpoint.checkpoint import OUTPUT_PREFIX, Checkpoint
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.errors import CheckpointError

__all__ = ["language_keys", "language_tensors", "stored_type"]

MOST_LAYERS = 512
"""``LLAMA_MAX_LAYERS`` in llama.cpp."""


def stored_type(checkpoint: Checkpoint, wanted: str) -> StoredType:
    """Return how matrices are stored: as ``wanted`` where that is no quantized type, else as the checkpoint has them.

    What a quantized checkpoint stands for is kept in 16 bits, as what it was made from.
    """
    if wanted in ("f32", "f16", "bf16"):
        return wanted  # type: ignore[return-value]
    stored = checkpoint.tensors.dtype(f"{checkpoint.family.language_prefix}norm.weight")
    if stored in ("F64", "F32"):
        return "f32"
    return "bf16" if "BF16" in (stored, checkpoint.family.half) else "f16"


def language_tensors(checkpoint: Checkpoint, matrices: StoredType) -> list[GgufTensor]:
    """Return the tensors to write, embedding first; vectors (norms, biases) are float32.

    Raises CheckpointError for a tensor that is missing, or that llama.cpp's architecture has no place for.
    """
    gguf = gguf_library()
    text: Any = build_config(checkpoint).text_config
    language = gguf_family_of(checkpoint).language
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[language.architecture]
    places = gguf.get_tensor_name_map(arch, text.num_hidden_layers)
    prefix = checkpoint.family.language_prefix
    found = []
    for name, shape in parameters(checkpoint, (prefix, OUTPUT_PREFIX)).items():
        usual = f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
        place = places.get_name(usual, try_suffixes=(".weight", ".bias"))
        source = stored_as(checkpoint, name)
        if place is None or name.endswith(language.unread):
            raise CheckpointError(
                f"{checkpoint.name}: llama.cpp's {language.architecture} does not support '{source}', which the model "
                "needs. Use another runtime."
            )

        def read(name: str = name) -> Tensor:
            return language.change(name, checkpoint.tensors.read(name, own=True), text)

        stored: StoredType = matrices if len(shape) > 1 else "f32"
        found.append(GgufTensor(name=place, source=source, shape=shape, type=stored, read=read))
    factors = rotary_of(checkpoint, takes_factors=language.takes_factors).factors
    if factors is not None:
        values = torch.from_numpy(factors)
        found.append(
            GgufTensor(
                name="rope_freqs.weight",
                source="rope_scaling of config.json",
                shape=(len(factors),),
                type="f32",
                read=lambda: values,
            )
        )
    return sorted(found, key=lambda tensor: (tensor.name != "token_embd.weight", not tensor.name.startswith("blk.")))


def language_keys(checkpoint: Checkpoint, writer: Any) -> None:
    """Set the metadata of the language model.

    Raises CheckpointError for a setting that llama.cpp's architecture does not follow.
    """
    language = gguf_family_of(checkpoint).language
    text: Any = build_config(checkpoint).text_config
    _check(text, language)
    writer.add_type("model")
    writer.add_name(checkpoint.name)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    rotary_of(checkpoint, takes_factors=language.takes_factors).set_keys(writer)
    language.set_keys(writer, text)


def _check(text: Any, language: GgufLanguage) -> None:
    """Refuse what llama.cpp would fail on when it loads or first computes, where it ends the whole process."""
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    if heads % groups:
        raise CheckpointError(
            f"config.json states {heads} attention heads and {groups} key-value heads; the first must be a multiple of "
            "the second. Correct num_attention_heads or num_key_value_heads."
        )
    if not 1 <= text.num_hidden_layers <= MOST_LAYERS:
        raise CheckpointError(
            f"config.json states {text.num_hidden_layers} decoder layers; llama.cpp supports 1 to {MOST_LAYERS}."
        )
    activation = getattr(text, "hidden_activation", None) or text.hidden_act
    if activation not in language.activations:
        raise CheckpointError(
            f"config.json states the activation '{activation}' of the language model; llama.cpp's "
            f"{language.architecture} computes {' or '.join(map(repr, language.activations))}. Use another runtime."
        )
    language.check(text)
