"""Several partial roundings against every rounding there is, and against one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.methods import beams as beams_module
from quantize.methods.grid import Scheme, fit_grid
from quantize.methods.solver import ActOrder, SolveOptions, solve
from safevlm.errors import InputError
from tests.quantize.methods.test_solver import inputs_and_weights


def damped_costs(weight: Tensor, found: Tensor, hessian: Tensor, damp: float) -> Tensor:
    """Return each row's cost with H damped as the solver damps it; dead columns cost nothing."""
    alive = hessian.diagonal() > 0
    damped = hessian + torch.diag(alive * damp * hessian.diagonal()[alive].mean())
    error = weight - found
    return ((error @ damped) * error).sum(dim=1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("symmetric", [True, False])
def test_enough_of_them_find_the_best_rounding_of_all(symmetric: bool, seed: int) -> None:
    hessian, weight = inputs_and_weights(6, 8, seed)
    hessian[[3, 5]] = hessian[:, [3, 5]] = 0  # dead columns
    scheme = Scheme(bits=2, group_size=8, symmetric=symmetric)
    grid = fit_grid(weight, scheme, 8)
    options = SolveOptions(sweeps=0, search=False, beams=4**5)
    (found,) = solve([weight], hessian, scheme, options)
    every = torch.tensor(list(itertools.product(range(4), repeat=8)), dtype=weight.dtype)
    told = damped_costs(weight, found.weight(), hessian, options.damp)
    for row in range(6):
        stored = (every - grid.zero[row]) * grid.scale[row]
        best = damped_costs(weight[row], stored, hessian, options.damp).min()
        assert told[row] == pytest.approx(float(best), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(["none", "group", "static"]),
    st.integers(2, 5),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_no_row_costs_more_than_with_one(
    bits: int, act_order: ActOrder, beams: int, symmetric: bool, seed: int
) -> None:
    hessian, weight = inputs_and_weights(8, 192, seed)
    hessian[seed % 192] = hessian[:, seed % 192] = 0
    scheme = Scheme(bits=bits, group_size=32, symmetric=symmetric)
    options = [SolveOptions(act_order=act_order, sweeps=0, beams=count, block=80) for count in (1, beams)]
    one, more = (solve([weight], hessian, scheme, each)[0] for each in options)
    costs = [damped_costs(weight, found.weight(), hessian, 0.2) for found in (one, more)]
    if one.kept == more.kept == "gptq":
        assert bool((costs[1] <= costs[0] * (1 + 1e-9)).all())
    error = weight - more.weight()
    assert more.loss == pytest.approx(float(((error @ hessian) * error).sum()), rel=1e-7, abs=1e-9)
    assert int(more.ints.max()) <= scheme.largest


def test_more_of_them_cost_clearly_less_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, weight = inputs_and_weights(40, 192, seed=1)
    scheme = Scheme(bits=2, group_size=32)
    one, two, eight = (solve([weight], hessian, scheme, SolveOptions(sweeps=0, beams=count))[0] for count in (1, 2, 8))
    assert eight.loss < two.loss < one.loss and eight.loss < 0.97 * one.loss
    monkeypatch.setattr(beams_module, "TOGETHER", 8 * 128 * 7)
    (again,) = solve([weight], hessian, scheme, SolveOptions(sweeps=0, beams=8))
    assert torch.equal(again.ints, eight.ints) and again.loss == pytest.approx(eight.loss)


def test_none_is_refused() -> None:
    with pytest.raises(InputError, match="--beams 0"):
        SolveOptions(beams=0)
