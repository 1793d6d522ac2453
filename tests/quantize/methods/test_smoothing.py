"""Factors balance inputs and weights; a descent from them makes less error, and never moves what must stay equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantize.methods.int8_method import _rounding_error
from quantize.methods.smoothing import _slope, descend, migration


def drawn(seed: int = 0, tokens: int = 256, rows: int = 96, columns: int = 64) -> tuple[Tensor, Tensor]:
    """Return inputs of which some channels are large, T × C, and a weight, R × C."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(columns, generator=generator))
    inputs = torch.randn(tokens, columns, generator=generator) * spread
    inputs[:, 3] *= 20
    return inputs, torch.randn(rows, columns, generator=generator) * torch.rand(columns, generator=generator)


def test_migration_balances_and_leaves_dead_channels() -> None:
    largest, widest = torch.tensor([100.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
    assert torch.equal(migration(largest, widest, 0.0), torch.ones(3))
    factor = migration(largest, widest, 0.5)
    assert factor[0] / factor[1] == pytest.approx(10.0)
    assert factor[2] == factor[1] and float(factor.log().mean()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_descent_makes_less_error_than_the_best_strength_also_on_other_tokens(seed: int) -> None:
    inputs, weight = drawn(seed, tokens=512)
    seen, other = inputs[::2], inputs[1::2]
    largest, widest = seen.abs().amax(dim=0), weight.abs().amax(dim=0)
    factors = [migration(largest, widest, strength) for strength in (0.0, 0.3, 0.5, 0.7, 0.9)]
    best = min(factors, key=lambda factor: _rounding_error([weight], factor, seen))
    found = descend(best, seen, [weight], torch.arange(64), steps=60)
    assert _rounding_error([weight], found, other) < 0.95 * _rounding_error([weight], best, other)
    assert float(found.log().mean()) == pytest.approx(0.0, abs=1e-5)


def test_the_slope_is_that_of_the_expected_error() -> None:
    inputs, weight = drawn()

    def error(logs: Tensor) -> Tensor:
        factor = logs.exp()
        step_T, step_R = (inputs / factor).abs().amax(dim=1) / 127.5, (weight * factor).abs().amax(dim=1) / 127.5
        moved = step_T.square().mean() * (factor * weight).square().sum()
        return (moved + 0.5 * step_R.square().sum() * (inputs / factor).square().mean(dim=0).sum()).log()

    logs = (0.3 * torch.randn(64, generator=torch.Generator().manual_seed(5))).requires_grad_()
    error(logs).backward()  # type: ignore[no-untyped-call]
    assert logs.grad is not None
    power, gain = inputs.square().mean(dim=0), weight.square().sum(dim=0)
    found = _slope(logs.detach().exp(), inputs.abs(), weight.abs(), power, gain)
    assert torch.allclose(found, logs.grad, atol=1e-5)


def test_channels_of_one_place_keep_one_factor() -> None:
    inputs, weight = drawn()
    places = torch.arange(64) // 4
    found = descend(torch.ones(64), inputs, [weight], places, steps=20).view(16, 4)
    assert torch.equal(found, found[:, :1].expand(16, 4)) and found.std() > 0.01


def test_dead_channels_and_no_steps_do_no_harm() -> None:
    inputs, weight = drawn()
    inputs[:, 5], weight[:, 9] = 0, 0
    factor = migration(inputs.abs().amax(dim=0), weight.abs().amax(dim=0).clamp(min=1e-5), 0.5)
    assert bool(torch.isfinite(descend(factor, inputs, [weight], torch.arange(64), steps=60)).all())
    assert torch.allclose(descend(factor, inputs, [weight], torch.arange(64), steps=0), factor)
    assert bool(torch.isfinite(descend(torch.ones(64), 0 * inputs, [0 * weight], torch.arange(64), steps=5)).all())
