"""Packed words hold what was put in, bit by bit where the readers look."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.methods.grid import Grid, groups_of
from quantize.methods.packing import pack, pack_linear
from safevlm.checkpoint.weights.quantized import BITS, unpack, unpack_linear
from safevlm.errors import InputError


@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 5), st.integers(0, 1000))
def test_every_bit_is_where_a_stream_of_bits_has_it(bits: int, blocks: int, others: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (32 * blocks, others), generator=generator)
    words = pack(values, bits)
    assert words.dtype == torch.int32 and words.shape == (blocks * bits, others)
    for column in range(others):
        stream = 0
        for place, value in enumerate(values[:, column].tolist()):
            stream |= value << (place * bits)
        expected = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(blocks * bits)]
        assert [word & 0xFFFFFFFF for word in words[:, column].tolist()] == expected
    assert torch.equal(unpack(words, bits), values)


def test_known_words() -> None:
    assert (
        pack(torch.arange(32).remainder(16).unsqueeze(1), 4).flatten().tolist()
        == [
            0x76543210,
            0xFEDCBA98 - 2**32,
        ]
        * 2
    )
    ones = pack(torch.full((32, 1), 1), 3).flatten()  # 001001...: 3 bits lie across words
    assert [word & 0xFFFFFFFF for word in ones.tolist()] == [0x49249249, 0x92492492, 0x24924924]


def test_a_linear_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in BITS:
        ints = torch.randint(0, 2**bits, (64, 96), generator=generator)
        zero = torch.randint(1, 2**bits, (64, 3), generator=generator).float()
        grid = Grid(scale=torch.rand(64, 3, generator=generator).half().float(), zero=zero)
        groups = groups_of(96, 32)[torch.randperm(96, generator=generator)]
        tensors = pack_linear("x", ints, grid, groups, bits)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert shapes == {
            "x.qweight": (96 * bits // 32, 64),
            "x.qzeros": (3, 64 * bits // 32),
            "x.scales": (3, 64),
            "x.g_idx": (96,),
        }
        parts = {name.removeprefix("x."): tensor for name, tensor in tensors.items()}
        found, scale_again, zero_again, groups_again = unpack_linear(parts)
        assert torch.equal(found, ints) and torch.equal(zero_again, zero)
        assert torch.equal(scale_again, grid.scale) and torch.equal(groups_again, groups)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="do not fit 2 bits"):
        pack(torch.full((32, 1), 4), 2)
    with pytest.raises(InputError, match="31 values of 4 bits cannot be packed"):
        pack(torch.zeros(31, 1), 4)
    grid = Grid(scale=torch.ones(48, 1), zero=torch.ones(48, 1))
    with pytest.raises(InputError, match=r"model.odd has 48 rows"):
        pack_linear("model.odd", torch.zeros(48, 32), grid, groups_of(32, 32), 4)
