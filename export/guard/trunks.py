"""Each family's vision path as the exported graph has it: its own modules, without what nothing reads.

Shapes: N images, H × W pixels, T image tokens, M width before the projector's last map, D width after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from export.rewrites.unread_layers import layers_read
from safevlm.network.fixed_windows import FixedWindowTower
from safevlm.network.reference import VisionPath

__all__ = ["TRUNKS", "Trunk", "last_map", "trunk_of"]


class Trunk(nn.Module):
    """A family's vision path up to the projector's last linear map, and that map.

    ``order``, where tokens do not come in the language model's order, brings them there.
    """

    last: nn.Linear
    order: Tensor | None = None

    def project(self, tokens_NTM: Tensor) -> Tensor:
        """Return the projector's output N × T × D, in the language model's order."""
        projected: Tensor = self.last(tokens_NTM)
        return projected if self.order is None else projected[:, self.order]


def last_map(weight_DM: Tensor, bias_D: Tensor | None) -> nn.Linear:
    """Return a linear map that shares a projector's own weights."""
    linear = nn.Linear(weight_DM.shape[1], weight_DM.shape[0], bias=bias_D is not None, device="meta")
    linear.weight = nn.Parameter(weight_DM, requires_grad=False)
    if bias_D is not None:
        linear.bias = nn.Parameter(bias_D, requires_grad=False)
    return linear


class LlavaTrunk(Trunk):
    """CLIP up to the last layer that LLaVA reads, then the projector's first layer and activation.

    Several hidden states that are read are concatenated, as in transformers.
    """

    def __init__(self, vision: VisionPath) -> None:
        super().__init__()
        tower, projector, config = _parts(vision)
        self.embeddings, self.norm = tower.embeddings, tower.pre_layrnorm
        read, count = config.vision_feature_layer, len(tower.encoder.layers)
        self.read = [layers_read(count, layer) for layer in ([read] if isinstance(read, int) else read)]
        self.layers = tower.encoder.layers[: max(self.read)]
        self.class_tokens = int(config.vision_feature_select_strategy == "default")
        self.linear, self.act = projector.linear_1, projector.act
        self.last = last_map(projector.linear_2.weight, projector.linear_2.bias)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Return N × T × M tokens before ``linear_2``."""
        states = [self.norm(self.embeddings(pixels_NCHW))]
        for layer in self.layers:
            states.append(layer(states[-1], attention_mask=None))
        read = torch.cat([states[index][:, self.class_tokens :] for index in self.read], dim=-1)
        tokens: Tensor = self.act(self.linear(read))
        return tokens


class GemmaTrunk(Trunk):
    """SigLIP, Gemma-3's pooling of patches and its norm."""

    def __init__(self, vision: VisionPath) -> None:
        super().__init__()
        tower, projector, _ = _parts(vision)
        self.embeddings, self.layers, self.norm = tower.embeddings, tower.encoder.layers, tower.post_layernorm
        self.side, self.pool = projector.patches_per_image, projector.avg_pool
        self.token_norm = projector.mm_soft_emb_norm
        self.last = last_map(projector.mm_input_projection_weight.T, None)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Return N × T × M tokens before the input projection."""
        hidden = self.embeddings(pixels_NCHW)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None)
        grid = self.norm(hidden).transpose(1, 2).unflatten(2, (self.side, self.side))
        tokens: Tensor = self.token_norm(self.pool(grid).flatten(2).transpose(1, 2))
        return tokens


class QwenTrunk(Trunk):
    """Qwen2.5-VL's tower at one grid, and its merger up to the second Linear."""

    def __init__(self, vision: VisionPath) -> None:
        super().__init__()
        tower, merger, _ = _parts(vision)
        size = vision.preprocessing
        self.tower = FixedWindowTower(tower, size.height, size.width)
        self.norm, self.width = merger.ln_q, merger.hidden_size
        self.linear, self.act = merger.mlp[0], merger.mlp[1]
        self.last = last_map(merger.mlp[2].weight, merger.mlp[2].bias)
        self.order = self.tower.reading_order

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Return N × T × M tokens before the merger's second Linear, in window order."""
        merged = self.norm(self.tower(pixels_NCHW)).flatten(1).unflatten(1, (-1, self.width))
        tokens: Tensor = self.act(self.linear(merged))
        return tokens


def _parts(vision: VisionPath) -> tuple[Any, Any, Any]:
    return vision.tower, vision.projector, vision.config


TRUNKS: dict[str, Callable[[VisionPath], Trunk]] = {
    "llava": LlavaTrunk,
    "qwen2_5_vl": QwenTrunk,
    "gemma3": GemmaTrunk,
}
"""By the families' keys."""


def trunk_of(vision: VisionPath, family: str) -> Trunk:
    """Return a family's vision path up to the projector's last linear map, made of the path's own modules."""
    return TRUNKS[family](vision)
