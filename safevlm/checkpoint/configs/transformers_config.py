"""Build transformers' config of a checkpoint from its raw ``config.json`` and the shapes of its tensors.

What is stated holds, and must agree with the tensors; what is unstated is the default of the class that the layout's
own library would use. A width that a tensor shows otherwise is read off it; a count that no tensor shows is never
guessed. Nothing of the checkpoint is executed and no language model's bytes are read, but for some rows of a second
embedding. What the layouts in the wild look like:

- original LLaVA: Llama's keys at the top level, the vision tower only as a name (``mm_vision_tower``);
- old Qwen2.5-VL: the language model's keys at the top level beside a ``vision_config``;
- transformers: ``text_config`` and ``vision_config``, each holding only what differs from a default.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeAlias

from huggingface_hub.errors import StrictDataclassError

from safevlm.checkpoint.architectures import ARCHITECTURES
from safevlm.checkpoint.configs.config_checks import check_language, check_vision
from safevlm.checkpoint.configs.stated_shapes import Shapes
from safevlm.checkpoint.configs.text_section import EMBEDDING, check_second_embedding
from safevlm.errors import CheckpointError

if TYPE_CHECKING:
    from safevlm.checkpoint.checkpoint import Checkpoint

__all__ = ["TransformersConfig", "build_config", "build_vision_config"]

TransformersConfig: TypeAlias = Any
"""A config of one of the classes that ``safevlm.checkpoint.architectures`` names; their fields differ."""


def build_config(checkpoint: Checkpoint) -> TransformersConfig:
    """Return transformers' own config of this checkpoint, with ``sdpa`` attention.

    A LLaVA config has ``vision_feature_layer`` counted from the first layer (hidden state ``n`` is the
    output of ``n`` layers), so that a tower stored without the layers behind it means the same.

    Raises CheckpointError when a stated width disagrees with a tensor, a tensor that decides a width is
    missing, or a value is not one that transformers takes.
    """
    config = _build(checkpoint, Shapes(checkpoint.tensors, checkpoint.name))
    if EMBEDDING in checkpoint.tensors:
        check_language(config, ARCHITECTURES[checkpoint.family.key], checkpoint.name)
    if config.tie_word_embeddings:
        check_second_embedding(checkpoint.tensors, checkpoint.name)
    return config


def build_vision_config(checkpoint: Checkpoint) -> TransformersConfig:
    """Return the same, but of the language model only its width: the rest is one layer of width 1.

    Only shapes of the vision tower and the projector are asked for, so that shards of the language model
    are not fetched. Raises as ``build_config``.
    """
    return _build(checkpoint, Shapes(checkpoint.tensors, checkpoint.name, checkpoint.family.vision_prefixes))


def _build(checkpoint: Checkpoint, shapes: Shapes) -> TransformersConfig:
    raw = copy.deepcopy(dict(checkpoint.config))  # transformers changes the rotary dicts that it is given
    architecture = ARCHITECTURES[checkpoint.family.key]
    try:
        config = architecture.build_config(raw, shapes)
    except (StrictDataclassError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.name}: config.json holds a value that transformers' config of {checkpoint.family.title} "
            f"refuses: {' '.join(str(error).split())[:300]}. Compare it with the base model's config.json."
        ) from error
    config._attn_implementation = "sdpa"
    check_vision(config, architecture, checkpoint.name)
    return config
