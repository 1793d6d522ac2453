"""The metadata of llama.cpp's ``mmproj`` file, and what its graphs of vision towers do not compute.

Source: ``clip.cpp``, ``clip-impl.h`` and ``models/`` of llama.cpp's ``tools/mtmd``.
"""

from __future__ import annotations

from typing import Any

from export.gguf.families import gguf_family_of
from export.gguf.families.family import GgufVision
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.configs.transformers_config import build_vision_config
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import CheckpointError

__all__ = ["vision_keys"]


def vision_keys(checkpoint: Checkpoint, preprocessing: Preprocessing, writer: Any) -> None:
    """Set the metadata of the projector file.

    Raises CheckpointError for a tower that llama.cpp's graph does not compute.
    """
    config = build_vision_config(checkpoint)
    tower: Any = config.vision_config
    vision = gguf_family_of(checkpoint).vision
    writer.add_type("mmproj")
    writer.add_name(checkpoint.name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(vision.projector)
    writer.add_vision_projection_dim(checkpoint.hidden_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(vision.layers_read(config))
    grey = 255 * preprocessing.rescale  # llama.cpp divides grey levels by 255
    writer.add_vision_image_mean([value / grey for value in preprocessing.mean])
    writer.add_vision_image_std([value / grey for value in preprocessing.std])
    vision.set_keys(writer, config)
    _check_tower(vision, tower)
    vision.check_size(config, preprocessing)


def _check_tower(vision: GgufVision, tower: Any) -> None:
    """Refuse what llama.cpp would fail on when it loads or first computes, where it ends the whole process."""
    heads, channels = getattr(tower, vision.head_count), getattr(tower, vision.channels)
    unit = vision.head_width_unit * heads
    if tower.hidden_size % unit:
        raise CheckpointError(
            f"config.json states a vision tower of width {tower.hidden_size} with {heads} heads; a multiple of {unit} "
            "is needed. Correct vision_config."
        )
    if channels != 3:
        raise CheckpointError(f"config.json states images of {channels} channels; llama.cpp supports 3.")
