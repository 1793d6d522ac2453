"""The files that are read are those that transformers reads, or the folder is refused by name."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.checkpoint.families import FAMILIES
from safevlm.checkpoint.ignored import Ignored
from safevlm.errors import CheckpointError
from tests.safevlm.checkpoint.folders import (
    CANONICAL,
    LAYOUTS,
    WIDTH,
    random_tensors,
    stored_name,
    three_shards,
    write_folder,
    write_json,
)

NORM = "model.language_model.norm.weight"
HEAD = {
    "img_safety_head.mlp.0.weight": torch.zeros(20, WIDTH),
    "img_safety_head.mlp.0.bias": torch.zeros(20),
}


@pytest.fixture(scope="module")
def model() -> Any:
    """Return a LLaVA of transformers small enough to be loaded for every example."""
    text = LlamaConfig(vocab_size=7, hidden_size=WIDTH, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    vision = CLIPVisionConfig(
        hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=2
    )
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=6))


def marked(model: Any, mark: float) -> dict[str, torch.Tensor]:
    """Return the model's tensors and a guard head; the final norm says which file they were read from."""
    return {
        **{name: value.clone() for name, value in model.state_dict().items()},
        **HEAD,
        NORM: torch.full((WIDTH,), mark),
    }


def halves(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in part} for part in (names[::2], names[1::2])]


def write_set(folder: Path, model: Any, mark: float, stem: str, index: str | None) -> None:
    """Write two shards, and an index unless it is ``None``."""
    weight_map: dict[str, str] = {}
    for number, part in enumerate(halves(marked(model, mark)), start=1):
        shard = f"{stem}-0000{number}-of-00002.safetensors"
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    if index is not None:
        write_json(folder / index, {"metadata": {}, "weight_map": weight_map})


SINGLES = ["model.safetensors", "model.fp16.safetensors", "consolidated.safetensors", "other.safetensors"]
SETS = [("model", "model.safetensors.index.json"), ("model.fp16", "model.fp16.safetensors.index.json"), ("old", None)]
STRAYS = ["training_args.bin", "optimizer.pt", "model.gguf", "README.md", "pytorch_model.bin"]
STATED = [
    None,
    None,
    None,
    "model.safetensors",
    "other.safetensors",
    "model.fp16.safetensors.index.json",
    "lost.safetensors",
]


@st.composite
def folders(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, str | None]], list[str], str | None]:
    return (
        draw(st.lists(st.sampled_from(SINGLES), unique=True, max_size=3)),
        draw(st.lists(st.sampled_from(SETS), unique=True, max_size=2)),
        draw(st.lists(st.sampled_from(STRAYS), unique=True, max_size=3)),
        draw(st.sampled_from(STATED)),
    )


def test_random_folders_are_read_as_transformers_reads_them_or_refused(model: Any) -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(folders())
    def compare(drawn: tuple[list[str], list[tuple[str, str | None]], list[str], str | None]) -> None:
        singles, sets, strays, stated = drawn
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            for mark, single in enumerate(singles, start=1):
                save_file(marked(model, mark), folder / single)
            for mark, (stem, index) in enumerate(sets, start=11):
                write_set(folder, model, mark, stem, index)
            for stray in strays:
                (folder / stray).write_bytes(b"x")
            config = json.loads(model.config.to_json_string(use_diff=False))
            write_json(folder / "config.json", config | ({"transformers_weights": stated} if stated else {}))
            try:
                checkpoint = open_checkpoint(folder)
            except CheckpointError as error:
                assert any(
                    name in str(error)
                    for name in (*singles, "model.safetensors", "pytorch_model.bin", stated or "model")
                ), error
                counts["refused"] += 1
                return
            found = float(checkpoint.tensors.read(NORM)[0])
            try:
                theirs = LlavaForConditionalGeneration.from_pretrained(folder)
            except (OSError, ValueError, RuntimeError):
                counts["not read by transformers"] += 1
            else:
                assert float(theirs.state_dict()[NORM][0]) == found
                counts["agreed"] += 1
            check_ignored(checkpoint, found, singles, sets, strays)

    compare()
    assert counts["agreed"] >= 20 and counts["refused"] >= 10, counts


def check_ignored(
    checkpoint: Checkpoint, mark: float, singles: list[str], sets: list[tuple[str, str | None]], strays: list[str]
) -> None:
    """Every weight file is read or named, and never both."""
    read = {singles[int(mark) - 1]} if mark < 11 else {name for name in sets[int(mark) - 11] if name}
    files = {name for name in singles if name not in read}
    for stem, index in sets:
        if stem not in read:
            files |= {f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)} | ({index} if index else set())
    files |= {name for name in strays if name in ("model.gguf", "pytorch_model.bin")}
    assert set(checkpoint.ignored.files) == files


# -- files beside -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.safetensors", "pytorch_model.bin"])
def test_a_single_file_is_read_before_an_older_index(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path, tensors=random_tensors("new Gemma", seed=1), shard_of=three_shards)
    write_folder(tmp_path / "newer")
    shutil.move(tmp_path / "newer" / "model.safetensors", folder / name)
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(folder)
    read = checkpoint.tensors.read("img_safety_head.mlp.0.bias")
    newer = name == "model.safetensors"
    assert torch.equal(read, random_tensors("new Gemma", seed=0 if newer else 1)["img_safety_head.mlp.0.bias"])
    shards = {three_shards(part) for part in ("img_safety_head", "visual", "lm_head")}
    assert set(checkpoint.ignored.files) == (shards | {"model.safetensors.index.json"} if newer else {name})
    assert "beside the weights that are read" in caplog.text


