"""The language model as llama.cpp knows it: architecture, metadata, tensor names and layouts, family by family.

Names come from the ``gguf`` library's own map of Hugging Face names. Source of layouts and keys: llama.cpp's
``src/models/{llama,qwen2vl,gemma3}.cpp``, as of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from export.gguf.layout import parameters, stored_as
from export.gguf.rotary import rotary_of
from export.gguf.writing import GgufTensor, StoredType, gguf_library
from safevlm.checkpoint.checkpoint import OUTPUT_PREFIX, Checkpoint
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.errors import CheckpointError

__all__ = ["ARCHITECTURES", "Architecture", "language_keys", "language_tensors", "stored_type"]

MOST_LAYERS = 512
"""``LLAMA_MAX_LAYERS`` in llama.cpp."""
GEMMA_27B_LAYERS = 62
"""llama.cpp tells Gemma-3 27B by it, whose attention is scaled by the width of heads if they shared the model's."""
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")
SLIDING = "sliding_attention"
QWEN_SECTIONS = (16, 24, 24)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What llama.cpp's architecture asks of one family: ``change`` of tensors by name, and keys of its own.

    ``check`` refuses settings that its graph does not follow. ``unread`` are endings of names that the library's map
    knows and this architecture does not load; ``takes_factors`` whether it reads factors of rotary frequencies.
    """

    name: str
    change: Callable[[str, Tensor, Any], Tensor]
    set_keys: Callable[[Any, Any], None]
    check: Callable[[Any], None]
    activations: tuple[str, ...] = ("silu",)
    unread: tuple[str, ...] = ()
    takes_factors: bool = False


def stored_type(checkpoint: Checkpoint, wanted: str) -> StoredType:
    """Return how matrices are stored: as ``wanted`` where that is no quantized type, else as the checkpoint has them.

    What a quantized checkpoint stands for is kept in 16 bits, as what it was made from.
    """
    if wanted in ("f32", "f16", "bf16"):
        return wanted  # type: ignore[return-value]
    stored = checkpoint.tensors.dtype(f"{checkpoint.family.language_prefix}norm.weight")
    if stored in ("F64", "F32"):
        return "f32"
    return "bf16" if stored == "BF16" or checkpoint.family.key == "gemma3" else "f16"


def language_tensors(checkpoint: Checkpoint, matrices: StoredType) -> list[GgufTensor]:
    """Return the tensors to write, embedding first; vectors (norms, biases) are float32.

    Errors: CheckpointError for a tensor that is missing, or that llama.cpp's architecture has no place for.
    """
    gguf = gguf_library()
    text: Any = build_config(checkpoint).text_config
    architecture = ARCHITECTURES[checkpoint.family.key]
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    places = gguf.get_tensor_name_map(arch, text.num_hidden_layers)
    prefix = checkpoint.family.language_prefix
    found = []
    for name, shape in parameters(checkpoint, (prefix, OUTPUT_PREFIX)).items():
        usual = f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
        place = places.get_name(usual, try_suffixes=(".weight", ".bias"))
        source = stored_as(checkpoint, name)
        if place is None or name.endswith(architecture.unread):
            raise CheckpointError(
                f"{checkpoint.name}: llama.cpp's {architecture.name} has no place for '{source}', which the model "
                "reads. Use another runtime."
            )

        def read(name: str = name) -> Tensor:
            return architecture.change(name, checkpoint.tensors.read(name, own=True), text)

        stored: StoredType = matrices if len(shape) > 1 else "f32"
        found.append(GgufTensor(name=place, source=source, shape=shape, type=stored, read=read))
    factors = rotary_of(checkpoint, takes_factors=architecture.takes_factors).factors
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

    Errors: CheckpointError for a setting that llama.cpp's architecture does not follow.
    """
    architecture = ARCHITECTURES[checkpoint.family.key]
    text: Any = build_config(checkpoint).text_config
    _check(text, architecture)
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
    rotary_of(checkpoint, takes_factors=architecture.takes_factors).set_keys(writer)
    architecture.set_keys(writer, text)


