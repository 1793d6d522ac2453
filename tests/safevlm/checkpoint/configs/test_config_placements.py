"""Random placements of a config's fields: transformers' own loader and ours agree, or ours refuses by name."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, Gemma3TextConfig, LlamaConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from safevlm.errors import CheckpointError
from tests.safevlm.checkpoint.both_loaders import ours, theirs, write_folder
from tests.safevlm.checkpoint.seeded_models import LONG, YARN, computed, model_of

FAMILIES = ("llava", "qwen2_5_vl", "gemma3")
CLASSES: dict[str, tuple[type, type]] = {
    "llava": (LlamaConfig, CLIPVisionConfig),
    "qwen2_5_vl": (Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig),
    "gemma3": (Gemma3TextConfig, SiglipVisionConfig),
}
HEADS: dict[str, list[tuple[int, int]]] = {
    "llava": [(4, 2), (4, 4), (8, 1), (32, 32)],  # 32, and key heads for each, are Llama's defaults
    "qwen2_5_vl": [(4, 2), (4, 4), (2, 1)],
    "gemma3": [(4, 2), (8, 4), (2, 2)],  # 8 and 4 are Gemma-3's
}
TOWERS: dict[str, list[dict[str, int]]] = {
    "llava": [{}, {"hidden_size": 48, "num_attention_heads": 12}, {"num_hidden_layers": 12}],
    "gemma3": [{}, {"hidden_size": 48, "num_attention_heads": 12}, {"num_hidden_layers": 12}],
    "qwen2_5_vl": [{}, {"hidden_size": 64, "num_heads": 16}, {"window_size": 8}],
}
ROPES: list[dict[str, Any]] = [
    {},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    YARN,
    {**YARN, "original_max_position_embeddings": 32, "beta_fast": 16.0},
    {**YARN, "attention_factor": 1.5, "mscale": 0.5, "mscale_all_dim": 2.0, "truncate": False},
    {**LONG, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]
JUNK = ["32", None, True, 1.5, float("nan"), float("inf"), -1, 0, 1, 7, 10**30, "", [], [1], {}, "silu", 0.5, 1e300]
NOT_READ = {
    *PreTrainedConfig().to_dict(),
    "architectures",
    "dtype",
    "transformers_version",
    "initializer_range",
    "image_seq_length",
}
"""What every config of transformers has, and what starts a training: no arithmetic depends on it."""


def agree(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Require the same numbers of both loaders, none of them NaN."""
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], atol=1e-5, rtol=1e-5)


@st.composite
def language_models(draw: st.DrawFn, family: str) -> dict[str, Any]:
    heads, groups = draw(st.sampled_from(HEADS[family]))
    text: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": groups}
    rope = draw(st.sampled_from(ROPES))
    half = (16 if family == "gemma3" else 64 // heads) // 2
    rope = {key: value[:1] * half if isinstance(value, list) else value for key, value in rope.items()}
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", **rope, "mrope_section": [half - 2, 1, 1]}
        text |= {"use_sliding_window": draw(st.booleans()), "sliding_window": 6, "max_window_layers": 1}
    text |= {"rope_scaling": rope} if rope else {}
    text |= draw(st.sampled_from([{}, {"rope_theta": 777.0}, {"max_position_embeddings": 24}, {"rms_norm_eps": 1e-3}]))
    return text


@st.composite
def placed(draw: st.DrawFn) -> tuple[str, Any, dict[str, Any]]:
    """Return a family, a model, and its config with fields at either place, stated or left out."""
    family = draw(st.sampled_from(FAMILIES))
    top: dict[str, Any] = {"tie_word_embeddings": draw(st.booleans())}
    if family == "llava":
        top |= {
            "vision_feature_layer": draw(st.sampled_from([-1, -2, 1, [0, -1], [-2], [1, 1, -1]])),
            "multimodal_projector_bias": draw(st.booleans()),
        }
    model = model_of(family, draw(language_models(family)), draw(st.sampled_from(TOWERS[family])), **top)
    config = json.loads(model.config.to_json_string(use_diff=draw(st.booleans())))
    for section, own_class in zip(("text_config", "vision_config"), CLASSES[family], strict=True):
        default = own_class().to_dict()
        if draw(st.booleans()):
            left_out = [key for key in config[section] if key in default and config[section][key] == default[key]]
            for key in left_out:
                del config[section][key]
    if (
        family != "gemma3" and "rope_parameters" in config["text_config"] and draw(st.booleans())
    ):  # rotary settings as before transformers 5
        rope = config["text_config"].pop("rope_parameters")
        config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    if family == "qwen2_5_vl" and draw(st.booleans()):  # flat, as before 4.52
        text = config.pop("text_config")
        text.pop("model_type", None)
        config = {**text, **config}
    config |= draw(st.sampled_from([{}, {"torch_dtype": "float32"}, {"dtype": "float32"}]))
    return family, model, config


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(placed())
def test_any_placement_means_what_it_means_to_transformers(drawn: tuple[str, Any, dict[str, Any]]) -> None:
    family, model, config = drawn
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name), model, config)
        found, wanted = computed(family, ours(Path(name))), computed(family, theirs(Path(name)))
    agree(found, wanted)


