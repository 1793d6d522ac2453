"""Load the whole model of a checkpoint on torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from safevlm.checkpoint.architectures import architecture_of
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.checkpoint.ignored import report_unplaced
from safevlm.checkpoint.weights.quantized import QuantizedTensors, round_inputs
from safevlm.machine import memory_advice
from safevlm.network.device import torch_device
from safevlm.network.filling import fill, on_meta
from safevlm.network.head import build_head
from safevlm.network.prompt_tokens import fitting_tokenizer, stated_ends
from safevlm.network.reference import leave_out_unread
from safevlm.network.safe_vlm import SafeVLM

if TYPE_CHECKING:
    from safevlm.checkpoint.checkpoint import Checkpoint

__all__ = ["load_safe_vlm"]


def load_safe_vlm(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    grid: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> SafeVLM:
    """Return the whole model of a checkpoint, in evaluation mode and without gradients, tensor by tensor on ``device``.

    ``grid`` is the preprocessing contract's (height, width) where the family lets one choose (Qwen2.5-VL);
    the model itself takes every size that the family takes. A quantized checkpoint computes as it is stored.

    Raises CheckpointError for missing or mis-shaped tensors and for a folder without a tokenizer; InputError for a
    device that is not there or whose memory is full.
    """
    device = torch_device(device)
    config = build_config(checkpoint)
    tokenizer = fitting_tokenizer(checkpoint.folder, checkpoint.family.prompt, cast(Any, config).text_config.vocab_size)
    model: Any = on_meta(lambda: architecture_of(config).whole_class(config))
    leave_out_unread(model.model, checkpoint.tensors)
    with memory_advice("Free it, choose --dtype bfloat16, or --device cpu."):
        fill(model, checkpoint.tensors, prefix="", dtype=dtype, device=device)
    report_unplaced(checkpoint.name, checkpoint.tensors, {name for name, _ in model.named_parameters()})
    if config.tie_word_embeddings:
        model.tie_weights()
    if checkpoint.quantization is not None and checkpoint.quantization.rounds_inputs:
        round_inputs(model, cast(QuantizedTensors, checkpoint.tensors).quantized_modules())
    whole = SafeVLM(
        model,
        build_head(checkpoint, dtype=dtype),
        family=checkpoint.family,
        classes=checkpoint.classes,
        tap_source=checkpoint.tap.source,
        preprocessing=read_processor(checkpoint.processor, family=checkpoint.family.key, grid=grid),
        tokenizer=tokenizer,
        stated_ends=stated_ends(checkpoint.folder),
    ).eval()
    return whole.to(device)
