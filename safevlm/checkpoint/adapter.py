"""Adapters that are not merged: their files beside a checkpoint, and their tensors among its own.

The base's tensors do not hold what an adapter changes, so answers and verdicts read from them are not the model's.
Sources: file names of transformers 5.17 (``utils/peft_utils.py``) and of LLaVA's ``train.py``; tensor names of PEFT's
tuners (the parameters that each sets on a layer it wraps).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from safevlm.errors import CheckpointError

__all__ = ["refuse_adapter_files", "refuse_adapter_tensors"]

FILES = re.compile(
    r"adapter_config\.json|adapter_model[-.].*|non_lora_trainables\.bin|"
    r"(?:.*[-_.])?(?:lora|dora|qlora)(?:[-_.].*)?\.(?:safetensors|bin|pt|pth|ckpt)",
    re.IGNORECASE,
)
"""PEFT's, what LLaVA's LoRA training stores of the parts that it trains whole, and weights that are called so."""

TENSORS = re.compile(
    r"(?:^|\.)(?:"
    r"lora_[A-Za-z0-9_]+|"  # LoRA, DoRA (lora_magnitude_vector), AdaLoRA (lora_E), embeddings (lora_embedding_A)
    r"ia3_l|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|oft_[rRs]|boft_[RPs]|"
    r"vera_(?:A|B|lambda_[bd])|vblora_\w+|randlora_\w+|fourierft_\w+|waveft_\w+|hra_u|bone_\w+|miss_\w+|shira_\w+|"
    r"c3a_\w+|road_\w+|delora_\w+|gralora_\w+|ln_tuning_\w+|adaption_\w+|prompt_(?:encoder|embeddings)|"
    r"modules_to_save|original_module|trainable_tokens_\w+|base_layer"
    r")(?:\.|$)"
)
"""A level of a tensor's name that only a layer wrapped by an adapter has."""

ADVICE = (
    "Merge the adapter first, with the checkpoint's own class so that the guard head is kept: "
    "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(FOLDER); for LLaVA's own "
    "LoRA checkpoints, use scripts/merge_lora_weights.py. Then give FOLDER"
)


def refuse_adapter_files(where: str, files: Collection[str]) -> None:
    """Raise CheckpointError when an adapter's files lie among the top-level ``files`` of a checkpoint."""
    found = sorted(name for name in files if FILES.fullmatch(name))
    if found:
        raise CheckpointError(
            f"{where}: '{found[0]}' belongs to an adapter, but the tensors that the adapter changes are missing. "
            f"{ADVICE}, or remove the adapter's files if it is merged already."
        )


def refuse_adapter_tensors(where: str, stored: Iterable[str]) -> None:
    """Raise CheckpointError when a stored tensor is an adapter's, or of a layer that one still wraps."""
    found = sorted(name for name in stored if TENSORS.search(name))
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise CheckpointError(
            f"{where}: tensor {found[0][:200]!r}{more} belongs to an adapter that is not merged into the model. "
            f"{ADVICE}."
        )
