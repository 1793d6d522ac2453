"""The guard as it is exported: uint8 pixels in, probabilities and logits out, nothing computed in vain.

Shapes: N images, H × W pixels, T image tokens, M width before the projector's last map, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from export.rewrites.linear_after_mean import fold_linear
from export.rewrites.unread_layers import layers_read
from models.fixed_windows import FixedWindowTower
from models.preprocessing import Preprocessing
from models.reference import GuardModel, VisionPath

__all__ = ["PRECISIONS", "GuardGraph", "Precision", "build_graph"]

Precision = Literal["fp32", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


class GuardGraph(nn.Module):
    """uint8 N × H × W × 3 to probabilities and logits, both float32 N × C.

    ``trunk`` gives the N × T × M tokens before the projector's last linear map, which is folded into ``head``.
    Normalisation, the mean over tokens, the head and the softmax run in float32 whatever the trunk's precision.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, trunk: nn.Module, head: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        self.register_buffer("scale", (preprocessing.rescale / std).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def forward(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``probs`` and ``logits``."""
        pixels = (rgb.to(torch.float32) * self.scale + self.shift).permute(0, 3, 1, 2)
        tokens = self.trunk(pixels)
        logits = self.head(tokens.to(torch.float32).mean(dim=1))
        return torch.softmax(logits, dim=-1), logits


class LlavaTrunk(nn.Module):
    """CLIP up to the layer that LLaVA reads, then the projector's first layer and activation."""

    def __init__(self, vision: VisionPath) -> None:
        super().__init__()
        tower, projector, config = _parts(vision)
        self.embeddings, self.norm = tower.embeddings, tower.pre_layrnorm
        self.layers = tower.encoder.layers[: layers_read(len(tower.encoder.layers), config.vision_feature_layer)]
        self.class_tokens = int(config.vision_feature_select_strategy == "default")
        self.linear, self.act = projector.linear_1, projector.act
        self.last = (projector.linear_2.weight, projector.linear_2.bias)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Return N × T × M tokens before ``linear_2``."""
        hidden = self.norm(self.embeddings(pixels_NCHW))
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None)
        tokens: Tensor = self.act(self.linear(hidden[:, self.class_tokens :]))
        return tokens


class GemmaTrunk(nn.Module):
    """SigLIP, Gemma-3's pooling of patches and its norm."""

    def __init__(self, vision: VisionPath) -> None:
        super().__init__()
        tower, projector, _ = _parts(vision)
        self.embeddings, self.layers, self.norm = tower.embeddings, tower.encoder.layers, tower.post_layernorm
        self.side, self.pool = projector.patches_per_image, projector.avg_pool
        self.token_norm = projector.mm_soft_emb_norm
        self.last = (projector.mm_input_projection_weight.T, None)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Return N × T × M tokens before the input projection."""
        hidden = self.embeddings(pixels_NCHW)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None)
        grid = self.norm(hidden).transpose(1, 2).unflatten(2, (self.side, self.side))
        tokens: Tensor = self.token_norm(self.pool(grid).flatten(2).transpose(1, 2))
        return tokens


class QwenTrunk(nn.Module):
    """Qwen2.5-VL's tower at one grid, and its merger up to the second Linear."""

    def __init__(self, vision: VisionPath) -> None:
        super().__init__()
        tower, merger, _ = _parts(vision)
        size = vision.preprocessing
        self.tower = FixedWindowTower(tower, size.height, size.width)
        self.norm, self.width = merger.ln_q, merger.hidden_size
        self.linear, self.act = merger.mlp[0], merger.mlp[1]
        self.last = (merger.mlp[2].weight, merger.mlp[2].bias)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Return N × T × M tokens before the merger's second Linear, in window order."""
        merged = self.norm(self.tower(pixels_NCHW)).flatten(1).unflatten(1, (-1, self.width))
        tokens: Tensor = self.act(self.linear(merged))
        return tokens


_TRUNKS: dict[str, Callable[[VisionPath], nn.Module]] = {
    "llava": LlavaTrunk,
    "qwen2_5_vl": QwenTrunk,
    "gemma3": GemmaTrunk,
}


def build_graph(guard: GuardModel, precision: Precision = "fp32") -> GuardGraph:
    """Return the export graph of a projector-tapped guard; it shares the guard's weights in fp32.

    In fp16 the trunk's weights and activations are half precision; layer norms and RMS norms keep their
    float32 accumulation.
    """
    trunk: Any = _TRUNKS[guard.family.key](guard.vision)
    first, *rest = guard.head.mlp
    assert isinstance(first, nn.Linear)
    weight, bias = trunk.last
    kept = (step for step in rest if not isinstance(step, nn.Dropout))
    head = nn.Sequential(fold_linear(weight, bias, first), *kept)
    graph = GuardGraph(trunk, head, guard.preprocessing)
    if precision == "fp16":
        graph.trunk = _HalfTrunk(trunk)
    return graph.eval()


class _HalfTrunk(nn.Module):
    """A trunk in float16, fed with float32 pixels."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk.half()

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        tokens: Tensor = self.trunk(pixels_NCHW.half())
        return tokens


def _parts(vision: VisionPath) -> tuple[Any, Any, Any]:
    return vision.tower, vision.projector, vision.config
