"""What the torch path reads of a checkpoint: the parameters of transformers' own model, which are what is written.

Whatever else is stored (SigLIP's pooling head, position ids, rotary frequencies, a quantizer's leftovers) is left out
here as it is there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from safevlm.checkpoint.architectures import architecture_of
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.errors import CheckpointError
from safevlm.network.filling import check_stored, on_meta
from safevlm.network.reference import leave_out_unread

__all__ = ["laid_out", "parameters", "stored_as"]


@lru_cache(maxsize=1)
def laid_out(checkpoint: Checkpoint) -> Any:
    """Return transformers' model of a checkpoint, its parameters on ``meta``, its rotary frequencies computed.

    Raises:
        CheckpointError: for a config that transformers' model refuses, such as YaRN without its original length.
    """
    config = build_config(checkpoint)
    try:
        model: Any = on_meta(lambda: architecture_of(config).whole_class(config))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{checkpoint.name}: transformers cannot lay out the model that config.json describes: {error!r}. "
            "Compare it with the base model's config.json."
        ) from error
    leave_out_unread(model.model, checkpoint.tensors)
    return model


def parameters(checkpoint: Checkpoint, prefixes: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return canonical names and shapes of what is read below ``prefixes``; tied tensors count once.

    Raises:
        CheckpointError: for one that is missing or has another shape than the config says.
    """
    named = laid_out(checkpoint).named_parameters()
    wanted = {name: tuple(slot.shape) for name, slot in named if name.startswith(prefixes)}
    check_stored(wanted, checkpoint.tensors)
    return wanted


def stored_as(checkpoint: Checkpoint, name: str) -> str:
    """Return how the checkpoint's files name a tensor; a dequantized one keeps its canonical name."""
    try:
        return checkpoint.tensors.stored_name(name)
    except CheckpointError:
        return name
