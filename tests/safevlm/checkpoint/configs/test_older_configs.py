"""What a config meant to the transformers that wrote it, it means here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from safevlm.checkpoint.configs.older_configs import version_of
from safevlm.errors import CheckpointError
from tests.safevlm.checkpoint.both_loaders import ours, write_folder
from tests.safevlm.checkpoint.seeded_models import computed, model_of, seed_weights, seeded

WORLD = sorted((Path(__file__).parents[3] / "fixtures/world/configs").glob("*.json"))


@pytest.mark.parametrize("path", WORLD, ids=lambda path: path.stem)
def test_an_older_release_s_own_numbers(path: Path, tmp_path: Path) -> None:
    """The numbers were computed by the release that wrote the config, from weights that the names reproduce."""
    written = json.loads(path.read_text())
    family = path.stem.split("-")[1]
    (tmp_path / "config.json").write_text(json.dumps(written["config"]))
    model: Any = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    write_folder(tmp_path, seed_weights(family, model), written["config"])
    found = computed(family, ours(tmp_path))
    for key in ("guard", "logits"):
        torch.testing.assert_close(found[key], torch.tensor(written[key]), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("stated", "version"),
    [
        ("4.50.0.dev0", (4, 50)),
        ("4.9.2", (4, 9)),
        ("5.17.0", (5, 17)),
        (None, (999, 0)),
        (4.5, (4, 5)),
        ("new", (999, 0)),
    ],
)
def test_version_of(stated: object, version: tuple[int, int]) -> None:
    assert version_of({"transformers_version": stated}) == version


@pytest.mark.parametrize("writer", ["4.50.3", "5.17.0", None])
def test_gemma3_refuses_a_rope_type_by_its_former_name(writer: str | None, tmp_path: Path) -> None:
    """transformers 4 refuses it, 5 ignores it without a word."""
    model = model_of("gemma3", {})
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"transformers_version": writer}
    del config["text_config"]["rope_parameters"]
    config["text_config"]["rope_scaling"] = {"type": "linear", "factor": 8.0}
    write_folder(tmp_path, model, config)
    with pytest.raises(CheckpointError, match="Rename the key to rope_type"):
        ours(tmp_path)


LLAMA_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("family", "text", "told"),
    [
        ("llava", {"rope_parameters": LLAMA_ROPE}, r"rope_parameters = .* transformers 4\.57 .* does not read"),
        (
            "llava",
            {"rope_scaling": LLAMA_ROPE},
            r"rope_scaling.rope_theta = 500.0, .* the keys that it reads give 10000.0",
        ),
        ("gemma3", {"rope_theta": 123.0, "rope_parameters": GEMMA_ROPE}, "rope_parameters = .* does not read"),
        ("gemma3", {"sliding_window": 3}, "sliding_window = 3, less than the 4 tokens of an image"),
        ("gemma3", {"rope_parameters": LLAMA_ROPE}, "an object in full_attention and sliding_attention is allowed"),
        ("llava", {"rope_scaling": False}, "rope_scaling = False; an object is allowed"),
        ("llava", {"rope_parameters": {"rope_type": "default"}}, None),
        ("llava", {"rope_theta": 500.0, "rope_scaling": LLAMA_ROPE, "rope_parameters": LLAMA_ROPE}, None),
        ("gemma3", {"rope_parameters": GEMMA_ROPE}, None),
    ],
)
def test_keys_that_the_writer_does_not_read_agree_or_are_refused(
    family: str, text: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    """transformers 4.57.6 computes from the other keys alone: off by up to 0.24 from what 5 reads in them."""
    model = model_of(family, {})
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"transformers_version": "4.57.6"}
    del config["text_config"]["rope_parameters"]
    config["text_config"] |= json.loads(json.dumps(text))
    write_folder(tmp_path, model, config)
    if told is None:
        text = {key: value for key, value in text.items() if key != "rope_parameters"}
        agreed = ours(tmp_path).model.language_model.rotary_emb
        wanted = model_of(family, text).model.language_model.rotary_emb
        for (_, found), (_, same) in zip(agreed.named_buffers(), wanted.named_buffers(), strict=True):
            torch.testing.assert_close(found, same)
        return
    with pytest.raises(CheckpointError, match=told):
        ours(tmp_path)


@pytest.mark.parametrize(("writer", "answer"), [("4.57.6", "refused"), ("5.17.0", "stored")])
def test_a_second_embedding_beside_a_tied_config(writer: str, answer: str, tmp_path: Path) -> None:
    """transformers before 5 leaves it out, 5 computes with it, and a copy of the embedding is no second one."""
    model = model_of("llava", {})
    config = json.loads(model.config.to_json_string(use_diff=False))
    config |= {"transformers_version": writer, "tie_word_embeddings": True}
    config["text_config"]["tie_word_embeddings"] = True
    write_folder(tmp_path / "second", model, config)
    if answer == "refused":
        with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from .*embed_tokens"):
            ours(tmp_path / "second")
    else:
        output = ours(tmp_path / "second").lm_head.weight
        torch.testing.assert_close(output, seeded("lm_head.weight", tuple(output.shape)))
    model.lm_head.weight.data = model.model.language_model.embed_tokens.weight.data.clone()
    write_folder(tmp_path / "copy", model, config)
    copied = ours(tmp_path / "copy")
    torch.testing.assert_close(copied.lm_head.weight, copied.model.language_model.embed_tokens.weight)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_missing_output_embedding_is_not_tied_by_guess(family: str, tmp_path: Path) -> None:
    model = model_of(family, {})
    config = json.loads(model.config.to_json_string())
    model.config.tie_word_embeddings = True  # so that it is not written
    config.pop("tie_word_embeddings", None)
    config["text_config"].pop("tie_word_embeddings", None)
    write_folder(tmp_path, model, config)
    with pytest.raises(CheckpointError, match=r"lm_head.weight' is missing .*or leaves it to that default"):
        ours(tmp_path)
