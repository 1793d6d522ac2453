"""The untouched torch path of the guard, which every export is compared with.

Modules are transformers' own classes. They are laid out with their parameters on the ``meta`` device and
filled tensor by tensor from the checkpoint, so only what the path reads is ever in memory.

Shapes: N images, H × W pixels, T image tokens, D width of the language model, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from safevlm.checkpoint.architectures import architecture_of
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.checkpoint.configs.transformers_config import TransformersConfig, build_vision_config
from safevlm.checkpoint.family import Family
from safevlm.checkpoint.ignored import report_unplaced
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import GuardHeadError, InputError
from safevlm.network.filling import fill, on_meta
from safevlm.network.geometry import VisionGeometry
from safevlm.network.head import GuardHead, build_head
from safevlm.network.pooling import Pooling, pool

if TYPE_CHECKING:
    from safevlm.checkpoint.checkpoint import Checkpoint
    from safevlm.checkpoint.weights.tensors import TensorStore
    from safevlm.network.distilled_head import DistilledHead

__all__ = [
    "GuardModel",
    "VisionPath",
    "build_reference_guard",
    "build_vision",
    "guard_sha256",
    "image_features",
    "leave_out_unread",
]

MODEL_PREFIX = "model."
"""Where transformers' inner models (``LlavaModel`` and its like) stand in canonical names."""


# -- the vision path ------------------------------------------------------------------------------------


