"""A guard head in numpy: pooled image features to probabilities, without torch.

Shapes: T image tokens, D width of the language model, P pooled features, C classes.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from runtimes.language.gguf_artifact import HeadWeights

__all__ = ["head_logits", "pooled", "softmax"]

_erf = np.frompyfunc(math.erf, 1, 1)
Floats = npt.NDArray[np.float32]


def pooled(features_TD: Floats, pooling: Literal["mean", "mean_max_std"]) -> Floats:
    """Pool over the image tokens as ``safevlm.network.pooling`` does: P = D for ``mean``, 3 · D otherwise."""
    mean = features_TD.mean(axis=0, dtype=np.float64)
    if pooling == "mean":
        return np.asarray(mean, np.float32)
    spread = np.sqrt(np.square(features_TD - mean).mean(axis=0))
    return np.asarray(np.concatenate([mean, features_TD.max(axis=0), spread]), np.float32)


def head_logits(weights: HeadWeights, pooled_P: Floats) -> Floats:
    """Return C logits of one image's pooled features."""
    values = pooled_P
    for number, (weight, bias) in enumerate(weights.layers):
        values = weight @ values + bias
        if number + 1 < len(weights.layers):
            values = (values * 0.5 * (1 + _erf(values / math.sqrt(2)).astype(np.float32))).astype(np.float32)
    return values


def softmax(logits_C: Floats) -> Floats:
    """Return C probabilities."""
    raised = np.exp(logits_C - logits_C.max())
    return np.asarray(raised / raised.sum(), np.float32)