def test_tensors_of_no_known_part_are_reported_once_with_their_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = {f"foo.{number}\x1b[2J{'x' * 300}": torch.zeros(50) for number in range(9)}
    folder = write_folder(tmp_path, tensors={**random_tensors("new Gemma"), **strange})
    with caplog.at_level(logging.WARNING):
        found = open_checkpoint(folder).ignored
        open_checkpoint(folder)
    assert found.tensors == tuple(sorted(strange)) and 0.1 < (found.share or 0) < 1
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert f"9 tensors ({100 * (found.share or 0):.1f} % of the bytes) of no known part: 'foo.0" in text
    assert text.isprintable() and len(text) < 1000


def test_a_complete_checkpoint_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("tiny-safellava", "tiny-safeqwen", "tiny-safegem"):
        assert open_checkpoint(name).ignored == Ignored(share=0.0)
    assert caplog.records == []


# -- adapters -------------------------------------------------------------------------------------------------

WORLD = Path(__file__).parents[3] / "fixtures" / "world" / "checkpoints"
ADAPTER_FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_model-00001-of-00002.safetensors",
    "non_lora_trainables.bin",
    "lora_weights.safetensors",
    "pytorch_lora_weights.safetensors",
    "safellava-LoRA.bin",
]


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_an_adapters_files_are_refused_with_the_way_to_merge_them(name: str, base: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path) if base else tmp_path
    source = WORLD / name
    (folder / name).write_bytes(source.read_bytes() if source.is_file() else b"x")
    with pytest.raises(
        CheckpointError, match=rf"'{name}' belongs to an adapter.*Merge the adapter first.*merge_and_unload"
    ):
        open_checkpoint(folder)


def test_a_file_whose_name_only_sounds_like_an_adapter_is_named_as_ignored(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    save_file({"x": torch.zeros(1)}, folder / "explora.safetensors")
    assert open_checkpoint(folder).ignored.files == ("explora.safetensors",)


@pytest.mark.parametrize("ending", [".weight_scale_inv", ".scales", ".absmax"])
def test_scales_of_a_config_that_says_nothing_of_quantization_are_refused(ending: str, tmp_path: Path) -> None:
    """As a config that another tool rewrote leaves them: the weights alone would be other numbers."""
    name = f"model.language_model.layers.0.self_attn.q_proj{ending}"
    folder = write_folder(tmp_path, tensors={**random_tensors("new Qwen"), name: torch.ones(1)})
    with pytest.raises(CheckpointError, match=rf"'{name}' scales a quantized weight, .* no quantization_config"):
        open_checkpoint(folder)


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes"])
def test_a_quantization_that_the_language_models_section_states_is_read(method: str, tmp_path: Path) -> None:
    text = {"hidden_size": WIDTH, "quantization_config": {"quant_method": method}}
    folder = write_folder(tmp_path, config={"text_config": text})
    with pytest.raises(CheckpointError, match=f"quantized by '{method}'"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", (WORLD / "adapter_tensors.txt").read_text().split())
def test_an_adapters_tensors_are_refused(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tensors={**random_tensors("new Gemma"), name: torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"belongs to an adapter that is not merged.*Merge the adapter first"):
        open_checkpoint(folder)


# -- wrappers -------------------------------------------------------------------------------------------------

OUTERMOST = ["_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.", "_forward_module.", "model."]
INNER = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."]


def wrapped(name: str, layout: str, outer: list[str], inner: str | None) -> str:
    """Return a stored name as wrappers around the whole model, and around one layer, write it."""
    name = stored_name(layout, name)
    if inner and ".layers.0." in name:
        name = name.replace(".layers.0.", f".layers.0.{inner}")
    # A module that holds the model as `self.model` puts its level before names that have it, too.
    return "".join(outer) + name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.lists(st.sampled_from(OUTERMOST), max_size=3),
    st.none() | st.sampled_from(INNER),
)
def test_wrapped_names_are_the_same_checkpoint(layout: str, outer: list[str], inner: str | None) -> None:
    family = LAYOUTS[layout][0]
    tensors = random_tensors(layout)
    names = {wrapped(name, layout, outer, inner): tensors[stored_name(layout, name)] for name in CANONICAL[family]}
    with tempfile.TemporaryDirectory() as root:
        checkpoint = open_checkpoint(write_folder(Path(root), tensors=names))
        assert checkpoint.family is FAMILIES[family]
        assert checkpoint.tensors.names() == tuple(sorted(CANONICAL[family]))
        assert checkpoint.ignored.tensors == ()


def test_two_wrappings_of_one_tensor_are_refused(tmp_path: Path) -> None:
    name = "model.language_model.norm.weight"
    tensors = {**random_tensors("new Gemma"), f"_orig_mod.{name}": torch.zeros(WIDTH)}
    with pytest.raises(CheckpointError, match=rf"two names of the same tensor, '{name}'"):
        open_checkpoint(write_folder(tmp_path, tensors=tensors))


@pytest.mark.parametrize("prefix", ["vlm.", "policy.actor."])
def test_an_unknown_prefix_is_named(prefix: str, tmp_path: Path) -> None:
    tensors = {prefix + name: value for name, value in random_tensors("new Qwen").items()}
    with pytest.raises(CheckpointError, match=rf"names of the tensors begin with the unknown prefix '{prefix}'"):
        open_checkpoint(write_folder(tmp_path, tensors=tensors))
