"""Matrices of a rotation are orthogonal, spread one channel over all, and are the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from quantize.methods.rotation import ROTATIONS, check_rotation, hadamard, orthogonal
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError

HADAMARD = (1, 2, 8, 12, 20, 24, 28, 36, 44, 48, 60, 64, 84)
WIDTHS = (16, 64, 96, 576, 640, 896, 1536, 2560, 3584)


@pytest.mark.parametrize("order", HADAMARD)
def test_hadamard_matrices_are_of_ones_and_orthogonal(order: int) -> None:
    found = hadamard(order)
    assert found is not None and set(found.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(found @ found.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 10, 18, 22])
def test_an_order_that_has_none_is_told(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize("width", [*WIDTHS, 1, 7, 22, 90])
def test_turning_keeps_lengths_and_angles(width: int) -> None:
    matrix = orthogonal(width, seed=3)
    turned = matrix.turn(torch.eye(width))
    assert (turned @ turned.T - torch.eye(width)).abs().max() < 1e-5
    rows = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(matrix.turn(rows), rows @ turned, atol=1e-5)
    assert torch.allclose(matrix.turn_outputs(rows.T), (rows @ turned).T, atol=1e-5)
    assert torch.equal(matrix.turn(rows), orthogonal(width, seed=3).turn(rows))
    assert width < 7 or not torch.allclose(matrix.turn(rows), orthogonal(width, seed=4).turn(rows), atol=1e-2)


@pytest.mark.parametrize("width", WIDTHS)
def test_one_large_channel_is_spread_over_all_evenly(width: int) -> None:
    outlier = torch.zeros(1, width)
    outlier[0, 5] = 100.0
    assert torch.allclose(orthogonal(width, seed=0).turn(outlier).abs(), torch.tensor(100 / width**0.5))


def test_each_head_has_a_matrix_of_its_own() -> None:
    matrix, same = orthogonal(16, seed=0, heads=3), torch.ones(1, 48)
    one, two, three = matrix.turn(same).view(3, 16)
    assert not torch.allclose(one, two) and not torch.allclose(two, three)
    alone = torch.zeros(1, 48)
    alone[0, :16] = 1.0
    assert torch.equal(matrix.turn(alone)[0, 16:], torch.zeros(32)), "no head reads another"


def test_what_is_turned_in_blocks_is_what_is_turned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, matrix = torch.randn(37, 64, generator=torch.Generator().manual_seed(0)), orthogonal(64, seed=0)
    whole = matrix.turn(rows)
    monkeypatch.setattr("quantize.methods.rotation.BLOCK", 5 * 64)
    assert torch.allclose(matrix.turn(rows), whole, atol=1e-6)


def test_what_a_family_does_not_allow_is_refused_by_name() -> None:
    gem, llava = open_checkpoint("tiny-safegem"), open_checkpoint("tiny-safellava")
    for rotate in ("residual", "both"):
        with pytest.raises(InputError, match=rf"--rotate {rotate}: SafeGem has norms .* Use --rotate values\."):
            check_rotation(gem, rotate)  # type: ignore[arg-type]
    check_rotation(gem, "values")
    for rotate in ROTATIONS:
        check_rotation(llava, rotate)
    with pytest.raises(InputError, match=r"--rotate turn does not exist. Use one of none, values"):
        check_rotation(llava, "turn")  # type: ignore[arg-type]
