"""The language model as llama.cpp knows it: architecture, metadata, tensor names and layouts, family by family.

Names come from the ``gguf`` library's own map of Hugging Face names. Source of layouts and keys: llama.cpp's
``src/models/{llama,qwen2vl,gemma3}.cpp``, as of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from export.gguf.writing import GgufTensor, StoredType, gguf_library
from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.transformers_config import build_config

__all__ = ["ARCHITECTURES", "Architecture", "language_keys", "language_tensors", "stored_type"]

COMPUTED = "rotary_emb.inv_freq"
"""Not learned; old checkpoints store it."""
GEMMA_27B_LAYERS = 62
"""llama.cpp tells Gemma-3 27B by it, whose attention is scaled by the width of heads if they shared the model's."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What llama.cpp's architecture asks of one family: ``change`` of tensors by name, and keys of its own."""

    name: str
    change: Callable[[str, Tensor, Any], Tensor]
    set_keys: Callable[[Any, Any], None]


def stored_type(checkpoint: Checkpoint, wanted: str) -> StoredType:
    """Return how matrices are stored: as ``wanted`` where that is no quantized type, else as the checkpoint has them.

    What a quantized checkpoint stands for is kept in 16 bits, as what it was made from.
    """
    if wanted in ("f32", "f16", "bf16"):
        return wanted  # type: ignore[return-value]
    stored = checkpoint.tensors.dtype(f"{checkpoint.family.language_prefix}norm.weight")
    return "bf16" if stored == "BF16" or checkpoint.family.key == "gemma3" else "f16"


def language_tensors(checkpoint: Checkpoint, matrices: StoredType) -> list[GgufTensor]:
    """Return the tensors to write, embedding first; vectors (norms, biases) are float32.

    Errors: CheckpointError for a tensor that llama.cpp's architecture has no place for.
    """
    gguf = gguf_library()
    text: Any = build_config(checkpoint).text_config
    architecture = ARCHITECTURES[checkpoint.family.key]
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    places = gguf.get_tensor_name_map(arch, text.num_hidden_layers)
    prefix = checkpoint.family.language_prefix
    found = []
    for name in checkpoint.language_names():
        if name.endswith(COMPUTED) or (name == "lm_head.weight" and text.tie_word_embeddings):
            continue
        usual = f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
        place = places.get_name(usual, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise CheckpointError(f"{checkpoint.name}: llama.cpp's {architecture.name} has no place for '{name}'.")
        shape = checkpoint.tensors.shape(name)

        def read(name: str = name) -> Tensor:
            return architecture.change(name, checkpoint.tensors.read(name, own=True), text)

        found.append(GgufTensor(name=place, shape=shape, type=matrices if len(shape) > 1 else "f32", read=read))
    return sorted(found, key=lambda tensor: (tensor.name != "token_embd.weight", not tensor.name.startswith("blk.")))


def language_keys(checkpoint: Checkpoint, writer: Any) -> None:
    """Set the metadata of the language model.

    Errors: CheckpointError for a setting that llama.cpp's architecture does not follow.
    """
    text: Any = build_config(checkpoint).text_config
    rope = text.rope_parameters
    rope = rope.get("full_attention", rope)
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
    writer.add_rope_freq_base(rope["rope_theta"])
    _set_rope_scaling(checkpoint, writer, rope)
    ARCHITECTURES[checkpoint.family.key].set_keys(writer, text)


def _set_rope_scaling(checkpoint: Checkpoint, writer: Any, rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return
    if kind != "linear":
        raise CheckpointError(
            f"{checkpoint.name}: its rotary embedding is scaled '{kind}'; none and 'linear' are written here."
        )
    writer.add_rope_scaling_type(gguf_library().RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(rope["factor"])


# -- families -------------------------------------------------------------------------------------------


def _llama_change(name: str, tensor: Tensor, text: Any) -> Tensor:
    """Put the two halves of a rotary head side by side: llama.cpp turns neighbours, transformers turns halves."""
    if name.endswith("q_proj.weight"):
        return _interleaved(tensor, text.num_attention_heads)
    if name.endswith("k_proj.weight"):
        return _interleaved(tensor, text.num_key_value_heads)
    return tensor


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    rows, columns = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _llama_keys(writer: Any, text: Any) -> None:
    writer.add_rope_dimension_count(text.hidden_size // text.num_attention_heads)


def _qwen_change(_: str, tensor: Tensor, __: Any) -> Tensor:
    return tensor


def _qwen_keys(writer: Any, text: Any) -> None:
    sections = [*text.rope_parameters["mrope_section"], 0]
    writer.add_rope_dimension_sections(sections)


def _gemma_change(name: str, tensor: Tensor, _: Any) -> Tensor:
    """Gemma's norms multiply by one more than their weight; llama.cpp's multiply by the weight."""
    return tensor.float() + 1 if name.endswith("norm.weight") else tensor


def _gemma_keys(writer: Any, text: Any) -> None:
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_sliding_window(text.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in text.layer_types])
    local = text.rope_parameters.get("sliding_attention", {}).get("rope_theta", 10000.0)
    writer.add_rope_freq_base_swa(local)
    shared = text.hidden_size // text.num_attention_heads
    scaled_by = shared if text.num_hidden_layers == GEMMA_27B_LAYERS else text.head_dim
    if text.query_pre_attn_scalar != scaled_by:
        raise CheckpointError(
            f"config.json states query_pre_attn_scalar {text.query_pre_attn_scalar}; llama.cpp scales attention by "
            f"{scaled_by} in a Gemma-3 of {text.num_hidden_layers} layers, so it would compute something else."
        )
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise CheckpointError("config.json states attn_logit_softcapping, which llama.cpp's gemma3 does not follow.")
    if getattr(text, "final_logit_softcapping", None) is not None:
        writer.add_final_logit_softcapping(text.final_logit_softcapping)


ARCHITECTURES: Mapping[str, Architecture] = {
    "llava": Architecture(name="llama", change=_llama_change, set_keys=_llama_keys),
    "qwen2_5_vl": Architecture(name="qwen2vl", change=_qwen_change, set_keys=_qwen_keys),
    "gemma3": Architecture(name="gemma3", change=_gemma_change, set_keys=_gemma_keys),
}
"""By our families' keys."""
