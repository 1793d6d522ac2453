"""The three tiny checkpoints that ship: of the real kind, and as good as promised on pictures they never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tiny.blueprints import BLUEPRINTS
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.hub import TINY_CHECKPOINTS, TINY_FOLDER
from safevlm.network.loading import load_safe_vlm

REAL_NAMES = {
    "tiny-safellava": {
        "model.layers.0.self_attn.q_proj.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "lm_head.weight",
    },
    "tiny-safeqwen": {"visual.merger.mlp.2.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"},
    "tiny-safegem": {
        "language_model.model.layers.0.self_attn.q_norm.weight",
        "multi_modal_projector.mm_input_projection_weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    },
}
GUARD_KEYS = {
    "safety_categories",
    "num_safety_categories",
    "safety_head_hidden_scale",
    "safety_num_hidden_layers",
    "safety_loss_lambda",
}


@pytest.mark.parametrize("name", TINY_CHECKPOINTS)
def test_it_is_small_and_stored_in_16_bit_under_the_real_names(name: str) -> None:
    checkpoint = open_checkpoint(name)
    tensors = checkpoint.tensors
    assert sum(path.stat().st_size for path in checkpoint.folder.glob("*.safetensors")) <= 8_000_000
    assert {tensors.dtype(tensor) for tensor in tensors.names()} == {"F16"}
    stored = {tensors.stored_name(tensor) for tensor in tensors.names()}
    assert stored >= REAL_NAMES[name] | {"img_safety_head.mlp.0.weight", "img_safety_head.mlp.3.bias"}
    assert set(checkpoint.config) >= GUARD_KEYS


@pytest.mark.parametrize(
    ("name", "tap"),
    [("tiny-safellava", "language_model"), ("tiny-safeqwen", "language_model"), ("tiny-safegem", "projector")],
)
def test_it_taps_where_its_family_does(name: str, tap: str) -> None:
    assert open_checkpoint(name).tap.source == tap


@pytest.mark.parametrize("name", TINY_CHECKPOINTS)
def test_widths_are_what_block_quantization_needs(name: str) -> None:
    text = BLUEPRINTS[name].text
    for key in ("hidden_size", "intermediate_size"):
        assert text[key] % 256 == 0


def test_the_families_geometry_is_kept() -> None:
    llava, qwen, gemma = (BLUEPRINTS[name] for name in ("tiny-safellava", "tiny-safeqwen", "tiny-safegem"))
    assert llava.config["mm_vision_select_layer"] == -2
    assert llava.config["mm_vision_select_feature"] == "patch"
    side = int(qwen.processor["max_pixels"] ** 0.5)
    assert qwen.vision["window_size"] == 112 < side, "no window is smaller than the picture"
    assert qwen.vision["spatial_merge_size"] == 2
    patches = (gemma.vision["image_size"] // gemma.vision["patch_size"]) ** 2
    assert patches == 16 * gemma.config["mm_tokens_per_image"]


@pytest.mark.parametrize("name", TINY_CHECKPOINTS)
def test_the_tokenizer_is_of_the_familys_kind(name: str) -> None:
    folder = TINY_FOLDER / name
    kind = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert kind["type"] == "BPE"
    assert (folder / "tokenizer.model").is_file() == (name != "tiny-safeqwen")
    assert bool(kind.get("byte_fallback")) == (name != "tiny-safeqwen")
    model = load_safe_vlm(open_checkpoint(name))
    text = "How do I open the red circle? 1234 Ünïcode ✓"
    assert model.tokenizer.decode(model.tokenizer.encode(text, add_special_tokens=False)).strip() == text


@pytest.mark.parametrize("name", TINY_CHECKPOINTS)
def test_the_chat_template_writes_the_familys_prompt(name: str) -> None:
    checkpoint = open_checkpoint(name)
    model = load_safe_vlm(checkpoint)
    question = "What colour is the circle?"
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    ]
    written = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = checkpoint.family.prompt
    image = {"tiny-safegem": "<start_of_image>"}.get(name, prompt.image_token)
    expected = prompt.before_image + prompt.image_token + prompt.after_image + question + prompt.after_question
    if name == "tiny-safegem":  # its processor puts the lines and marks around the image
        marks = f"\n\n<start_of_image>{prompt.image_token}<end_of_image>\n\n"
        expected = expected.replace(marks, image)
    assert written == expected


@pytest.mark.parametrize("name", TINY_CHECKPOINTS)
def test_a_guard_s_verdict_does_not_depend_on_the_question(name: str) -> None:
    model = load_safe_vlm(open_checkpoint(name))
    size = (model.preprocessing.height, model.preprocessing.width)
    images = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    said = model.answer(images, ["Where is the star?", "Is there a dome?"], max_new_tokens=1)
    probs, _ = model.guard(images)
    for answer, row in zip(said, probs, strict=True):
        torch.testing.assert_close(torch.from_numpy(answer.guard_probs), row, atol=1e-5, rtol=0)


def test_they_ship_with_the_package(tmp_path: Path) -> None:
    assert {path.name for path in TINY_FOLDER.iterdir() if path.is_dir()} == set(TINY_CHECKPOINTS)
