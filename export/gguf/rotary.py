"""Rotary embeddings as llama.cpp computes them: metadata keys, or a factor a frequency where a graph takes those.

transformers' own module of the model says which frequencies and which factor on cosine and sine are right; what
llama.cpp would make of the keys is computed beside them and must agree. Source: ``ggml_rope_yarn_corr_dims`` in
llama.cpp's ``ggml.c``, ``rope_yarn`` in ``ggml-cpu/ops.cpp``, ``llama-context.cpp`` for the factor of YaRN.

Shapes: R frequencies, half the width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.gguf.layout import laid_out
from export.gguf.writing import gguf_library
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.errors import CheckpointError

__all__ = ["Rotary", "rotary_of"]

TOLERANCE = 1e-4
"""Of a frequency or factor: what float32 loses is a thousandth of it."""
BETA_FAST, BETA_SLOW = 32.0, 1.0
"""YaRN's in llama.cpp; its three architectures here read no others."""
SCALE = "add_rope_scaling_attn_factors"
"""The library's method for the factor on cosine and sine."""
GROWING = ("dynamic", "longrope")
"""Kinds whose frequencies depend on how long the prompt is."""
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """How a rotary embedding is written: ``set_keys`` on the library's writer, R factors that divide frequencies."""

    set_keys: Callable[[Any], None]
    factors: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What transformers computes with: R frequencies, and the factor on cosine and sine."""

    frequencies: Numbers
    scale: float

    def is_near(self, frequencies: Numbers, scale: float) -> bool:
        same = np.allclose(frequencies, self.frequencies, rtol=TOLERANCE, atol=0)
        return bool(same) and math.isclose(scale, self.scale, rel_tol=TOLERANCE)


def rotary_of(checkpoint: Checkpoint, *, takes_factors: bool) -> Rotary:
    """Return how the rotary embedding of a checkpoint is written.

    ``takes_factors`` says whether the architecture's graph reads ``rope_freqs.weight``.

    Raises:
        CheckpointError: for a scaling that llama.cpp does not compute, by its name.
    """
    module = laid_out(checkpoint).model.language_model.rotary_emb
    parameters: Mapping[str, Any] = module.config.rope_parameters
    by_layer = "full_attention" in parameters
    stated: Mapping[str, Any] = parameters["full_attention"] if by_layer else parameters
    prefix = "full_attention_" if by_layer else ""
    if by_layer:
        _check_local(checkpoint, module)
        if not hasattr(module, f"{prefix}inv_freq"):  # every layer slides
            return Rotary(set_keys=lambda writer: writer.add_rope_freq_base(stated["rope_theta"]))
    wanted = _wanted(module, prefix)
    kind = str(stated.get("rope_type", "default"))
    base = float(stated["rope_theta"])
    plain = _frequencies(base, len(wanted.frequencies))
    if kind in GROWING:
        raise CheckpointError(
            f"{checkpoint.name}: its rotary embedding is scaled '{kind}', by the length of the prompt; llama.cpp "
            "scales every prompt alike. Only 'default', 'linear', 'llama3' and 'yarn' are supported."
        )
    keys = _plain_keys(kind, stated, wanted, plain)
    if keys is None and kind == "yarn":
        keys = _yarn_keys(stated, wanted, plain, base, module.config.max_position_embeddings)
    if keys is not None and not (by_layer and SCALE in keys):  # the scale would be on sliding layers, too
        return Rotary(set_keys=_setter(base, keys))
    if takes_factors and bool((wanted.frequencies > 0).all()):
        factors = (plain / wanted.frequencies).astype(np.float32)
        return Rotary(set_keys=_setter(base, {SCALE: wanted.scale}), factors=factors)
    settings = ", ".join(f"{key} = {value}" for key, value in stated.items() if key not in ("rope_type", "rope_theta"))
    raise CheckpointError(
        f"{checkpoint.name}: llama.cpp's graph of {checkpoint.family.title} does not compute the rotary scaling "
        f"'{kind}' with {settings or 'these settings'}. It computes 'default', 'linear', and 'yarn' with the default "
        "betas, truncation and (Gemma-3) attention factor. Use another runtime."
    )


def _wanted(module: Any, prefix: str) -> _Wanted:
    frequencies = getattr(module, f"{prefix}inv_freq").double().numpy()
    return _Wanted(frequencies=frequencies, scale=float(getattr(module, f"{prefix}attention_scaling")))


def _frequencies(base: float, count: int) -> Numbers:
    return np.power(base, -np.arange(count, dtype=np.float64) / count)


def _setter(base: float, keys: Mapping[str, Any]) -> Callable[[Any], None]:
    def set_keys(writer: Any) -> None:
        writer.add_rope_freq_base(base)
        for name, value in keys.items():
            getattr(writer, name)(value)

    return set_keys


def _plain_keys(kind: str, stated: Mapping[str, Any], wanted: _Wanted, plain: Numbers) -> dict[str, Any] | None:
    """Return the keys of no scaling or a linear one, None where the frequencies are not theirs."""
    if wanted.is_near(plain, 1.0):
        return {}
    factor = float(stated.get("factor") or 0)
    if kind != "linear" or factor <= 0 or not wanted.is_near(plain / factor, 1.0):
        return None
    linear = gguf_library().RopeScalingType.LINEAR
    return {"add_rope_scaling_type": linear, "add_rope_scaling_factor": factor}


def _yarn_keys(
    stated: Mapping[str, Any], wanted: _Wanted, plain: Numbers, base: float, longest: int
) -> dict[str, Any] | None:
    """Return the keys of YaRN, None where llama.cpp would make other frequencies of them."""
    original = int(stated["original_max_position_embeddings"])
    factor = float(stated.get("factor") or longest / original)
    own = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    if not wanted.is_near(_yarn_frequencies(plain, base, factor, original), wanted.scale):
        return None
    keys = {
        "add_rope_scaling_type": gguf_library().RopeScalingType.YARN,
        "add_rope_scaling_factor": factor,
        "add_rope_scaling_orig_ctx_len": original,
    }
    return keys if math.isclose(wanted.scale, own, rel_tol=TOLERANCE) else {**keys, SCALE: wanted.scale / own}


def _yarn_frequencies(plain: Numbers, base: float, factor: float, original: int) -> Numbers:
    """Return what llama.cpp makes of YaRN's keys."""
    width = 2 * len(plain)

    def corrected(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(0.0, math.floor(corrected(BETA_FAST)))
    high = min(width - 1.0, math.ceil(corrected(BETA_SLOW)))
    kept = 1 - np.clip((np.arange(len(plain)) - low) / max(0.001, high - low), 0, 1)
    return np.asarray(plain / factor * (1 - kept) + plain * kept)


def _check_local(checkpoint: Checkpoint, module: Any) -> None:
    """Refuse a scaled rotary embedding of sliding layers: llama.cpp scales that of the others alone."""
    local = module.config.rope_parameters.get("sliding_attention") or {}
    if not hasattr(module, "sliding_attention_inv_freq"):
        return
    wanted = _wanted(module, "sliding_attention_")
    if not wanted.is_near(_frequencies(float(local["rope_theta"]), len(wanted.frequencies)), 1.0):
        raise CheckpointError(
            f"{checkpoint.name}: its sliding layers scale their rotary embedding '{local.get('rope_type')}'; llama.cpp "
            "scales only that of full attention. Only 'default' is supported for sliding layers."
        )
