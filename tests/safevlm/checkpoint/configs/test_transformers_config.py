"""A config says what the tensors say, in every layout, and a disagreement is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.errors import CheckpointError
from tests.safevlm.checkpoint.random_checkpoints import LAYOUTS, WIDTH, Written, write_checkpoint

VISION_KEYS = ("hidden_size", "intermediate_size", "patch_size")
TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
)


def config_of(written: Written, **changes: Any) -> Any:
    """Build the config after top-level keys of config.json were set, or with ``None`` removed."""
    path = written.folder / "config.json"
    stated = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))
    return build_config(open_checkpoint(str(written.folder), tap="projector"))


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_equals_the_model_s_own_config(family: str, layout: str, tmp_path: Path) -> None:
    written = write_checkpoint(family, layout, tmp_path)
    config, own = config_of(written), written.model.config
    for key in TEXT_KEYS:
        assert getattr(config.text_config, key) == getattr(own.text_config, key), key
    for key in VISION_KEYS:
        assert getattr(config.vision_config, key) == getattr(own.vision_config, key), key
    assert config.text_config._attn_implementation == config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
def test_unstated_widths_are_read_off_the_tensors(family: str, section: str, tmp_path: Path) -> None:
    written = write_checkpoint(family, "hf", tmp_path)
    own = written.model.config.to_dict()[section]
    widths = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "depth", "patch_size"}
    widths |= {"image_size", "out_hidden_size", "num_key_value_heads", "head_dim"}
    if family == "llava" and section == "vision_config":
        widths -= {"num_hidden_layers"}  # layers behind the one that is read need not be stored
    kept = {key: value for key, value in own.items() if key not in widths}
    config = config_of(written, **{section: kept})
    for key in widths & set(own):
        assert getattr(getattr(config, section), key) == own[key], key


def test_original_llava(tmp_path: Path) -> None:
    config = config_of(write_checkpoint("llava", "original", tmp_path))
    assert config.vision_config.num_hidden_layers == 3
    assert config.vision_config.num_attention_heads == 1
    assert config.vision_config.image_size == 56
    assert config.vision_config.hidden_act == "quick_gelu"
    assert config.vision_feature_layer == 2  # -2 of three layers: what two of them put out
    assert config.vision_feature_select_strategy == "default"
    assert config.text_config.pad_token_id is None
    assert not config.tie_word_embeddings


def test_gemma3_reads_both_window_forms(tmp_path: Path) -> None:
    written = write_checkpoint("gemma3", "hf", tmp_path)
    assert config_of(written).text_config.layer_types == ["sliding_attention", "full_attention"]
    text = written.model.config.to_dict()["text_config"]
    old = {key: value for key, value in text.items() if key not in ("layer_types", "rope_parameters")}
    old |= {"sliding_window_pattern": 2, "rope_theta": 500000.0, "rope_local_base_freq": 5000.0}
    old["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    config = config_of(written, text_config=old).text_config
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 5000.0
    assert config.rope_parameters["full_attention"]["rope_theta"] == 500000.0
    assert config.rope_parameters["full_attention"]["factor"] == 8.0


def test_qwen_old_rope(tmp_path: Path) -> None:
    rope = config_of(write_checkpoint("qwen2_5_vl", "old", tmp_path)).text_config.rope_parameters
    assert rope["mrope_section"] == [4, 6, 6]
    assert rope["rope_theta"] == 300000.0


@pytest.mark.parametrize(
    ("family", "layout", "changes", "message"),
    [
        (
            "llava",
            "original",
            {"intermediate_size": 256},
            rf"gate_proj.weight' has shape \(192, {WIDTH}\).*\(256, {WIDTH}\)",
        ),
        ("llava", "original", {"num_hidden_layers": 3}, "num_hidden_layers = 3, the files hold 2 layers"),
        ("llava", "original", {"num_attention_heads": 3}, "q_proj.weight' has shape"),
        ("llava", "original", {"mm_projector_type": "linear"}, "mm_projector_type = 'linear'"),
        ("llava", "original", {"mm_vision_select_layer": -9}, "asks for layer -9 of a vision tower with 3"),
        (
            "llava",
            "original",
            {"rope_scaling": {"rope_type": "no_such"}},
            "rotary embedding 'no_such'.* 'yarn'",
        ),
        ("llava", "original", {"num_key_value_heads": "two"}, "num_key_value_heads = 'two'; a whole number"),
        ("llava", "original", {"rms_norm_eps": "small"}, "config.json holds a value"),
        ("gemma3", "hf", {"mm_tokens_per_image": 0}, "mm_tokens_per_image = 0; a whole number"),
        (
            "qwen2_5_vl",
            "old",
            {"vocab_size": 201},
            r"embed_tokens.weight' has shape \(200, 128\).*\(201, 128\)",
        ),
        ("gemma3", "hf", {"mm_tokens_per_image": 9}, "mm_tokens_per_image = 9"),
    ],
)
def test_disagreement_is_named(family: str, layout: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    written = write_checkpoint(family, layout, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        config_of(written, **changes)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [("llava", "image_size", 70), ("gemma3", "patch_size", 7), ("qwen2_5_vl", "hidden_size", 32)],
)
def test_vision_widths_are_checked(family: str, key: str, value: int, tmp_path: Path) -> None:
    written = write_checkpoint(family, "hf", tmp_path)
    vision = written.model.config.to_dict()["vision_config"] | {key: value}
    with pytest.raises(CheckpointError, match=rf"has shape .*vision_config\.{key} = {value}"):
        config_of(written, vision_config=vision)


@pytest.mark.parametrize(
    ("layout", "stated", "told"),
    [
        ("hf", {"mm_vision_select_layer": -1}, "mm_vision_select_layer = -1, but .* vision_feature_layer, which is -2"),
        ("hf", {"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature = 'cls_patch', but"),
        (
            "original",
            {"vision_feature_layer": -1},
            "vision_feature_layer = -1, but .* mm_vision_select_layer, which is",
        ),
        ("hf", {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}, None),
        ("original", {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}, None),
    ],
)
def test_the_other_layouts_key_agrees_or_is_refused(
    layout: str, stated: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    written = write_checkpoint("llava", layout, tmp_path)
    if told is not None:
        with pytest.raises(CheckpointError, match=told):
            config_of(written, **stated)
        return
    config = config_of(written, **stated)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (2, "default")