class VisionPath(nn.Module):
    """uint8 RGB to projector output, through ``get_image_features`` of transformers' inner model.

    ``core`` is transformers' inner model of the family without its language model.
    """

    def __init__(self, core: nn.Module, config: TransformersConfig, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.core = core
        self.config = config
        self._architecture = architecture_of(config)
        self.geometry = self._architecture.geometry(config)
        self.preprocessing = preprocessing

    @property
    def tower(self) -> nn.Module:
        """The vision tower (in Qwen2.5-VL with the merger at its end)."""
        return self.core.get_submodule(self._architecture.tower)

    @property
    def projector(self) -> nn.Module:
        """What maps the tower's output to the language model's width."""
        return self.core.get_submodule(self._architecture.projector)

    def forward(self, rgb_NHWC: Tensor) -> Tensor:
        """Return N × T × D image features; InputError when the images' size is not the tower's."""
        return image_features(self.core, self.geometry, self.preprocessing, rgb_NHWC)


def image_features(core: nn.Module, geometry: VisionGeometry, preprocessing: Preprocessing, rgb_NHWC: Tensor) -> Tensor:
    """Normalise uint8 RGB and return the N × T × D features that ``core`` makes of it."""
    if rgb_NHWC.dtype != torch.uint8 or rgb_NHWC.ndim != 4 or rgb_NHWC.shape[-1] != 3:
        raise InputError(
            f"images have shape {tuple(rgb_NHWC.shape)} and dtype {rgb_NHWC.dtype}; N x H x W x 3 of "
            "torch.uint8 is needed, as Preprocessing.apply returns them."
        )
    geometry.check_size(*rgb_NHWC.shape[1:3])
    dtype = next(core.parameters()).dtype
    inputs = geometry.inputs(normalize(rgb_NHWC, preprocessing).to(dtype))
    # LLaVA and Qwen answer with a list of T x D, Gemma-3 with N x T x D: both are N of T x D.
    output = cast(Any, core).get_image_features(**inputs, return_dict=True)
    return torch.stack(tuple(output.pooler_output))


def normalize(rgb_NHWC: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return N × 3 × H × W float32: grey levels rescaled, then centred and scaled by channel."""
    mean = torch.tensor(preprocessing.mean, dtype=torch.float32, device=rgb_NHWC.device)
    std = torch.tensor(preprocessing.std, dtype=torch.float32, device=rgb_NHWC.device)
    scaled = rgb_NHWC.to(torch.float32) * preprocessing.rescale
    return ((scaled - mean) / std).permute(0, 3, 1, 2)


def _lay_out_core(config: TransformersConfig) -> nn.Module:
    """Return the inner model without its language model; ``config`` is one of ``build_vision_config``."""
    core = on_meta(lambda: architecture_of(config).inner_class(config))
    del core.language_model
    return core


def leave_out_unread(core: nn.Module, tensors: TensorStore) -> None:
    """Take modules out of ``core`` that nothing reads and that are not stored."""
    for name in architecture_of(cast(Any, core).config).unread:
        if f"{MODEL_PREFIX}{name}.weight" not in tensors:
            core.set_submodule(name, nn.Identity())


def build_vision(
    checkpoint: Checkpoint, grid: tuple[int, int] | None = None, *, dtype: torch.dtype = torch.float32
) -> VisionPath:
    """Return the vision tower and projector, whatever the tap; nothing of the language model is read.

    ``grid`` is the size in pixels (height, width) where the family lets one choose (Qwen2.5-VL).

    Raises CheckpointError for missing tensors or shapes that disagree; InputError for an impossible grid.
    """
    config = build_vision_config(checkpoint)
    preprocessing = read_processor(checkpoint.processor, family=checkpoint.family.key, grid=grid)
    architecture_of(config).geometry(config).check_size(preprocessing.height, preprocessing.width)
    core = _lay_out_core(config)
    leave_out_unread(core, checkpoint.tensors)
    fill(core, checkpoint.tensors, prefix=MODEL_PREFIX, dtype=dtype, own=True)
    report_unplaced(checkpoint.name, checkpoint.tensors, {MODEL_PREFIX + name for name, _ in core.named_parameters()})
    return VisionPath(core, config, preprocessing)


# -- the guard ------------------------------------------------------------------------------------------


class GuardModel(nn.Module):
    """A guard on the projector's output: image features, pooled over the image tokens, the head.

    The head is the checkpoint's own where its tap is the projector (``mean`` pooling), otherwise a distilled one.
    """

    def __init__(
        self,
        vision: VisionPath,
        head: GuardHead,
        family: Family,
        classes: tuple[str, ...],
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.vision = vision
        self.head = head
        self.family = family
        self.classes = classes

    @property
    def preprocessing(self) -> Preprocessing:
        """What brings an image file to this model's input."""
        return self.vision.preprocessing

    def features(self, rgb_NHWC: Tensor) -> Tensor:
        """Return the projector's output, N × T × D."""
        return cast(Tensor, self.vision(rgb_NHWC))

    def forward(self, rgb_NHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities and logits, both N × C in float32, of uint8 RGB images."""
        return self.answer(self.features(rgb_NHWC))

    def answer(self, features_NTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities and logits of the projector's output."""
        logits = self.head(pool(features_NTD, self.pooling))
        return torch.softmax(logits, dim=-1), logits


def guard_sha256(checkpoint: Checkpoint) -> str:
    """Return the hash of the tensors that a guard is made from: vision tower, projector and head."""
    return checkpoint.tensors.sha256([*checkpoint.vision_names(), *checkpoint.head_names()])


def build_reference_guard(
    checkpoint: Checkpoint,
    *,
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    distilled: DistilledHead | None = None,
) -> GuardModel:
    """Return a checkpoint's guard on the projector's output, from vision, projector and head alone.

    The head is the checkpoint's own, or ``distilled``, which brings the input size it was fitted at.

    Raises GuardHeadError for a tap behind the language model without a distilled head, and for a head that was
    made for another checkpoint; InputError for another ``grid`` than the head's.
    """
    if distilled is not None:
        distilled.check_fits(checkpoint, guard_sha256(checkpoint))
        vision = build_vision(checkpoint, grid or distilled.size, dtype=dtype)
        size = (vision.preprocessing.height, vision.preprocessing.width)
        if size != distilled.size:
            raise InputError(
                f"the guard head was fitted at {distilled.size[0]}x{distilled.size[1]} pixels, the input would be "
                f"{size[0]}x{size[1]}. Leave --grid out, or distil a head at that size."
            )
        return GuardModel(vision, distilled.head, checkpoint.family, checkpoint.classes, distilled.pooling)
    if checkpoint.tap.source != "projector":
        raise GuardHeadError(
            f"{checkpoint.name}: the guard taps the language model's last hidden state ({checkpoint.tap.learned}), so "
            f"its head does not fit the projector's output: the width is the same ({checkpoint.head.widths[0]}), but "
            "the verdicts would be noise. Fit a head for the projector first: python -m calibration.distill --model "
            f"{checkpoint.name} --images DIR --out FILE. If the checkpoint really taps the projector, pass "
            "tap='projector'."
        )
    head = build_head(checkpoint, dtype=dtype)
    return GuardModel(build_vision(checkpoint, grid, dtype=dtype), head, checkpoint.family, checkpoint.classes)
