"""The guard as vLLM's process reads it is the torch path's; what is damaged or of another kind is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.hf import export_hf
from runtimes.vllm_guard.head import GUARD_FILE, ExactHead, head_sha256
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from safevlm.network.loading import load_safe_vlm
from tests.quantize.streamed.test_consumers import ROOT


@pytest.fixture(scope="module", params=["tiny-safellava", "tiny-safeqwen"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hf(open_checkpoint(request.param), tmp_path_factory.mktemp("hf") / "model").out


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may change."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def test_norm_mean_and_head_are_those_of_the_torch_path(folder: Path) -> None:
    vlm = load_safe_vlm(open_checkpoint(folder))
    head = ExactHead.read(folder)
    hidden_NTD = 3 * torch.randn(4, 9, len(head.norm), generator=torch.manual_seed(0))
    normed_NTD = vlm.core.language_model.norm(hidden_NTD)
    wanted = torch.softmax(vlm.head(normed_NTD.mean(1)), -1)
    eps = vlm.core.language_model.norm.variance_epsilon
    found = torch.tensor([head.probs(hidden_TD, eps) for hidden_TD in hidden_NTD])
    assert (found - wanted).abs().max() < 1e-6
    assert head.classes == vlm.classes


def test_the_hash_is_of_the_numbers_whatever_they_are_stored_in(folder: Path) -> None:
    head = ExactHead.read(folder)
    half = [(weight.half(), bias.half()) for weight, bias in head.layers]
    again = [(weight.float(), bias.float()) for weight, bias in half]
    assert head_sha256(half) == head_sha256(again)
    half[0][0][0, 0] += 1
    assert head_sha256(half) != head_sha256(again)


def changed(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model_type": "mistral3"}, "unknown"),
        ({"safety_tap": "projector"}, "splits off exactly"),
        ({"safety_categories": None}, "safety_categories"),
        ({"safety_categories": ["safe", "hate"]}, "2 names for a head of"),
    ],
)
def test_another_kind_of_checkpoint_is_refused(folder: Path, keys: dict[str, Any], said: str) -> None:
    changed(folder, **keys)
    with pytest.raises(InputError, match=said):
        ExactHead.read(folder)


def test_a_damaged_head_is_refused(folder: Path) -> None:
    path = folder / GUARD_FILE
    kept = load_file(path)
    last = max(int(name.split(".")[2]) for name in kept)
    for bad, said in (
        ({}, "chain of Linears"),
        ({name: each for name, each in kept.items() if not name.endswith(f"{last}.bias")}, "chain of Linears"),
        ({**kept, "other.weight": torch.ones(1)}, "not a guard head's tensor"),
        ({**kept, f"img_safety_head.mlp.{last}.bias": torch.ones(3)}, "do not fit"),
        ({**kept, f"img_safety_head.mlp.{last}.bias": kept[f"img_safety_head.mlp.{last}.bias"] * torch.nan}, "finite"),
    ):
        save_file(bad, path)
        with pytest.raises(InputError, match=said):
            ExactHead.read(folder)
    path.write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="cannot be read"):
        ExactHead.read(folder)
    path.unlink()
    with pytest.raises(InputError, match="no guard to judge with"):
        ExactHead.read(folder)


def test_gemma_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    folder = export_hf(open_checkpoint("tiny-safegem"), tmp_path / "model").out
    with pytest.raises(InputError, match=r"splits off exactly: python -m export\.onnx"):
        ExactHead.read(folder)
    changed(folder, safety_tap="language_model")
    with pytest.raises(InputError, match="no hidden states of Gemma-3"):
        ExactHead.read(folder)


def test_a_name_of_the_hub_is_no_folder() -> None:
    with pytest.raises(InputError, match="downloaded first"):
        ExactHead.read(Path("someone/SafeLLaVA-7B"))


def test_what_vllms_processes_import_needs_no_library_of_ours() -> None:
    code = (
        "import runtimes.vllm_guard, runtimes.vllm_guard.head, runtimes.vllm_guard.requests, "
        "runtimes.vllm_guard.storage, runtimes.vllm_guard.verdict, sys; "
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"pydantic", "click", "PIL", "transformers", "onnx", "httpx", "fastapi"}
