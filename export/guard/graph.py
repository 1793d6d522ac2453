"""The guard as it is exported: uint8 pixels in, probabilities and logits out, nothing computed in vain.

Shapes: N images, H × W pixels, T image tokens, M width before the projector's last map, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from export.guard.trunks import Trunk, trunk_of
from export.rewrites.linear_after_mean import fold_linear
from export.rewrites.transposed_weights import turn_weights_round
from safevlm.checkpoint.weights.finite import is_finite
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import CheckpointError
from safevlm.network.head import GuardHead
from safevlm.network.pooling import Pooling, pool
from safevlm.network.reference import GuardModel, VisionPath

__all__ = [
    "PRECISIONS",
    "Graph",
    "GuardGraph",
    "HeadGraph",
    "Precision",
    "VisionGraph",
    "build_graph",
    "build_head_graph",
    "build_vision_graph",
]

Precision = Literal["fp32", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


class Graph(nn.Module):
    """What can be written as ONNX: a module that names what it returns."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in their order."""
        raise NotImplementedError


class GuardGraph(Graph):
    """uint8 N × H × W × 3 to probabilities and logits, float32 N × C, and image embeddings, if asked for.

    ``trunk`` gives the N × T × M tokens before the projector's last linear map, ``last``. For mean pooling that
    map is folded into ``head``, which reads the mean of the trunk's tokens; else ``head`` reads ``last``'s output,
    pooled. Normalisation, pooling, the head and the softmax run in float32 whatever the trunk's precision.
    """

    def __init__(
        self,
        trunk: Trunk,
        head: nn.Module,
        preprocessing: Preprocessing,
        *,
        pooling: Pooling = "mean",
        embeddings: bool = False,
    ) -> None:
        super().__init__()
        self.normalise = Normalise(preprocessing)
        self.trunk = trunk
        self.head = head
        self.pooling = pooling
        self.embeddings = embeddings

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what :meth:`forward` returns."""
        return ("probs", "logits", "embeddings") if self.embeddings else ("probs", "logits")

    def forward(self, rgb: Tensor) -> tuple[Tensor, ...]:
        """Return ``probs``, ``logits`` and, with embeddings, the projector's output, float32 N × T × D."""
        tokens = self.trunk(self.normalise(rgb))
        features = self.trunk.project(tokens) if self.embeddings or self.pooling != "mean" else tokens
        pooled = tokens.to(torch.float32).mean(dim=1) if self.pooling == "mean" else pool(features, self.pooling)
        logits = self.head(pooled)
        answer = (torch.softmax(logits, dim=-1), logits)
        return (*answer, features.to(torch.float32)) if self.embeddings else answer


class VisionGraph(Graph):
    """uint8 N × H × W × 3 to image embeddings alone: float32 N × T × D, as the language model takes them."""

    outputs = ("embeddings",)

    def __init__(self, trunk: Trunk, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.normalise = Normalise(preprocessing)
        self.trunk = trunk

    def forward(self, rgb: Tensor) -> Tensor:
        """Return ``embeddings``."""
        embeddings: Tensor = self.trunk.project(self.trunk(self.normalise(rgb))).to(torch.float32)
        return embeddings


class HeadGraph(Graph):
    """The language model's last hidden states over the image tokens, float32 N × T × D, to probs and logits."""

    outputs = ("probs", "logits")

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``probs`` and ``logits``."""
        logits = self.head(hidden.mean(dim=1))
        return torch.softmax(logits, dim=-1), logits


class Normalise(nn.Module):
    """Grey levels uint8 N × H × W × 3 to float32 N × 3 × H × W, centred and scaled by channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        self.register_buffer("scale", (preprocessing.rescale / std).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def forward(self, rgb: Tensor) -> Tensor:
        """Return normalised pixels."""
        return (rgb.to(torch.float32) * self.scale + self.shift).permute(0, 3, 1, 2)


def build_graph(guard: GuardModel, precision: Precision = "fp32", *, embeddings: bool = False) -> GuardGraph:
    """Return the export graph of a guard on the projector, made of the guard's own weights, which it rearranges.

    In fp16 the trunk's weights and activations are half precision; layer norms and RMS norms keep their
    float32 accumulation.
    """
    trunk = trunk_of(guard.vision, guard.family.key)
    steps = [step for step in guard.head.mlp if not isinstance(step, nn.Dropout)]
    if guard.pooling == "mean":
        first = steps[0]
        assert isinstance(first, nn.Linear)
        steps[0] = folded = fold_linear(trunk.last.weight, trunk.last.bias, first)
        if not (is_finite(folded.weight) and is_finite(folded.bias)):
            raise CheckpointError(
                "the product of the projector's last layer and the guard head's first exceeds float32. The "
                "checkpoint's numbers are too large; nothing was exported."
            )
    head = nn.Sequential(*steps)
    trunk = _in_precision(trunk, precision, keep_last=embeddings or guard.pooling != "mean")
    return GuardGraph(trunk, head, guard.preprocessing, pooling=guard.pooling, embeddings=embeddings).eval()


def build_vision_graph(vision: VisionPath, family: str, precision: Precision = "fp32") -> VisionGraph:
    """Return the export graph of a vision path alone."""
    return VisionGraph(_in_precision(trunk_of(vision, family), precision), vision.preprocessing).eval()


def build_head_graph(head: GuardHead) -> HeadGraph:
    """Return the export graph of a checkpoint's own head; it is always float32."""
    return HeadGraph(nn.Sequential(*(step for step in head.mlp if not isinstance(step, nn.Dropout)))).eval()


def _in_precision(trunk: Trunk, precision: Precision, *, keep_last: bool = True) -> Trunk:
    if not keep_last:
        del trunk.last
    turn_weights_round(trunk)
    return _HalfTrunk(trunk) if precision == "fp16" else trunk


class _HalfTrunk(Trunk):
    """A trunk in float16, fed with float32 pixels."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk.half()

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        tokens: Tensor = self.trunk(pixels_NCHW.half())
        return tokens

    def project(self, tokens_NTM: Tensor) -> Tensor:
        return self.trunk.project(tokens_NTM)
