"""Second moments equal what is added up token by token."""

from __future__ import annotations

import pytest
import torch

from quantize.methods import hessian
from quantize.methods.hessian import Hessian
from safevlm.errors import InputError


def test_weighted_tokens_count_as_often_as_they_weigh() -> None:
    inputs = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5] * 5)
    found = Hessian(5)
    found.add(inputs[:8], weights[:8])
    found.add(inputs[8:].bfloat16().float(), weights[8:])
    inputs = torch.cat([inputs[:8], inputs[8:].bfloat16().float()]).double()
    expected = sum(w * torch.outer(x, x) for w, x in zip(weights.double(), inputs, strict=True)) / weights.sum()
    assert found.weight == weights.sum()
    assert (found.mean() - expected).abs().max() <= 1e-6


def test_unweighted_tokens_count_once() -> None:
    inputs = torch.randn(7, 3)
    one, other = Hessian(3), Hessian(3)
    one.add(inputs)
    other.add(inputs, torch.ones(7))
    assert one.weight == other.weight == 7
    assert torch.allclose(one.mean(), other.mean())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_or_empty_is_refused(bad: float) -> None:
    with pytest.raises(InputError, match="NaN or infinity"):
        Hessian(2).add(torch.tensor([[1.0, bad]]))
    with pytest.raises(InputError, match="no calibration token"):
        Hessian(2).mean()


def with_sinks(tokens: int, width: int) -> torch.Tensor:
    """Return inputs in which one token in 64 is huge in four columns, always alike: attention sinks."""
    inputs = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    inputs[::64, :4] = torch.tensor([3000.0, -2000.0, 1500.0, 1000.0])
    return inputs


def test_rounded_products_stay_near_and_definite_beside_attention_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = with_sinks(1024, 400)
    exact = inputs.double().T @ inputs.double() / len(inputs)
    errors, lowest = {}, {}
    for share in (hessian.STRONG_SHARE, 1024):
        monkeypatch.setattr(hessian, "STRONG_SHARE", share)
        sums = Hessian(400, products=torch.bfloat16)
        for part in inputs.split(256):
            sums.add(part)
        found = sums.mean().double()
        assert torch.equal(found, found.T)
        errors[share] = ((found - exact).abs() / exact.diagonal().sqrt().outer(exact.diagonal().sqrt())).max()
        lowest[share] = torch.linalg.eigvalsh(found).min()
    assert errors[32] <= 2**-8
    assert lowest[32] > 0 > lowest[1024], "without float32 for the strongest tokens it is indefinite"


def test_rounded_products_refuse_what_is_not_finite() -> None:
    with pytest.raises(InputError, match="NaN or infinity"):
        Hessian(2, products=torch.bfloat16).add(torch.tensor([[1.0, torch.nan]]))
