"""What the families with a CLIP or SigLIP tower share in llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import CheckpointError

__all__ = ["GELU", "PROJECTOR", "TOWER", "VIT_LAYER", "check_side", "require", "set_activation", "with_leaves"]

TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."
VIT_LAYER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
LARGEST_SIDE = 8192
GELU = ("gelu", "gelu_pytorch_tanh", "gelu_new")


def with_leaves(names: Mapping[str, str]) -> dict[str, str]:
    """Return modules and places with their weights and biases."""
    return {f"{name}.{leaf}": f"{place}.{leaf}" for name, place in names.items() for leaf in ("weight", "bias")}


def require(section: Any, key: str, *allowed: Any) -> None:
    """Refuse a setting of the tower or projector that llama.cpp's graph does not compute. Raises CheckpointError."""
    value = getattr(section, key, None)
    if value not in allowed:
        raise CheckpointError(
            f"config.json states {key} = {value!r} of the vision tower or projector; llama.cpp's graph computes "
            f"{' or '.join(map(repr, allowed))}. Use another runtime."
        )


def set_activation(writer: Any, tower: Any) -> None:
    """Set the tower's activation; llama.cpp computes GELU by its tanh formula, which is off by 5e-4 at most."""
    require(tower, "hidden_act", "quick_gelu", *GELU)
    if tower.hidden_act in GELU:
        writer.add_vision_use_gelu(True)


def check_side(_: Any, preprocessing: Preprocessing) -> None:
    """Refuse images larger than llama.cpp's towers of one size take. Raises CheckpointError."""
    if max(preprocessing.height, preprocessing.width) > LARGEST_SIDE:
        raise CheckpointError(
            f"config.json states images of {preprocessing.height}x{preprocessing.width} pixels; llama.cpp's vision "
            f"towers support up to {LARGEST_SIDE} per side."
        )
