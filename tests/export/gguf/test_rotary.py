"""Rotary scalings: llama.cpp's logits are transformers', also beyond the length that a model was trained at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from export.gguf.artifact import GgufOptions, export_gguf
from runtimes.language.llamacpp_language import LlamaCppLanguageRunner
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import CheckpointError
from safevlm.network.loading import load_safe_vlm
from tests.export.gguf.geometries import write_geometry

ORIGINAL = 64
QUESTION = "What is drawn here? " * 12
"""With its image some 200 tokens, three times the original length."""
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = ORIGINAL
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL}
LINEAR = {"rope_type": "linear", "factor": 8.0}
WRITTEN = [
    ("llava", LINEAR, {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}),
    ("llava", LLAMA3, {}),
    ("llava", YARN, {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": ORIGINAL}),
    ("llava", YARN | {"attention_factor": 1.5}, {"rope.scaling.type": "yarn"}),
    ("llava", YARN | {"beta_fast": 8.0, "truncate": False}, {}),
    ("qwen2_5_vl", YARN, {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}),
    ("qwen2_5_vl", YARN | {"attention_factor": 1.5}, {"rope.scaling.type": "yarn"}),
    ("gemma3", LINEAR, {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}),
    ("gemma3", YARN, {"rope.scaling.type": "yarn"}),
]
REFUSED = [
    ("llava", {"rope_type": "dynamic", "factor": 4.0}, "scaled 'dynamic', by the length of the prompt"),
    ("qwen2_5_vl", LLAMA3, "SafeQwen2.5-VL does not compute the rotary scaling 'llama3'"),
    ("qwen2_5_vl", YARN | {"beta_slow": 4.0}, "'yarn' with beta_slow = 4.0"),
    ("gemma3", LLAMA3, "SafeGem does not compute the rotary scaling 'llama3'"),
    ("gemma3", YARN | {"attention_factor": 1.5}, "attention_factor = 1.5"),
]


def rope_of(family: str, rope: dict[str, Any]) -> dict[str, Any]:
    if family == "gemma3":
        local = {"rope_type": "default", "rope_theta": 1e4}
        return {"full_attention": {"rope_theta": 1e6, **rope}, "sliding_attention": local}
    sections = {"mrope_section": [4, 6, 6]} if family == "qwen2_5_vl" else {}
    return {"rope_theta": 1e4, **sections, **rope}


def sharp(tensors: dict[str, Tensor]) -> None:
    """Let attention look at where a token stands: random weights hardly do."""
    for name, tensor in tensors.items():
        if name.endswith(("language_model.layers.0.self_attn.q_proj.weight", "layers.1.self_attn.q_proj.weight")):
            tensors[name] = tensor * 3
        if name.endswith("q_norm.weight"):
            tensors[name] = tensor + 2


def written(family: str, rope: dict[str, Any], folder: Path) -> Path:
    length = int(8 * rope.get("original_max_position_embeddings", 256))  # as transformers expects it of YaRN
    text = {"rope_parameters": rope_of(family, rope), "max_position_embeddings": length}
    return write_geometry(family, folder, text=text, change=sharp)


def torch_logits(folder: Path, rgb: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    vlm = load_safe_vlm(open_checkpoint(folder))
    begun = vlm.begin(torch.from_numpy(rgb[None].copy()), [QUESTION])
    return vlm.token_logits(begun.last_hidden)[0, 0].detach().numpy()


@pytest.mark.parametrize(("family", "rope", "stated"), WRITTEN)
def test_logits_are_those_of_transformers(
    family: str, rope: dict[str, Any], stated: dict[str, Any], tmp_path: Path
) -> None:
    scaled = written(family, rope, tmp_path / "scaled")
    plain = written(family, {"rope_type": "default"}, tmp_path / "plain")
    export_gguf(open_checkpoint(scaled), tmp_path / "out", GgufOptions(type="f32", mmproj_type="f32", parity_images=1))
    fields = gguf.GGUFReader(tmp_path / "out" / "model.f32.gguf").fields
    found = {key.partition(".")[2]: field.contents() for key, field in fields.items()}
    assert {key: found[key] for key in stated} == stated
    with LlamaCppLanguageRunner(tmp_path / "out") as runner:
        size = runner.artifact.manifest.preprocessing
        rgb = np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), np.uint8)
        logits = runner.prefill(rgb, QUESTION).handle[0]
        with runner.session.prompting() as llama:
            assert llama.position > 2 * ORIGINAL
    wanted, unscaled = torch_logits(scaled, rgb), torch_logits(plain, rgb)
    off, felt = np.abs(logits - wanted).max(), np.abs(unscaled - wanted).max()
    assert off < 0.02 * np.abs(wanted).max()
    assert felt > 3 * off, "the scaling is too weak to be seen"


@pytest.mark.parametrize(("family", "rope", "told"), REFUSED)
def test_what_llama_cpp_does_not_compute_is_named(family: str, rope: dict[str, Any], told: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(written(family, rope, tmp_path / "checkpoint"))
    with pytest.raises(CheckpointError, match=told):
        export_gguf(checkpoint, tmp_path / "out", GgufOptions(type="f32"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
