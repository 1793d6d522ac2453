"""Sweeps lower the cost that they are given, end where no single change lowers it, and stay on the grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.methods import solver
from quantize.methods.grid import Scheme, fit_grid, groups_of, round_to_grid
from quantize.methods.packing import pack_linear
from quantize.methods.solver import ActOrder, SolveOptions, solve
from quantize.methods.sweeps import Standing, sweep
from safevlm.checkpoint.weights.quantized import dequantized
from tests.quantize.methods.test_solver import cost, inputs_and_weights


def standing(weight: Tensor, scheme: Scheme) -> Standing:
    """Return weights rounded to the nearest."""
    columns = scheme.columns(weight.shape[1], "w")
    grid = fit_grid(weight, scheme, columns)
    ints = round_to_grid(weight, grid, scheme, groups_of(weight.shape[1], columns))
    return Standing.of(weight.T.contiguous(), ints.T.contiguous(), grid.scale.T.contiguous(), grid.zero.T.contiguous())


def row_costs(errors_CR: Tensor, hessian: Tensor) -> Tensor:
    return ((hessian @ errors_CR) * errors_CR).sum(dim=0)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(["none", "group", "static"]),
    st.sampled_from([8, 32, 192, -1]),
    st.sampled_from([(True, True), (True, False), (False, True)]),
    st.integers(1, 300),
    st.integers(0, 10**6),
)
def test_no_row_is_worse_than_without_sweeps(
    bits: int, act_order: ActOrder, group_size: int, kind: tuple[bool, bool], tokens: int, seed: int
) -> None:
    hessian, weight = inputs_and_weights(5, 192, seed, tokens)
    hessian[seed % 192] = hessian[:, seed % 192] = 0  # a dead column
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=kind[0], signed=kind[1])
    whole = hessian.clone()
    (before,) = solve([weight], hessian, scheme, SolveOptions(act_order=act_order, sweeps=0))
    (after,) = solve([weight], hessian, scheme, SolveOptions(act_order=act_order, sweeps=2))
    assert torch.equal(hessian, whole), "the memory is given back as it was"
    assert after.loss == pytest.approx(cost(weight, after.weight(), hessian), rel=1e-7, abs=1e-9)
    if after.kept == before.kept == "gptq":
        slack = 1e-9 * (1 + before.loss)
        errors = [(weight - found.weight()).T for found in (before, after)]
        assert bool((row_costs(errors[1], hessian) <= row_costs(errors[0], hessian) + slack).all())
    assert after.loss <= before.loss * (1 + 1e-9) + 1e-9
    scale = after.grid.scale
    assert torch.equal(scale, scale.half().double()) and bool((scale != 0).all())
    assert scheme.either_sign or bool((scale > 0).all())
    assert after.ints.dtype == torch.uint8 and int(after.ints.max()) <= scheme.largest
    nearest = round_to_grid(weight, after.grid, scheme, after.group_of)
    assert torch.equal(after.ints[:, seed % 192].double(), nearest[:, seed % 192])


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([2, 3, 4]), st.sampled_from([32, 192]), st.integers(1, 3), st.integers(0, 10**6))
def test_with_rounded_products_no_row_is_worse_and_all_are_nearly_as_good(
    bits: int, group_size: int, times: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hessian, weight = (each.float() for each in inputs_and_weights(40, 192, seed))
    huge = 1 + 500 * (torch.randperm(192, generator=generator) < 3)  # as attention sinks leave it
    hessian = hessian * huge * huge.unsqueeze(1)
    scheme = Scheme(bits=bits, group_size=group_size)
    before, exact, rounded = (
        solve([weight], hessian, scheme, SolveOptions(sweeps=sweeps), products=products)[0]
        for sweeps, products in ((0, None), (times, torch.float32), (times, torch.bfloat16))
    )
    costs = [row_costs((weight - found.weight()).T.double(), hessian.double()) for found in (before, exact, rounded)]
    if before.kept == rounded.kept == "gptq":
        assert bool((costs[2] <= costs[0] * (1 + 1e-3)).all())
    assert rounded.loss == pytest.approx(float(costs[2].sum()), rel=1e-2)
    if before.kept == exact.kept == rounded.kept == "gptq":
        assert costs[0].sum() - costs[2].sum() > 0.8 * (costs[0].sum() - costs[1].sum())


@pytest.mark.parametrize("times", [2, 3])
def test_sweeps_that_keep_halves_of_products_cost_what_they_say(times: int) -> None:
    hessian, weight = inputs_and_weights(40, 384, seed=2)
    scheme = Scheme(bits=3, group_size=32)
    together, again = standing(weight, scheme), standing(weight, scheme)
    told = sweep(together, hessian, scheme, times)
    assert torch.allclose(told, row_costs(together.errors, hessian))
    assert bool((told <= sweep(again, hessian, scheme, times - 1) * (1 + 1e-12)).all())
    rounded = standing(weight, scheme)
    told = sweep(rounded, hessian, scheme, times, torch.bfloat16)
    assert torch.allclose(told, row_costs(rounded.errors, hessian)), "the cost is not rounded"
    assert not torch.equal(rounded.ints, together.ints)


def test_a_sweep_lowers_the_cost_that_it_returns_and_far() -> None:
    hessian, weight = inputs_and_weights(40, 256, seed=1)
    for scheme in (Scheme(bits=2, group_size=64), Scheme(bits=3, group_size=256), Scheme(bits=3, symmetric=False)):
        rows = standing(weight, scheme)
        costs = [row_costs(rows.errors, hessian)]
        for _ in range(3):
            told = sweep(rows, hessian, scheme)
            costs.append(row_costs(rows.errors, hessian))
            assert torch.allclose(told, costs[-1])
            assert bool((costs[-1] <= costs[-2] * (1 + 1e-12)).all())
        assert costs[-1].sum() < 0.5 * costs[0].sum()
        group = torch.arange(256) // (256 // len(rows.scale))
        weights = (rows.ints - rows.zero[group]) * rows.scale[group] - rows.errors
        assert torch.allclose(weights, weight.T), "errors are those of what is stored"


@pytest.mark.parametrize("seed", range(4))
def test_it_ends_where_no_integer_and_no_scale_alone_can_do_better_and_near_the_best_of_all(seed: int) -> None:
    hessian, weight = inputs_and_weights(3, 8, seed)
    scheme = Scheme(bits=2, group_size=8)
    rows = standing(weight, scheme)
    start = row_costs(rows.errors, hessian)
    for _ in range(30):
        told = sweep(rows, hessian, scheme)
    every = torch.tensor(list(itertools.product(range(4), repeat=8)), dtype=weight.dtype)
    for row in range(3):
        scale, zero = rows.scale[0, row], rows.zero[0, row]
        error = (every - zero) * scale - weight[row]
        all_costs = ((error @ hessian) * error).sum(dim=1)
        changed = (every != rows.ints[:, row]).sum(dim=1)
        assert all_costs[changed == 1].min() >= told[row] * (1 - 1e-12)
        assert all_costs[changed == 0] == pytest.approx(float(told[row]))
        above_zero = rows.ints[:, row] - zero
        for factor in (1 - 2**-9, 1 - 2**-10, 1 + 2**-10, 1 + 2**-9, -1):
            error = above_zero * (scale * factor).half().double() - weight[row]
            assert error @ hessian @ error >= told[row] * (1 - 1e-12)
        assert told[row] <= start[row]
    assert told.sum() < 0.8 * start.sum()


@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_the_result_does_not_depend_on_which_rows_are_taken_together(
    products: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hessian, weight = inputs_and_weights(600, 64, seed=5)
    parts, scheme = [weight[:300], weight[300:]], Scheme(bits=3, group_size=16)
    whole = solve(parts, hessian, scheme, products=products)
    monkeypatch.setattr(solver, "TOGETHER", 1)
    for found, expected in zip(solve(parts, hessian, scheme, products=products), whole, strict=True):
        assert torch.equal(found.ints, expected.ints) and torch.equal(found.grid.scale, expected.grid.scale)
        assert found.loss == pytest.approx(expected.loss)


def test_scales_of_either_sign_are_less_error_and_are_read_back() -> None:
    hessian, weight = inputs_and_weights(32, 64, seed=6)
    found, unsigned = (
        solve([weight], hessian, Scheme(bits=2, group_size=32, signed=signed))[0] for signed in (True, False)
    )
    assert found.loss < 0.9 * unsigned.loss
    assert 0.2 < float((found.grid.scale < 0).double().mean()) < 0.8
    tensors = pack_linear("x", found.ints, found.grid, found.group_of, 2)
    parts = {name.removeprefix("x."): tensor for name, tensor in tensors.items()}
    assert torch.equal(dequantized(parts), found.weight().float())
