"""Opening a checkpoint: every layout, nothing run, nothing heavy imported, and clear refusals."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from safevlm.checkpoint.checkpoint import HeadShape, open_checkpoint, standard_classes
from safevlm.checkpoint.families import FAMILIES
from safevlm.errors import CheckpointError, GuardHeadError, InputError
from tests.safevlm.checkpoint.folders import (
    CANONICAL,
    CONFIG,
    LAYOUTS,
    WIDTH,
    random_tensors,
    three_shards,
    write_folder,
    write_safetensors,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_opens_as_the_same_checkpoint(layout: str, tmp_path: Path) -> None:
    family = LAYOUTS[layout][0]
    checkpoint = open_checkpoint(write_folder(tmp_path / "Some-Model", layout, shard_of=three_shards))
    assert checkpoint.name == "Some-Model"
    assert checkpoint.revision is None
    assert checkpoint.family is FAMILIES[family]
    assert checkpoint.head == HeadShape(widths=(WIDTH, WIDTH // 2, 20))
    assert checkpoint.head.layers == (0, 3)
    assert checkpoint.hidden_size == WIDTH
    assert checkpoint.classes == standard_classes()
    assert checkpoint.tap.source == FAMILIES[family].default_tap
    assert checkpoint.processor == FAMILIES[family].preprocessing
    parts = (checkpoint.vision_names(), checkpoint.head_names(), checkpoint.language_names())
    assert sorted(name for part in parts for name in part) == sorted(CANONICAL[family])
    assert all(name.startswith("img_safety_head.mlp.") for name in parts[1])
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name in parts[2])
    assert checkpoint.tensors.read_names == frozenset()


def test_the_standard_classes_are_the_twenty_of_the_paper() -> None:
    classes = standard_classes()
    assert (len(classes), len(set(classes))) == (20, 20)
    assert (classes[0], classes[6], classes[19]) == ("safe", "drug_related_hazards", "medical_advice")


def test_opening_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    code = (
        "import sys, safevlm.checkpoint.checkpoint\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "safevlm.checkpoint.checkpoint.open_checkpoint(sys.argv[1])\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_nothing_of_the_folder_is_imported(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    config = {**CONFIG, "auto_map": {"AutoConfig": "configuration_evil.Evil", "AutoModel": "evil.Evil"}}
    folder = write_folder(tmp_path / "m", config=config)
    bomb = f"open({str(proof)!r}, 'w').close()\nraise SystemExit('ran')\n# img_safety_head\n"
    for name in ("configuration_evil.py", "evil.py", "__init__.py", "sitecustomize.py", "json.py", "torch.py"):
        (folder / name).write_text(bomb)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch proof'\ntR.")
    code = "import sys; from safevlm.checkpoint.checkpoint import open_checkpoint\n"
    code += "print(open_checkpoint(sys.argv[1]).family.key)"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "gemma3"
    assert not proof.exists()


def test_the_family_is_told_from_tensors_whatever_model_type_says(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    assert open_checkpoint(write_folder(tmp_path, "original LLaVA", config=config)).family.key == "llava"


def test_no_family_says_what_each_would_need_and_what_is_there(tmp_path: Path) -> None:
    tensors = random_tensors("original LLaVA")
    del tensors["model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"]
    folder = write_folder(tmp_path / "a", tensors=tensors)
    with pytest.raises(CheckpointError, match="Safe-VLM of no known family") as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert "SafeLLaVA needs 'model.vision_tower.embeddings.class_embedding';" in text
    assert "SafeQwen2.5-VL needs 'model.visual.patch_embed.proj.weight', " in text
    assert "SafeGem needs 'model.multi_modal_projector.mm_input_projection_weight', " in text
    assert "Tensors stored: img_safety_head.mlp.0.bias, " in text
    with pytest.raises(CheckpointError, match=r"not a Safe-VLM checkpoint.*Tensors stored: bert.weight"):
        open_checkpoint(write_folder(tmp_path / "b", tensors={"bert.weight": torch.zeros(2)}))


def test_two_families_at_once_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors("original LLaVA") | random_tensors("old Qwen")
    with pytest.raises(CheckpointError, match=r"fit several families: SafeLLaVA, SafeQwen2.5-VL"):
        open_checkpoint(write_folder(tmp_path, tensors=tensors))


def head_tensors(*widths: int) -> dict[str, torch.Tensor]:
    tensors = {name: value for name, value in random_tensors("new Gemma").items() if "img_safety" not in name}
    for at, (into, out) in enumerate(pairwise(widths)):
        tensors[f"img_safety_head.mlp.{3 * at}.weight"] = torch.zeros(out, into)
        tensors[f"img_safety_head.mlp.{3 * at}.bias"] = torch.zeros(out)
    return tensors


@pytest.mark.parametrize("widths", [(8, 20), (8, 4, 20), (8, 6, 5, 20)])
def test_heads_of_any_depth_are_read(widths: tuple[int, ...], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors=head_tensors(*widths)))
    assert checkpoint.head.widths == widths
    assert checkpoint.head.layers == (0, 3, 6)[: len(widths) - 1]


def test_a_checkpoint_without_head_says_how_it_was_lost(tmp_path: Path) -> None:
    with pytest.raises(GuardHeadError, match=r"stock class of its base .* drops the head.*every public quantization"):
        open_checkpoint(write_folder(tmp_path, tensors=head_tensors()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_safety_head.mlp.3.bias": None}, "'img_safety_head.mlp.3.bias' is missing"),
        ({"img_safety_head.mlp.0.weight": None, "img_safety_head.mlp.0.bias": None}, r"stand at \[3\]"),
        ({"img_safety_head.mlp.5.weight": (2, 2)}, r"stand at \[0, 3, 5\].*must stand at 0, 3, 6"),
        ({"img_safety_head.mlp.0.qweight": (2, 2)}, r"'img_safety_head.mlp.0.qweight' .* not a guard head's tensor"),
        ({"img_safety_head.norm.weight": (2,)}, "'img_safety_head.norm.weight' .* not a guard head's tensor"),
        ({"img_safety_head.mlp.3.weight": (20, 5)}, r"'img_safety_head.mlp.0' gives 4 features.*takes 5"),
        ({"img_safety_head.mlp.3.bias": (19,)}, r"shape \(20, 4\) and its bias of shape \(19,\) do not form a Linear"),
        ({"img_safety_head.mlp.0.weight": (4, 8, 1)}, r"shape \(4, 8, 1\) .* do not form a Linear"),
        ({"img_safety_head.mlp.0.weight": (4, 9)}, "takes 9 features, the language model's hidden size is 8"),
    ],
)
def test_a_damaged_head_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = head_tensors(8, 4, 20)
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    with pytest.raises(GuardHeadError, match=message):
        open_checkpoint(write_folder(tmp_path, tensors=tensors))


def test_a_head_in_integers_is_refused(tmp_path: Path) -> None:
    tensors = head_tensors(8, 4, 20)
    tensors["img_safety_head.mlp.0.weight"] = tensors["img_safety_head.mlp.0.weight"].to(torch.int8)
    with pytest.raises(GuardHeadError, match=r"mlp.0.weight' \(I8\).*F16, BF16, F32, F64"):
        open_checkpoint(write_folder(tmp_path, tensors=tensors))


@pytest.mark.parametrize("layout", ["original LLaVA", "old Qwen", "old Gemma"])
@pytest.mark.parametrize(
    "config", [{"hidden_size": WIDTH}, {"text_config": {"hidden_size": WIDTH}}, {}, {"text_config": {}}]
)
def test_the_width_is_found_wherever_it_is_kept(layout: str, config: dict[str, Any], tmp_path: Path) -> None:
    tensors = random_tensors(layout)
    assert open_checkpoint(write_folder(tmp_path / "good", layout, config=config)).hidden_size == WIDTH
    name = next(name for name in tensors if name.endswith("img_safety_head.mlp.0.weight"))
    tensors[name] = torch.zeros(WIDTH // 2, WIDTH + 1)
    with pytest.raises(GuardHeadError, match="takes 9 features, the language model's hidden size is 8"):
        open_checkpoint(write_folder(tmp_path / "bad", config=config, tensors=tensors))


def test_class_names_of_the_config_go_before_the_standard_ones(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(20)]
    config = {**CONFIG, "safety_categories": names, "num_safety_categories": 20}
    assert open_checkpoint(write_folder(tmp_path, config=config)).classes == tuple(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"safety_categories": ["a", "b"]}, "'safety_categories' has 2 names, the guard head has 20 outputs"),
        ({"num_safety_categories": 19}, "num_safety_categories = 19, the guard head has 20 outputs"),
        ({"num_safety_categories": "20"}, "num_safety_categories = '20'"),
        ({"safety_categories": ["a"] * 20}, "a name appears twice: a, a"),
        ({"safety_categories": "safe"}, "is 'safe'; a list of 20 names"),
        ({"safety_categories": [1] * 20}, "a list of 20 names"),
        ({"safety_categories": {"0": "safe"}}, "a list of 20 names"),
    ],
)
def test_a_class_list_that_disagrees_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(GuardHeadError, match=message):
        open_checkpoint(write_folder(tmp_path, config={**CONFIG, **change}))


def test_another_number_of_classes_needs_its_own_names(tmp_path: Path) -> None:
    with pytest.raises(GuardHeadError, match="the standard list of classes has 20 names, the guard head has 3"):
        open_checkpoint(write_folder(tmp_path / "a", tensors=head_tensors(8, 3)))
    config = {**CONFIG, "safety_categories": ["safe", "b", "c"]}
    checkpoint = open_checkpoint(write_folder(tmp_path / "b", tensors=head_tensors(8, 3), config=config))
    assert checkpoint.classes == ("safe", "b", "c")


def test_the_tap_is_the_callers_the_configs_or_the_codes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, config={**CONFIG, "safety_tap": "language_model"})
    assert open_checkpoint(folder).tap.source == "language_model"
    tap = open_checkpoint(folder, tap="projector").tap
    assert (tap.source, tap.learned) == ("projector", "declared")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing"),
        (b"{", "config.json: not valid JSON"),
        (b"[]", "must be a JSON object, not list"),
        (b"\xff\xff", r"config.json: not valid JSON \(not UTF-8 text"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_damaged_shard_is_found_when_opening(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, shard_of=three_shards)
    write_safetensors(folder / three_shards("lm_head"), {"t": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}})
    with pytest.raises(CheckpointError, match=r"00002-of-00003.safetensors: its header lies about tensor 't'"):
        open_checkpoint(folder)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"revision 'v1' is given, but .* is a folder"):
        open_checkpoint(write_folder(tmp_path), revision="v1")