@functools.cache
def whole(family: str) -> tuple[Any, dict[str, Any]]:
    """Return a model and its config with every field stated."""
    rope = {"rope_scaling": YARN} if family == "llava" else {}
    model = model_of(family, rope)
    return model, json.loads(model.config.to_json_string(use_diff=False))


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_a_wrong_value_is_refused_or_means_the_same(data: st.DataObject) -> None:
    """Nothing but a CheckpointError comes out, and what is computed is what transformers computes."""
    family = data.draw(st.sampled_from(FAMILIES))
    model, config = whole(family)
    config = copy.deepcopy(config)
    sections = [config, config["text_config"], config["vision_config"], config["text_config"]["rope_parameters"]]
    section = data.draw(st.sampled_from(sections))
    keys = [key for key in sorted(section) if key not in NOT_READ and "token" not in key]
    key = data.draw(st.sampled_from(keys))
    value = data.draw(st.sampled_from(JUNK))
    section[key] = value
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name), model, config)
        try:
            found = computed(family, ours(Path(name)))
        except CheckpointError as error:
            assert len(str(error)) < 1000
            return
        wanted = computed(family, theirs(Path(name)))
    agree(found, wanted)


@pytest.mark.parametrize(
    ("family", "text", "tower"),
    [
        ("llava", {"num_attention_heads": 32, "num_key_value_heads": 32}, {}),
        ("llava", {}, {"hidden_size": 48, "num_attention_heads": 12}),
        ("gemma3", {}, {"hidden_size": 48, "num_attention_heads": 12}),
    ],
)
def test_heads_left_out_are_the_class_s(
    family: str, text: dict[str, Any], tower: dict[str, Any], tmp_path: Path
) -> None:
    """As transformers writes a section: what equals the default is left out, and no tensor shows it."""
    model = model_of(family, text, tower)
    config = json.loads(model.config.to_json_string(use_diff=False))
    for section, own_class in zip(("text_config", "vision_config"), CLASSES[family], strict=True):
        default = own_class().to_dict()
        config[section] = {key: value for key, value in config[section].items() if default.get(key, ...) != value}
    assert "num_attention_heads" not in {**config["vision_config" if tower else "text_config"]}
    write_folder(tmp_path, model, config)
    found, wanted = computed(family, ours(tmp_path)), computed(family, theirs(tmp_path))
    agree(found, wanted)


@pytest.mark.parametrize(
    ("family", "section", "gone", "message"),
    [
        ("llava", "text_config", ("hidden_size", "num_attention_heads"), "leaves out text_config.hidden_size.*State"),
        ("llava", "vision_config", ("hidden_size", "num_attention_heads"), "State vision_config.num_attention_heads"),
        ("gemma3", "vision_config", ("image_size", "num_attention_heads"), "State vision_config.num_attention_heads"),
        ("qwen2_5_vl", "vision_config", ("depth", "window_size"), "State vision_config.window_size"),
    ],
)
def test_no_default_beside_one_that_the_tensors_contradict(
    family: str, section: str, gone: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    model, config = whole(family)
    kept = {key: value for key, value in config[section].items() if key not in gone}
    write_folder(tmp_path, model, {**config, section: kept})
    with pytest.raises(CheckpointError, match=message):
        ours(tmp_path)
