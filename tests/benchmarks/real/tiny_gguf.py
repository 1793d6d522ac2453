"""A tiny Llama with random weights as a GGUF file, as converters write it, and as an environment's package holds it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from benchmarks.real.packages import WEIGHTS, RealWeights

HEADS, KEYS, WIDTH, LAYERS = 4, 2, 256, 3
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tokens() -> list[str]:
    """Return three special tokens, one for each byte, and two that are merged."""
    return [*SPECIAL, *bytes_to_unicode().values(), "ab", "cd"]


def random_llama() -> Any:
    """Return a Llama whose output matrix is its embedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens()),
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.06,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(model: Any, path: Path, *, left_out: str = "") -> None:
    """Write ``model`` as converters do, rows of queries and keys in llama.cpp's order, all but one tensor."""
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens()) - len(SPECIAL)))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in model.named_parameters():
        stored, numbers = _stored(name), value.detach().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = HEADS if "q_proj" in name else KEYS
            numbers = numbers.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(-1, WIDTH)
        if stored != left_out:
            writer.add_tensor(stored, np.ascontiguousarray(numbers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[rest.removesuffix('.weight')]}.weight"


def install(path: Path, environment: Path) -> RealWeights:
    """Put a GGUF file into an environment's packages in two pieces; return what finds it there."""
    content = path.read_bytes()
    files = ("tiny_part1/tiny.part0", "tiny_part2/tiny.part1")
    for file, piece in zip(files, (content[:1000], content[1000:]), strict=True):
        place = environment / "lib" / "python3.11" / "site-packages" / file
        place.parent.mkdir(parents=True)
        place.write_bytes(piece)
    return replace(WEIGHTS["smollm2"], name="tiny", files=files, sha256=hashlib.sha256(content).hexdigest())