def head_width(text: Any) -> int:
    """Return how wide a head is: what the config states, or an equal share of the model's width."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _check(text: Any, architecture: Architecture) -> None:
    """Refuse what llama.cpp would fail on when it loads or first computes, where it ends the whole process."""
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    if heads % groups:
        raise CheckpointError(
            f"config.json states {heads} attention heads and {groups} key-value heads; the first must be a multiple of "
            "the second. Correct num_attention_heads or num_key_value_heads."
        )
    if not 1 <= text.num_hidden_layers <= MOST_LAYERS:
        raise CheckpointError(
            f"config.json states {text.num_hidden_layers} decoder layers; llama.cpp takes 1 to {MOST_LAYERS}."
        )
    activation = getattr(text, "hidden_activation", None) or text.hidden_act
    if activation not in architecture.activations:
        raise CheckpointError(
            f"config.json states the activation '{activation}' of the language model; llama.cpp's {architecture.name} "
            f"computes {' or '.join(map(repr, architecture.activations))}. Use another runtime."
        )
    architecture.check(text)


# -- families -------------------------------------------------------------------------------------------


def _llama_change(name: str, tensor: Tensor, text: Any) -> Tensor:
    """Put the two halves of a rotary head side by side: llama.cpp turns neighbours, transformers turns halves."""
    if ".q_proj." in name:
        return _interleaved(tensor, text.num_attention_heads)
    if ".k_proj." in name:
        return _interleaved(tensor, text.num_key_value_heads)
    return tensor


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a weight, or the numbers of a bias, head by head."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)


def _llama_keys(writer: Any, text: Any) -> None:
    writer.add_rope_dimension_count(head_width(text))
    writer.add_key_length(head_width(text))
    writer.add_value_length(head_width(text))


def _llama_check(_: Any) -> None:
    """Nothing of its own."""


def _qwen_change(_: str, tensor: Tensor, __: Any) -> Tensor:
    return tensor


def _sections(text: Any) -> list[int]:
    """Return how many frequencies turn by time, row and column; the default is that of transformers' module."""
    return list(text.rope_parameters.get("mrope_section", QWEN_SECTIONS))


def _qwen_keys(writer: Any, text: Any) -> None:
    writer.add_rope_dimension_sections([*_sections(text), 0])


def _qwen_check(text: Any) -> None:
    sections, width = _sections(text), head_width(text)
    if len(sections) != 3 or 2 * sum(sections) != width:
        raise CheckpointError(
            f"config.json states mrope_section = {sections} for heads of width {width}; three numbers whose sum is "
            f"{width // 2} are needed. Fetch config.json again."
        )
    sliding = sum(kind != "full_attention" for kind in text.layer_types)
    if sliding:
        raise CheckpointError(
            f"config.json asks for sliding-window attention in {sliding} of {text.num_hidden_layers} layers; "
            "llama.cpp's qwen2vl has full attention alone. Use another runtime."
        )


def _gemma_change(name: str, tensor: Tensor, text: Any) -> Tensor:
    """Gemma's norms multiply by one more than their weight; llama.cpp's multiply by the weight.

    What attention is scaled by is llama.cpp's own choice; what it differs by goes into the norm of queries.
    """
    if not name.endswith("norm.weight"):
        return tensor
    weight = tensor.float() + 1
    return weight * _gemma_scale(text) if name.endswith("q_norm.weight") else weight


def _gemma_scale(text: Any) -> float:
    shared = text.hidden_size // text.num_attention_heads
    scaled_by = shared if text.num_hidden_layers == GEMMA_27B_LAYERS else text.head_dim
    return math.sqrt(scaled_by / text.query_pre_attn_scalar)


def _gemma_keys(writer: Any, text: Any) -> None:
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    if SLIDING in text.layer_types:
        writer.add_sliding_window(text.sliding_window)
        writer.add_sliding_window_pattern([kind == SLIDING for kind in text.layer_types])
        writer.add_rope_freq_base_swa(text.rope_parameters[SLIDING]["rope_theta"])
    if text.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(text.final_logit_softcapping)


def _gemma_check(text: Any) -> None:
    for key in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(text, key, None):
            raise CheckpointError(
                f"config.json states {key} = {getattr(text, key)}, which llama.cpp's gemma3 does not follow. "
                "Use another runtime."
            )
    unknown = sorted({*text.layer_types} - {SLIDING, "full_attention"})
    if unknown:
        raise CheckpointError(
            f"config.json states layers of {unknown[0]}; llama.cpp's gemma3 has sliding and full ones."
        )
    if SLIDING in text.layer_types and not (text.sliding_window or 0) > 0:
        raise CheckpointError(
            f"config.json states sliding_window = {text.sliding_window} for layers that slide; 1 or more is needed."
        )
    if not text.query_pre_attn_scalar > 0:
        raise CheckpointError(
            f"config.json states query_pre_attn_scalar = {text.query_pre_attn_scalar}; above 0 is needed."
        )


ARCHITECTURES: Mapping[str, Architecture] = {
    "llava": Architecture(
        name="llama", change=_llama_change, set_keys=_llama_keys, check=_llama_check, takes_factors=True
    ),
    "qwen2_5_vl": Architecture(name="qwen2vl", change=_qwen_change, set_keys=_qwen_keys, check=_qwen_check),
    "gemma3": Architecture(
        name="gemma3",
        change=_gemma_change,
        set_keys=_gemma_keys,
        check=_gemma_check,
        activations=TANH_GELU,
        unread=(".o_proj.bias",),
    ),
}
"""By our families' keys."""
