"""Write a trained tiny checkpoint as the real ones are published: stored names, config, processor, template."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.tiny.network import TinyNetwork
from calibration.holisafe_mini.scene import world
from safevlm.checkpoint.family import HEAD_PREFIX

__all__ = ["ship"]


def ship(network: TinyNetwork, folder: Path) -> None:
    """Write weights (float16), ``config.json``, ``preprocessor_config.json`` and generation settings."""
    blueprint = network.blueprint
    tensors = {
        blueprint.stored_name(name): tensor.to(torch.float16).contiguous()
        for name, tensor in network.model.state_dict().items()
        if not (network.model.config.tie_word_embeddings and name == "lm_head.weight")
    }
    for name, tensor in network.head.state_dict().items():
        tensors[HEAD_PREFIX + name] = tensor.to(torch.float16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    categories = ["safe", *world()["classes"]]
    _write(folder / "config.json", {**blueprint.config, "safety_categories": categories})
    _write(folder / "preprocessor_config.json", blueprint.processor)
    template = resources.files("safevlm.checkpoint").joinpath("chat_templates", f"{blueprint.family}.jinja")
    (folder / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
