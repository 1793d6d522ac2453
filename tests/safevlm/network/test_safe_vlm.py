"""The whole model says what transformers' own forward says, in a batch as one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.llava.processing_llava import LlavaProcessor

from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.families import FAMILIES
from safevlm.checkpoint.family import TapSource
from safevlm.errors import CheckpointError, InputError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.prompt_tokens import load_tokenizer, prompt_ids
from safevlm.network.safe_vlm import IMAGE, SafeVLM
from tests.safevlm.checkpoint.random_checkpoints import (
    CORPUS,
    IMAGE_TOKEN,
    LAYOUTS,
    QUESTIONS,
    SIZE,
    TOKENS,
    VOCAB,
    Written,
    write_checkpoint,
)

TAPS: tuple[TapSource, ...] = ("projector", "language_model")


def loaded(written: Written, tap: TapSource = "language_model") -> SafeVLM:
    grid = SIZE[written.family] if written.family == "qwen2_5_vl" else None
    return load_safe_vlm(open_checkpoint(str(written.folder), tap=tap), grid=grid)


def transformers_guard(written: Written, images: torch.Tensor, ids: list[list[int]], tap: str) -> torch.Tensor:
    """Return the guard's probabilities from transformers' full forward on equally long prompts."""
    if tap == "projector":
        return written.probs(written.features(images))
    last = written.full_forward(images, ids).hidden_states[-1]
    image = torch.tensor(ids) == IMAGE
    return written.probs(last[image].view(len(ids), -1, last.shape[-1]))


@pytest.fixture(scope="module", params=LAYOUTS, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Written, SafeVLM]:
    family, layout = request.param
    written = write_checkpoint(family, layout, tmp_path_factory.mktemp(family))
    return written, loaded(written)


def test_prefill_logits_equal_transformers(pair: tuple[Written, SafeVLM]) -> None:
    """Three questions of different length, padded to one batch, against three lone runs of transformers."""
    written, vlm = pair
    images = written.images(len(QUESTIONS))
    with torch.inference_mode():
        prefill = vlm.embed(images, QUESTIONS)
        hidden = vlm.language_forward(prefill.inputs_embeds, prefill.masks, prefill.position_ids)
        logits = vlm.token_logits(hidden)
    for row, question in enumerate(QUESTIONS):
        ids = vlm.prompt_ids(question)
        wanted = written.full_forward(images[row : row + 1], [ids]).logits[0]
        torch.testing.assert_close(logits[row, -len(ids) :], wanted, atol=1e-4, rtol=0)
        assert prefill.masks["attention_mask"][row].sum() == len(ids)


@pytest.mark.parametrize("tap", TAPS)
def test_guard_equals_transformers(pair: tuple[Written, SafeVLM], tap: TapSource) -> None:
    written, vlm = pair
    images = written.images(3)
    vlm.tap_source = tap
    wanted = transformers_guard(written, images, [vlm.prompt_ids("Why?")] * 3, tap)
    assert wanted.max() > 0.2
    probs, logits = vlm.guard(images)
    torch.testing.assert_close(probs, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.softmax(logits, -1), probs)
    answered = vlm.answer(images, QUESTIONS, max_new_tokens=1)
    torch.testing.assert_close(torch.from_numpy(np.stack([a.guard_probs for a in answered])), wanted, atol=1e-5, rtol=0)


def test_answers_equal_one_by_one_and_transformers_generate(pair: tuple[Written, SafeVLM]) -> None:
    written, vlm = pair
    images = written.images(len(QUESTIONS))
    together = vlm.answer(images, QUESTIONS, max_new_tokens=9)
    assert len({answer.text for answer in together}) > 1
    for row, question in enumerate(QUESTIONS):
        alone = vlm.answer(images[row : row + 1], [question], max_new_tokens=9)[0]
        assert together[row].text == alone.text
        np.testing.assert_allclose(together[row].guard_probs, alone.guard_probs, atol=1e-5)
        assert together[row].text == greedy(written, vlm, images[row : row + 1], question, 9)


def greedy(written: Written, vlm: SafeVLM, image: torch.Tensor, question: str, count: int) -> str:
    """Decode without a cache, running transformers' whole model again for every token."""
    ids, start = vlm.prompt_ids(question), len(vlm.prompt_ids(question))
    ends = {vlm.tokenizer.eos_token_id, vlm.tokenizer.convert_tokens_to_ids(vlm.family.prompt.end_of_turn)}
    while len(ids) < start + count:
        token = int(written.full_forward(image, [ids]).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return str(vlm.tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def test_the_end_of_turn_ends_an_answer(pair: tuple[Written, SafeVLM]) -> None:
    written, vlm = pair
    image = written.images(1)
    first = int(written.full_forward(image, [vlm.prompt_ids("Why?")]).logits[0, -1].argmax())
    eos = vlm.tokenizer.eos_token
    try:
        vlm.tokenizer.eos_token = vlm.tokenizer.convert_ids_to_tokens(first)
        assert vlm.tokenizer.eos_token_id == first
        assert vlm.answer(image, ["Why?"])[0].text == ""
    finally:
        vlm.tokenizer.eos_token = eos


def test_prompt_ids(pair: tuple[Written, SafeVLM]) -> None:
    written, vlm = pair
    ids = vlm.prompt_ids("Why?")
    first, count = ids.index(IMAGE), ids.count(IMAGE)
    assert count == TOKENS[written.family]
    assert ids[first : first + count] == [IMAGE] * count
    assert all(token == IMAGE or 0 <= token < VOCAB for token in ids)
    with pytest.raises(InputError, match="stands for the image"):
        vlm.prompt_ids(f"What is {IMAGE_TOKEN[written.family]}?")


def test_prompt_ids_equal_llava_s_processor(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_checkpoint("llava", "hf", tmp_path).folder)
    processor_class: Any = LlavaProcessor  # untyped
    processor = processor_class(
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    prompt = FAMILIES["llava"].prompt
    text = prompt.before_image.removeprefix("<s>") + "<image>" + prompt.after_image + "Why?" + prompt.after_question
    image = np.zeros((56, 56, 3), np.uint8)
    wanted = processor(images=[image], text=[text], return_tensors="np", add_special_tokens=False)["input_ids"][0]
    ids = prompt_ids(tokenizer, prompt, "Why?", 16)
    own = [tokenizer.convert_tokens_to_ids("<image>") if token == IMAGE else token for token in ids]
    assert own == [tokenizer.bos_token_id, *wanted.tolist()]


def test_prompt_ids_equal_gemma_s_processor(tmp_path: Path) -> None:
    folder = write_checkpoint("gemma3", "hf", tmp_path).folder
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=names)
    size = {"height": 56, "width": 56}
    processor = Gemma3Processor(Gemma3ImageProcessorPil(size=size), tokenizer, image_seq_length=4)
    text = "<bos><start_of_turn>user\n<start_of_image>Why?<end_of_turn>\n<start_of_turn>model\n"
    image = np.zeros((56, 56, 3), np.uint8)
    wanted = processor(images=[[image]], text=[text], return_tensors="np", add_special_tokens=False)["input_ids"][0]
    ids = prompt_ids(tokenizer, FAMILIES["gemma3"].prompt, "Why?", 4)
    assert [tokenizer.image_token_id if token == IMAGE else token for token in ids] == wanted.tolist()


def test_prompt_ids_equal_qwen_s_expanded_text(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_checkpoint("qwen2_5_vl", "hf", tmp_path).folder)
    prompt = FAMILIES["qwen2_5_vl"].prompt
    text = prompt.before_image + "<|image_pad|>" * 6 + prompt.after_image + "Why?" + prompt.after_question
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids = prompt_ids(tokenizer, prompt, "Why?", 6)
    assert [pad if token == IMAGE else token for token in ids] == tokenizer.encode(text, add_special_tokens=False)


def test_training_reuses_the_parts(pair: tuple[Written, SafeVLM]) -> None:
    """Gradients of a language-model loss and of the guard's reach every part that made them."""
    written, vlm = pair
    vlm.requires_grad_(True)
    try:
        images = written.images(2)
        sequences = [[*vlm.prompt_ids(question), 7, 8, 9] for question in QUESTIONS[:2]]
        prefill = vlm.assemble(sequences, vlm.image_features(images), SIZE[written.family])
        hidden = vlm.language_forward(prefill.inputs_embeds, prefill.masks, prefill.position_ids)
        loss = vlm.token_logits(hidden).float().logsumexp(-1).mean() + vlm.guard_logits(prefill, hidden)[:, 3].sum()
        torch.autograd.backward(loss)
        core = vlm.core
        tower = core.visual if written.family == "qwen2_5_vl" else core.vision_tower
        for part in (tower, core.language_model, vlm.head):
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    finally:
        vlm.requires_grad_(False)
        vlm.zero_grad()


def test_bad_calls(pair: tuple[Written, SafeVLM]) -> None:
    written, vlm = pair
    with pytest.raises(InputError, match="2 images and 1 questions"):
        vlm.embed(written.images(2), ["Why?"])
    with pytest.raises(InputError, match="image placeholders"):
        vlm.assemble([[1, IMAGE, 2]], vlm.image_features(written.images(1)), SIZE[written.family])


@pytest.mark.parametrize("model_type", ["llava", "safellava_llama"])
def test_prompt_ids_equal_llava_s_own_code(model_type: str, tmp_path: Path) -> None:
    """From tokenizer.model alone: the begin token, then each piece around the image by SentencePiece."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(CORPUS * 20))
    options: dict[str, Any] = {
        "vocab_size": 310,
        "model_type": "bpe",
        "byte_fallback": True,
        "minloglevel": 9,
    }
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / "tokenizer"), **options)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": {"AutoConfig": "a.B"}}))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    prompt = FAMILIES["llava"].prompt
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    before = pieces.encode(prompt.before_image.removeprefix("<s>"))
    after = pieces.encode(prompt.after_image + "Why?" + prompt.after_question)
    ids = prompt_ids(load_tokenizer(tmp_path), prompt, "Why?", 3)
    assert ids == [pieces.bos_id(), *before, IMAGE, IMAGE, IMAGE, *after]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_folder_without_tokenizer(name: str, tmp_path: Path) -> None:
    written = write_checkpoint("llava", "original", tmp_path)
    (written.folder / "tokenizer.json").unlink()
    (written.folder / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="no tokenizer can be read"):
        loaded(written)


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    written = write_checkpoint("gemma3", "hf", tmp_path)
    model: Any = loaded(written).model
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert not any(parameter.is_meta for parameter in model.parameters())
