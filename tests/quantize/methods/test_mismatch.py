"""A weight is moved to where least squares over both models' inputs puts it, and error falls by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantize.methods import hessian
from quantize.methods.hessian import CrossMoments, Hessian
from quantize.methods.mismatch import Moved, moved_weights
from quantize.methods.solver import SolveOptions
from safevlm.errors import InputError
from tests.quantize.methods.test_hessian import with_sinks

DAMP = 0.1


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(weights: list[Tensor], original: Tensor, inputs: Tensor, counts: Tensor, share: float) -> list[Moved]:
    """Move weights by what two batches of tokens say."""
    second, cross = Hessian(inputs.shape[1]), CrossMoments(inputs.shape[1])
    for rows in (slice(0, 50), slice(50, None)):
        second.add(inputs[rows], counts[rows])
        cross.add(original[rows], inputs[rows], counts[rows])
    moments = second.mean()
    before = moments.clone()
    found = moved_weights(weights, moments, cross.mean(), share, DAMP)
    assert torch.equal(moments, before), "second moments are the solver's to use"
    return found


def by_least_squares(weight: Tensor, original: Tensor, inputs: Tensor, counts: Tensor, share: float) -> Tensor:
    """Return V of least share · |W x - V y|² + (1 - share) · |W y - V y|² + damping · |W - V|², from the tokens."""
    w, x, y = weight.double(), original.double(), inputs.double()
    root = (counts.double() / counts.sum()).sqrt().unsqueeze(1)
    sizes = (root * y).square().sum(dim=0)
    damping = DAMP * sizes[sizes > 0].mean()
    parts = [
        (share**0.5 * root * y, share**0.5 * root * (x @ w.T)),
        ((1 - share) ** 0.5 * root * y, (1 - share) ** 0.5 * root * (y @ w.T)),
        (damping.sqrt() * torch.eye(len(sizes), dtype=torch.double), damping.sqrt() * w.T),
    ]
    return torch.linalg.lstsq(*(torch.cat(part) for part in zip(*parts, strict=True))).solution.T


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_it_is_the_least_squares_solution(share: float) -> None:
    """Also with tokens that count differently, and a column that is always zero."""
    inputs = drawn(90, 24) @ drawn(24, 24, seed=1)
    original = inputs + 0.3 * drawn(90, 24, seed=2) + 0.2 * inputs.roll(1, dims=1)
    inputs[:, 5] = 0
    counts = torch.tensor([0.0, 1.0, 8.0] * 30)
    weights = [drawn(1030, 24, seed=3), drawn(7, 24, seed=4)]  # more rows than are moved together
    for weight, found in zip(weights, moved(weights, original, inputs, counts, share), strict=True):
        expected = by_least_squares(weight, original, inputs, counts, share)
        assert (found.weight - expected).abs().max() <= 1e-4
        assert (weight - expected).abs().max() >= 0.05, "it is to be moved"
        root = counts.unsqueeze(1).sqrt()
        outputs, change = (root * (inputs @ each.T) for each in (weight, found.weight - weight))
        assert found.distance == pytest.approx(float(change.norm() / outputs.norm()), rel=1e-3)


def test_inputs_that_were_mixed_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is M x: the weight becomes W M⁻¹."""
    monkeypatch.setattr(f"{__name__}.DAMP", 1e-6)
    mixed = torch.eye(16) + 0.1 * drawn(16, 16)
    original, weight = drawn(200, 16, seed=1), drawn(8, 16, seed=2)
    (found,) = moved([weight], original, original @ mixed.T, torch.ones(200), 1.0)
    assert (found.weight @ mixed - weight).abs().max() <= 1e-3


def test_the_same_inputs_move_nothing() -> None:
    inputs, weight = drawn(90, 16), drawn(8, 16)
    (found,) = moved([weight], inputs, inputs, torch.ones(90), 1.0)
    assert torch.equal(found.weight, weight) and found.distance == 0
    (silent,) = moved([weight], inputs, torch.zeros(90, 16), torch.ones(90), 1.0)
    assert torch.equal(silent.weight, weight) and silent.distance == 0


def test_rounded_products_stay_near_beside_attention_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = with_sinks(1024, 64).bfloat16()
    original = (inputs * 1.01 + 0.1 * drawn(1024, 64, seed=1)).bfloat16()
    difference = original.double() - inputs.double()
    exact = difference.T @ inputs.double() / len(inputs)
    scale = difference.square().mean(dim=0).sqrt().outer(inputs.double().square().mean(dim=0).sqrt())
    errors = {}
    for share in (hessian.STRONG_SHARE, 1024):
        monkeypatch.setattr(hessian, "STRONG_SHARE", share)
        cross = CrossMoments(64, products=torch.bfloat16)
        for rows in torch.arange(1024).split(256):
            cross.add(original[rows], inputs[rows])
        errors[share] = float(((cross.mean() - exact).abs() / scale).max())
    assert errors[32] <= 2**-8
    assert errors[32] < errors[1024] / 2, "without float32 for the strongest tokens"


def test_what_is_not_finite_or_empty_is_refused() -> None:
    for one, other in ((torch.nan, 1.0), (1.0, torch.inf)):
        with pytest.raises(InputError, match="NaN or infinity"):
            CrossMoments(1).add(torch.tensor([[one]]), torch.tensor([[other]]))
    with pytest.raises(InputError, match="no calibration token"):
        CrossMoments(2).mean()


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan"), float("inf")])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(InputError, match=r"--mismatch .* is not allowed. Give a share from 0 \(off\) to 1."):
        SolveOptions(mismatch=share)
    assert SolveOptions(mismatch=0).mismatch == 0 and SolveOptions(mismatch=1).mismatch == 1
