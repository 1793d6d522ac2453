"""Which classes of transformers compute a family, and what their code asks for: the contract of the tables here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from safevlm.network.positions import text_positions

if TYPE_CHECKING:
    from safevlm.checkpoint.configs.stated_shapes import Shapes
    from safevlm.network.geometry import VisionGeometry

__all__ = ["Architecture"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family as transformers has it. Module names are those within the inner model."""

    config_class: type
    """Class of the whole model's config; each family has one of its own."""
    build_config: Callable[[Mapping[str, Any], Shapes], Any]
    """Makes that config of a raw ``config.json`` and the shapes of the tensors."""
    inner_class: Callable[[Any], nn.Module]
    """Vision tower, projector and language model, without the output layer."""
    whole_class: Callable[[Any], nn.Module]
    """``…ForConditionalGeneration``."""
    rotary_class: Callable[..., nn.Module]
    """The language model's rotary embedding."""
    rotary_by_layer_type: bool = False
    """Whether it is asked for the frequencies of one kind of layers."""
    vision_rotary_class: Callable[..., nn.Module] | None = None
    """The vision tower's rotary embedding, None where it has none."""
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    unread: tuple[str, ...] = ()
    """Modules that nothing here reads and that checkpoints need not hold."""
    processor_class: str
    """transformers' processor, which puts an image's placeholders into a text."""
    placeholders: Callable[[Any], dict[str, Any]] = lambda _: {}
    """Says of a config what ``processor_config.json`` counts an image's placeholders by."""
    geometry: Callable[[Any], VisionGeometry]
    """Says of a config how images enter its vision path."""
    axes: int = 1
    """Numbers of one token's position."""
    positions: Callable[[Any, Tensor, Tensor, tuple[int, int]], Tensor] = text_positions
    """Makes positions of the inner model, the attention mask, the image mask and the image's size."""
    images_see_themselves: bool = False
    """Whether the tokens of one image attend to each other in both directions."""
