"""One folder through transformers' own loader and through ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from safevlm.checkpoint.architectures import architecture_of
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.network.filling import fill, on_meta
from safevlm.network.reference import leave_out_unread
from tests.safevlm.checkpoint.seeded_models import seeded_head


def write_folder(folder: Path, model: Any, config: dict[str, Any]) -> None:
    """Write a model's tensors by their names, the seeded guard head and any config."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file({**tensors, **seeded_head()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def ours(folder: Path) -> Any:
    """Return the model that this project computes with, as ``load_safe_vlm`` fills it."""
    checkpoint = open_checkpoint(folder, tap="projector")
    config = build_config(checkpoint)
    model: Any = on_meta(lambda: architecture_of(config).whole_class(config))
    leave_out_unread(model.model, checkpoint.tensors)
    fill(model, checkpoint.tensors, prefix="")
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


def theirs(folder: Path) -> Any:
    """Return what transformers makes of the folder; its report of the guard head it has no place for is hushed."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    finally:
        transformers.logging.set_verbosity(level)
