"""Numbers that a type does not hold: the checkpoint's tensor is named, and what could be written is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from export.gguf.__main__ import main
from export.gguf.artifact import GgufOptions, export_gguf
from export.gguf.parity import check_finite
from export.gguf.writing import DTYPES, check_numbers
from runtimes.language.gguf_artifact import open_gguf
from runtimes.language.llamacpp_language import LlamaCppLanguageRunner
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import CheckpointError
from safevlm.terminal.commandline import run
from tests.export.gguf.geometries import write_geometry

DOWN = "model.language_model.layers.1.mlp.down_proj.weight"
PROJECTOR = "model.multi_modal_projector.linear_2.weight"
HEAD = "img_safety_head.mlp.3.bias"
NORM = "model.language_model.norm.weight"
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
"""Widths that every quantized type packs."""


def holding(name: str, number: float) -> Callable[[dict[str, Tensor]], None]:
    """Return a change that puts one number into a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[3] = number

    return change


def shrunk(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN] = tensors[DOWN] * 1e-9


@pytest.mark.parametrize(
    ("name", "number", "dtype", "kind", "told"),
    [
        (DOWN, float("nan"), torch.float16, "f16", "holds NaN; only finite"),
        (NORM, float("nan"), torch.bfloat16, "q8_0", "holds NaN; only finite"),
        (PROJECTOR, float("-inf"), torch.float16, "f16", "holds infinity; only finite"),
        (HEAD, float("nan"), torch.float32, "f32", "holds 1 NaN and 0 infinite values"),
        (
            DOWN,
            -7e4,
            torch.bfloat16,
            "f16",
            r"holds 7\.\d+e\+04, beyond float16's maximum of 65504\. Use --type bf16 or f32",
        ),
        (
            PROJECTOR,
            7e4,
            torch.float32,
            "f32",
            r"holds 7e\+04, beyond float16's maximum of 65504\. .* --mmproj-type bf16 or f32",
        ),
    ],
)
def test_the_tensor_is_named_and_nothing_is_written(
    name: str, number: float, dtype: torch.dtype, kind: str, told: str, tmp_path: Path
) -> None:
    folder = write_geometry("llava", tmp_path / "checkpoint", dtype=dtype, change=holding(name, number))
    with pytest.raises(CheckpointError, match=f"tensor '{name}' {told}"):
        export_gguf(open_checkpoint(folder), tmp_path / "out", GgufOptions(type=kind))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("change", "kind", "dtype", "told"),
    [
        (holding(DOWN, 1e6), "q4_0", torch.bfloat16, "beyond its range"),
        (holding(DOWN, 3e38), "iq3_s", torch.bfloat16, r"up to 3\.004e\+38, beyond its range"),
        (shrunk, "q8_0", torch.float32, "all so small that they become 0"),
    ],
)
def test_a_number_that_a_quantized_type_does_not_hold_leaves_the_model_in_the_plain_one(
    change: Callable[[dict[str, Tensor]], None], kind: str, dtype: torch.dtype, told: str, tmp_path: Path
) -> None:
    folder = write_geometry("llava", tmp_path / "checkpoint", text=WIDE, dtype=dtype, change=change)
    plain = "bf16" if dtype == torch.bfloat16 else "f32"
    with pytest.raises(
        CheckpointError, match=f"'{DOWN}' .* --type {kind} cannot represent: .*{told}.* model in {plain} instead"
    ):
        export_gguf(open_checkpoint(folder), tmp_path / "out", GgufOptions(type=kind, parity_images=1))
    artifact = open_gguf(tmp_path / "out")
    assert artifact.manifest.file("model").type == plain and artifact.manifest.parity is not None
    size = artifact.manifest.preprocessing
    with LlamaCppLanguageRunner(artifact) as runner:
        assert runner.prefill(np.zeros((size.height, size.width, 3), np.uint8), "Why?").exact_probs is not None


def test_the_command_says_it_is_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_geometry("gemma3", tmp_path / "checkpoint", change=holding(HEAD, float("nan")))
    with pytest.raises(SystemExit) as ended:
        run(main, ["--model", str(folder), "--out", str(tmp_path / "out"), "--type", "q8_0"])
    assert ended.value.code == 2 and f"'{HEAD}' holds 1 NaN" in capsys.readouterr().err


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=6),
    st.sampled_from(sorted(DTYPES)),
)
def test_what_passes_is_finite_and_not_all_lost(numbers: list[float], kind: str) -> None:
    value, dtype = torch.tensor(numbers, dtype=torch.float32), DTYPES[kind]  # type: ignore[index]
    stored = value.to(dtype)
    fits = bool(torch.isfinite(stored).all()) and bool(stored.any()) == bool(value.any())
    try:
        largest = check_numbers(value, dtype, "x")
    except CheckpointError as error:
        assert not fits and str(error).startswith("tensor 'x' holds")
    else:
        assert fits and largest == float(value.abs().max())


def test_what_a_runtime_computes_is_finite() -> None:
    check_finite(np.ones(3, np.float32), "the guard", "torch", "")
    with pytest.raises(CheckpointError, match=r"the guard gives NaN or infinity on llama\.cpp, because .* use bf16"):
        check_finite(np.array([1, np.nan], np.float32), "the guard", "llama.cpp", "use bf16")
