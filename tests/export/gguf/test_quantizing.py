"""Types, widths and llama.cpp's quantizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from export.gguf.quantizing import TYPES, block_width, check_widths, file_type, quantize_file, type_of
from export.gguf.writing import GgufTensor
from safevlm.errors import InputError, SafeVLMError


def tensor(width: int, name: str = "blk.0.ffn_up.weight") -> GgufTensor:
    return GgufTensor(name=name, source=name, shape=(4, width), type="f16", read=lambda: torch.zeros(4, width))


@pytest.mark.parametrize(("width", "kind"), [(128, "q4_k_m"), (100, "q8_0"), (96, "iq4_xs")])
def test_a_width_that_a_type_cannot_hold_is_named(width: int, kind: str) -> None:
    with pytest.raises(InputError, match=rf"--type {kind}: 'blk\.0\.ffn_up\.weight' has {width} columns") as refused:
        check_widths([tensor(256), tensor(width)], kind)
    told = str(refused.value).partition("Types that fit: ")[2].rstrip(".").split(", ")
    assert told and all(width % block_width(each) == 0 for each in told) and kind not in told


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_llama_cpps_and_its_block_is_the_librarys(kind: str) -> None:
    assert file_type(kind) in {int(member) for member in gguf.LlamaFileType}
    check_widths([tensor(256)], kind)
    base = kind.upper().removesuffix("_M").removesuffix("_S").removesuffix("_L")
    known = getattr(gguf.GGMLQuantizationType, base, None) or getattr(gguf.GGMLQuantizationType, kind.upper(), None)
    if known is not None:
        assert gguf.GGML_QUANT_SIZES[known][0] == block_width(kind)
    assert type_of(kind.upper()) == kind


def test_importance_moves_the_error_to_columns_that_do_not_count(
    gguf_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = gguf_folder("tiny-safellava") / "model.f16.gguf"
    name = "blk.0.ffn_gate.weight"
    weights = np.asarray(next(t for t in gguf.GGUFReader(source).tensors if t.name == name).data, np.float32)
    counts = np.full(weights.shape[1], 1e-4, np.float32)
    counts[::2] = 1.0

    def error(importance: dict[str, np.ndarray] | None, target: Path) -> float:
        quantize_file(source, target, "q4_0", importance)
        packed = next(t for t in gguf.GGUFReader(target).tensors if t.name == name)
        assert packed.tensor_type == gguf.GGMLQuantizationType.Q4_0
        off = gguf.quants.dequantize(packed.data, packed.tensor_type) - weights
        return float((np.square(off) * counts).sum())

    assert error({name: counts}, tmp_path / "with.gguf") < error(None, tmp_path / "without.gguf")


def test_llama_cpps_own_words_are_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(SafeVLMError, match=r"could not quantize broken\.gguf to q8_0: \w+"):
        quantize_file(tmp_path / "broken.gguf", tmp_path / "out.gguf", "q8_0")
