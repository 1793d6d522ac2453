"""GPTQ against a slow and obvious one, and against rounding to the nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.methods.grid import Scheme, dequantize, fit_grid, groups_of, round_to_grid
from quantize.methods.solver import ActOrder, SolveOptions, solve
from safevlm.errors import InputError


def inputs_and_weights(rows: int, width: int, seed: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Return H of correlated inputs, and weights, in float64 so that no rounding decides between two integers."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    tokens_TC = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ (mix / width**0.5)
    tokens_TC = (
        tokens_TC * torch.logspace(-1, 0.5, width, dtype=torch.float64)[torch.randperm(width, generator=generator)]
    )
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return tokens_TC.T @ tokens_TC / tokens, weight


def slow_gptq(
    weight: Tensor, hessian: Tensor, scheme: Scheme, act_order: ActOrder, damp: float
) -> tuple[Tensor, Tensor]:
    """Return weights and integers by optimal brain surgery, the inverse of H shrunk by elimination column by column."""
    width = weight.shape[1]
    columns = scheme.columns(width, "w")
    hessian = hessian.clone()
    alive = hessian.diagonal() > 0
    mean = hessian.diagonal()[alive].mean()
    order = (
        torch.arange(width) if act_order == "none" else torch.argsort(hessian.diagonal(), descending=True, stable=True)
    )
    hessian.diagonal()[~alive] = mean
    hessian += damp * mean * torch.eye(width)
    inverse = torch.linalg.inv(hessian[order][:, order])
    working = weight[:, order].clone()
    result, integers = torch.empty_like(working), torch.empty_like(working)
    before = fit_grid(weight, scheme, columns)
    fit = before
    for k in range(width):
        if act_order == "static" or columns == width:
            grid, group = before, int(order[k]) // columns
        else:
            if k % columns == 0:
                fit = fit_grid(working[:, k : k + columns], scheme, columns)
            grid, group = fit, 0
        scale, zero = grid.scale[:, group], grid.zero[:, group]
        integers[:, k] = (torch.round(working[:, k] / scale) + zero).clamp(0, scheme.largest)
        result[:, k] = (integers[:, k] - zero) * scale
        error = (working[:, k] - result[:, k]) / inverse[0, 0]
        working[:, k:] -= torch.outer(error, inverse[0])
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    back = torch.argsort(order)
    return result[:, back], integers[:, back]


def cost(weight: Tensor, found: Tensor, hessian: Tensor) -> float:
    return float(torch.trace((weight - found) @ hessian @ (weight - found).T))


@pytest.mark.parametrize("act_order", ["none", "group", "static"])
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits=4, group_size=32),
        Scheme(bits=3, group_size=64, symmetric=False),
        Scheme(bits=2, group_size=-1),
        Scheme(bits=8, group_size=192),
    ],
    ids=str,
)
def test_it_is_the_published_method(scheme: Scheme, act_order: ActOrder) -> None:
    hessian, weight = inputs_and_weights(24, 192, seed=1)
    hessian[5] = hessian[:, 5] = 0  # a dead column
    options = SolveOptions(act_order=act_order, search=False, sweeps=0, damp=0.05, block=48)
    (found,) = solve([weight], hessian, scheme, options)
    expected, integers = slow_gptq(weight, hessian, scheme, act_order, 0.05)
    assert torch.equal(found.ints.double(), integers)
    assert (found.weight() - expected).abs().max() <= 1e-9
    assert found.loss == pytest.approx(cost(weight, expected, hessian), rel=1e-9)
    assert found.dead_columns == 1 and found.kept == "gptq" and found.damp == 0.05
    assert act_order == "group" or torch.equal(found.group_of, groups_of(192, scheme.columns(192, "w")))


@pytest.mark.parametrize("search", [True, False])
def test_linears_that_share_inputs_are_solved_as_if_alone(search: bool) -> None:
    hessian, weight = inputs_and_weights(40, 128, seed=2)
    parts = [weight[:8], weight[8:20], weight[20:]]
    scheme, options = Scheme(bits=4, group_size=32), SolveOptions(search=search)
    for part, found in zip(parts, solve(parts, hessian, scheme, options), strict=True):
        (alone,) = solve([part], hessian, scheme, options)
        assert torch.equal(found.ints, alone.ints)
        assert found.loss == pytest.approx(alone.loss) and found.rtn_loss == pytest.approx(alone.rtn_loss)


@pytest.mark.parametrize(("bits", "ratio"), [(2, 0.75), (3, 0.65), (4, 0.6), (8, 0.6)])
def test_it_costs_far_less_than_rounding_to_the_nearest(bits: int, ratio: float) -> None:
    hessian, weight = inputs_and_weights(64, 256, seed=3, tokens=600)
    options = SolveOptions(damp=0.05, sweeps=0)
    (found,) = solve([weight.float()], hessian.float(), Scheme(bits=bits, group_size=64), options)
    assert found.loss < ratio * found.rtn_loss
    plain = fit_grid(weight, Scheme(bits=bits, group_size=64), 64)
    groups = groups_of(256, 64)
    nearest = dequantize(round_to_grid(weight, plain, Scheme(bits=bits, group_size=64), groups), plain, groups)
    assert found.rtn_loss == pytest.approx(cost(weight, nearest, hessian), rel=1e-2)
    assert found.loss == pytest.approx(cost(weight, found.weight().double(), hessian), rel=1e-2)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(["none", "group", "static"]),
    st.booleans(),
    st.integers(1, 80),
    st.integers(0, 10**6),
)
def test_it_is_never_worse_than_rounding_to_the_nearest(
    bits: int, act_order: ActOrder, search: bool, tokens: int, seed: int
) -> None:
    hessian, weight = inputs_and_weights(6, 64, seed, tokens)  # fewer tokens than columns: H is singular
    scheme = Scheme(bits=bits, group_size=16, symmetric=bool(seed % 2))
    (found,) = solve([weight], hessian, scheme, SolveOptions(act_order=act_order, search=search))
    plain, groups = fit_grid(weight, scheme, 16), groups_of(64, 16)
    nearest = dequantize(round_to_grid(weight, plain, scheme, groups), plain, groups)
    assert cost(weight, found.weight(), hessian) <= cost(weight, nearest, hessian) * (1 + 1e-9)


def test_damping_grows_until_the_factorisation_holds_and_says_so() -> None:
    hessian, weight = inputs_and_weights(8, 64, seed=4)
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = -0.2 * hessian.diagonal().mean()  # not positive definite, as float32 sums can become
    broken = vectors @ torch.diag(values) @ vectors.T
    broken = (broken + broken.T) / 2
    given = broken.clone()
    (found,) = solve([weight], given, Scheme(bits=4, group_size=32), SolveOptions(damp=0.05))
    assert found.damp == pytest.approx(0.5)
    assert torch.equal(given, broken), "the memory is given back as it was"


def test_inputs_that_are_always_zero_leave_rounding_to_the_nearest() -> None:
    weight = torch.randn(4, 32)
    (found,) = solve([weight], torch.zeros(32, 32), Scheme(bits=4, group_size=32), SolveOptions(search=False))
    assert found.dead_columns == 32 and found.loss == 0
    assert (found.weight() - weight).abs().max() <= 0.51 * found.grid.scale.abs().max() * 2


def test_what_is_not_finite_is_refused() -> None:
    for weight, hessian in (
        (torch.full((2, 32), torch.inf), torch.eye(32)),
        (torch.ones(2, 32), torch.eye(32) * torch.nan),
    ):
        with pytest.raises(InputError, match=r"model\.x: weights or activations"):
            solve([weight], hessian, Scheme(group_size=32), name="model.x")
    with pytest.raises(InputError, match="--damp 0"):
        SolveOptions(damp=0)
    with pytest.raises(InputError, match="--sweeps -1"):
        SolveOptions(sweeps=-1)
