"""What lies beside the weights is what their readers ask for, and says what the source said."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from quantize.streamed.artifact import write_light_files, write_tensors
from quantize.streamed.companions import ImageToken
from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.network.prompt_tokens import IMAGE, load_tokenizer, prompt_ids, stated_ends, stop_ids

QUESTIONS = ("What is drawn?", "\nWhy?", "Is 2 + 2 = 4, and what of <b>?", " ")


def copied(name: str, folder: Path, **changed: Any) -> Path:
    """Copy a tiny checkpoint; ``changed`` keys of its config."""
    shutil.copytree(open_checkpoint(name).folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    return folder


def written(source: Checkpoint, folder: Path) -> tuple[Checkpoint, ImageToken]:
    folder.mkdir()
    token = write_light_files(source, folder)
    write_tensors(source, None, folder, token=token)
    return open_checkpoint(folder), token


@pytest.mark.parametrize("model", ["tiny-safellava", "tiny-safeqwen", "tiny-safegem"])
def test_prompts_ends_and_pixels_stay_what_they_were(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_checkpoint(model)
    with caplog.at_level(logging.WARNING):
        artifact, token = written(source, tmp_path / "out")
    assert not caplog.records
    before, after = load_tokenizer(source.folder), load_tokenizer(artifact.folder)
    prompt = source.family.prompt
    for question in QUESTIONS:
        assert prompt_ids(after, prompt, question, 3) == prompt_ids(before, prompt, question, 3)
    assert after.convert_tokens_to_ids(prompt.image_token) == token.id
    config = artifact.config
    assert config.get("image_token_index", config.get("image_token_id")) == token.id
    assert token.id < artifact.tensors.shape("model.language_model.embed_tokens.weight")[0], "transformers looks it up"
    assert GenerationConfig.from_pretrained(artifact.folder).eos_token_id is not None
    ends = stop_ids(before, prompt) | stated_ends(source.folder)
    assert stated_ends(artifact.folder) == ends, "no answer runs on where only generation_config.json is read"
    grid = (168, 168) if model == "tiny-safeqwen" else None
    was, is_now = (read_processor(each.processor, family=each.family.key, grid=grid) for each in (source, artifact))
    assert was == is_now
    assert (artifact.folder / "chat_template.jinja").is_file()


def test_only_the_token_that_is_new_is_added(tmp_path: Path) -> None:
    source = open_checkpoint("tiny-safellava")
    artifact, token = written(source, tmp_path / "once")
    assert token == ImageToken(text="<image>", id=896, is_new=True)
    again, same = written(artifact, tmp_path / "twice")
    assert same == ImageToken(text="<image>", id=896, is_new=False)
    assert (again.folder / "tokenizer.json").read_bytes() == (artifact.folder / "tokenizer.json").read_bytes()
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        old, new = source.tensors.read(name), artifact.tensors.read(name)
        assert torch.equal(new[:896], old) and torch.equal(new[896:], old[:1]), "its logit is that of another token"
        assert again.tensors.shape(name) == artifact.tensors.shape(name)


def test_a_sentencepiece_model_alone_becomes_a_tokenizer_json(tmp_path: Path) -> None:
    """transformers makes another tokenizer of the model alone, without the mark before the first word."""
    folder = copied("tiny-safellava", tmp_path / "source")
    (folder / "tokenizer.json").unlink()
    source = open_checkpoint(folder)
    artifact, token = written(source, tmp_path / "out")
    theirs: Any = AutoTokenizer.from_pretrained(artifact.folder)
    prompt = source.family.prompt
    for question in QUESTIONS[:3]:
        text = (prompt.before_image + "<image>" + prompt.after_image + question).removeprefix("<s>")
        found = [theirs.bos_token_id, *theirs.encode(text, add_special_tokens=False)]
        own = prompt_ids(load_tokenizer(folder), prompt, question, 1)
        assert [IMAGE if each == token.id else each for each in found] == own[: len(found)]


def test_llava_s_padding_is_said_where_transformers_reads_it(tmp_path: Path) -> None:
    source = open_checkpoint(copied("tiny-safellava", tmp_path / "source", image_aspect_ratio="pad"))
    artifact, _ = written(source, tmp_path / "out")
    stated = json.loads((artifact.folder / "preprocessor_config.json").read_text())
    assert stated["image_processor_type"] == "LlavaImageProcessor" and stated["do_pad"] is True
    padded = read_processor(artifact.processor, family="llava")
    assert padded.fit == "pad" and padded == read_processor(source.processor, family="llava")


def test_settings_and_template_of_the_base_model_are_written_down(tmp_path: Path) -> None:
    folder = copied("tiny-safeqwen", tmp_path / "source")
    for name in ("preprocessor_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    artifact, _ = written(open_checkpoint(folder), tmp_path / "out")
    stated = json.loads((artifact.folder / "preprocessor_config.json").read_text())
    assert stated["image_processor_type"] == "Qwen2VLImageProcessor" and stated["min_pixels"] == 3136
    assert "<|vision_start|>" in (artifact.folder / "chat_template.jinja").read_text()


def test_what_the_source_says_of_sampling_and_templates_stays(tmp_path: Path) -> None:
    folder = copied("tiny-safegem", tmp_path / "source")
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 64, "eos_token_id": 1}')
    (folder / "chat_template.jinja").write_text("{{ bos_token }}mine")
    artifact, _ = written(open_checkpoint(folder), tmp_path / "out")
    found = json.loads((artifact.folder / "generation_config.json").read_text())
    assert found["do_sample"] is True and found["top_k"] == 64 and found["eos_token_id"] == [1, 5]
    assert (artifact.folder / "chat_template.jinja").read_text() == "{{ bos_token }}mine"


def test_a_tokenizer_that_marks_only_the_first_word_is_said_to_write_other_prompts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied("tiny-safellava", tmp_path / "source")
    (folder / "tokenizer.model").unlink()
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = None
    tokenizer["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    path.write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.WARNING):
        written(open_checkpoint(folder), tmp_path / "out")
    assert "with <image> as a token, the tokenizer writes a prompt as" in caplog.text
