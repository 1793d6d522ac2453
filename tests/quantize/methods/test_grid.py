"""Grids: what they can hold, how they are fitted, and what cannot be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.methods.grid import BITS, Grid, Scheme, dequantize, fit_grid, groups_of, round_to_grid
from safevlm.errors import InputError


def rounded(weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, Grid]:
    columns = scheme.columns(weight.shape[1], "w")
    grid = fit_grid(weight, scheme, columns, importance)
    groups = groups_of(weight.shape[1], columns)
    return dequantize(round_to_grid(weight, grid, scheme, groups), grid, groups), grid


@given(
    st.sampled_from(BITS),
    st.booleans(),
    st.sampled_from([8, 16, -1]),
    st.floats(1e-3, 1e4),
    st.floats(-3, 3),
    st.integers(0, 1000),
)
def test_an_error_is_at_most_half_a_step_and_zeros_are_stored_as_the_format_wants(
    bits: int, symmetric: bool, group_size: int, size: float, offset: float, seed: int
) -> None:
    weight = (torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) + offset) * size
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    found, grid = rounded(weight, scheme)
    assert torch.equal(grid.scale, grid.scale.half().float())
    assert int(grid.zero.min()) >= 1 and int(grid.zero.max()) <= scheme.largest
    step = grid.scale.abs().repeat_interleave(32 // grid.scale.shape[1], dim=1)
    # half a step; a symmetric range lacks its uppermost half step, and a scale is rounded to float16
    reach = (0.5 if symmetric else 1.0) + 0.002 * 2**bits
    slack = 1.0 if symmetric or bool((grid.zero == 1).any()) else 0.5
    assert bool(((weight - found).abs() <= (slack + reach - 0.5) * step + 1e-6 * size).all())


def test_a_group_of_zeros_stays_zero_and_tiny_ones_do_not_vanish_into_nan() -> None:
    weight = torch.zeros(2, 16)
    weight[1] = 1e-9
    for symmetric in (True, False):
        found, grid = rounded(weight, Scheme(bits=4, group_size=8, symmetric=symmetric))
        assert torch.equal(found[0], weight[0]) and bool(torch.isfinite(found).all())
        assert bool((grid.scale != 0).all())


def test_what_float16_cannot_scale_is_refused() -> None:
    with pytest.raises(InputError, match="exceeds float16"):
        rounded(torch.full((1, 8), 1e6), Scheme(bits=2, group_size=8))
    with pytest.raises(InputError, match="not finite"):
        rounded(torch.full((1, 8), torch.nan), Scheme(bits=4, group_size=8))


def test_a_searched_grid_is_never_worse_where_it_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator) ** 3  # long tails
    importance = torch.rand(64, generator=generator)
    for bits in BITS:
        scheme = Scheme(bits=bits, group_size=32)
        plain, searched = rounded(weight, scheme)[0], rounded(weight, scheme, importance)[0]
        costs = [float((importance * (weight - found).square()).sum()) for found in (plain, searched)]
        assert costs[1] <= costs[0] * (0.95 if bits < 4 else 1)


@pytest.mark.parametrize(
    ("bad", "said"),
    [({"bits": 5}, "one of 2, 3, 4, 8"), ({"group_size": 0}, "multiple of 8"), ({"group_size": 12}, "multiple of 8")],
)
def test_bad_schemes_are_refused(bad: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Scheme(**bad)  # type: ignore[arg-type]


def test_a_group_size_that_does_not_divide_names_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"128 does not divide the 192 input columns of model.x\. .*: 96 and 192, or -1"
    ):
        Scheme(group_size=128).columns(192, "model.x")
    assert Scheme(group_size=-1).columns(192, "x") == 192
