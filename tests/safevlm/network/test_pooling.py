"""Pooling equals what numpy makes of the same rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safevlm.network.pooling import POOLINGS, Pooling, pool, pooled_width


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_is_what_its_name_says(pooling: Pooling) -> None:
    features = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    rows = features.numpy()
    expected = {"mean": rows.mean(1), "mean_max_std": np.concatenate([rows.mean(1), rows.max(1), rows.std(1)], axis=1)}
    assert np.abs(pool(features, pooling).numpy() - expected[pooling]).max() <= 1e-6
    assert pool(features, pooling).shape == (3, pooled_width(pooling, 5))


def test_half_precision_is_pooled_in_float32() -> None:
    features = torch.full((1, 4096, 2), 0.1, dtype=torch.bfloat16)
    pooled = pool(features, "mean")
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, features[:, 0].float())  # a bfloat16 sum of 4096 would have lost digits
