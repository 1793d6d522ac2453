"""Read a language model from a GGUF file, dequantized: its config, its tensors, its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from export.gguf.writing import gguf_library
from safevlm.errors import CheckpointError, InputError
from safevlm.network.filling import on_meta

__all__ = ["LanguageModel", "read_gguf"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """transformers' config of a causal language model, its tensors by transformers' names, its tokenizer."""

    config: Any
    tensors: Mapping[str, Tensor]
    tokenizer: Any
    architecture: str
    """Name of transformers' class."""


def read_gguf(path: Path, *, dtype: torch.dtype = torch.float16, layers: int | None = None) -> LanguageModel:
    """Return the language model of a GGUF file, cut to so many ``layers``; a tied output matrix is left out.

    Raises CheckpointError for a file without a tensor of the model, InputError for more layers than it has, and
    MissingExtraError.
    """
    gguf_library()
    where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    config: Any = AutoConfig.from_pretrained(**where)
    whole = int(config.num_hidden_layers)
    if layers is not None and not 1 <= layers <= whole:
        raise InputError(f"--layers {layers} is not allowed: the model has {whole}. Give a number from 1 to {whole}.")
    model_of: Any = AutoModelForCausalLM.from_config
    read: Any = load_gguf_checkpoint
    skeleton: Any = on_meta(lambda: model_of(config))
    stored = read(str(path), return_tensors=True, model_to_load=skeleton, torch_dtype=dtype)["tensors"]
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        skeleton = on_meta(lambda: model_of(config))
    tensors = {}
    for name, slot in skeleton.named_parameters():
        if name not in stored or stored[name].shape != slot.shape:
            found = "is missing" if name not in stored else f"is {tuple(stored[name].shape)}"
            raise CheckpointError(f"{path}: tensor '{name}' {found}; it must be {tuple(slot.shape)}. Fetch it again.")
        tensors[name] = stored[name].to(dtype).contiguous()
    return LanguageModel(
        config=config,
        tensors=tensors,
        tokenizer=AutoTokenizer.from_pretrained(**where),
        architecture=type(skeleton).__name__,
    )
