"""Train the tiny checkpoints' tokenizers: each of its family's kind, with the family's special tokens.

LLaVA: SentencePiece BPE with byte fallback and a dummy prefix, as Llama-2's. Gemma: the same without the
prefix and with Gemma's turn and image tokens. Qwen: byte-level BPE behind Qwen2's pre-tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from calibration.holisafe_mini.questions import PAIR_TYPES, sample_pair
from calibration.holisafe_mini.scene import sample_scene, scene_rng
from safevlm.checkpoint.family import Family

__all__ = ["PIECES", "corpus", "train_gemma", "train_llama", "train_qwen"]

PIECES = 896
"""SentencePiece pieces; Gemma's image token comes after them, as in the real vocabulary."""

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer pattern, from the ``tokenizer.json`` of the Qwen2.5 models."""

_QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_GEMMA_SPECIAL = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "\n", "\n\n", "\n\n\n")


def corpus(family: Family, scenes: int = 2000) -> Iterator[str]:
    """Yield the training part's sentences and the family's prompt text, without special tokens."""
    prompt = family.prompt
    for index in range(scenes):
        rng = scene_rng("train", index)
        scene = sample_scene(rng, label=index % 20)
        for pair_type in PAIR_TYPES:
            if (pair_type[0] == "S") == (scene.label == 0):
                pair = sample_pair(scene, pair_type, rng)
                yield from (pair.query, pair.answer)
    for text in (prompt.before_image, prompt.after_question):
        yield from [_without_special(text)] * 3000


def _without_special(text: str) -> str:
    for special in ("<s>", "<bos>", *_GEMMA_SPECIAL[:4], *_QWEN_SPECIAL):
        text = text.replace(special, " ")
    return text.strip()


def _train_sentencepiece(lines: Iterable[str], folder: Path, **options: Any) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.vocab").unlink()


def train_llama(lines: Iterable[str], folder: Path) -> None:
    """Write LLaVA's tokenizer files, made of ``lines``, into ``folder``."""
    from transformers import LlamaTokenizer

    _train_sentencepiece(lines, folder, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    _write(
        folder,
        "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "legacy": True,
            "clean_up_tokenization_spaces": False,
            "padding_side": "right",
            "model_max_length": 2048,
        },
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    _write(folder, "special_tokens_map.json", tokens)
    _write_fast_form(LlamaTokenizer, folder)


def _gemma_added() -> Iterator[tuple[int, str]]:
    """Yield Gemma's special tokens with their ids: the turn and image marks, and the image token after all.

    The last one is a word of the real vocabulary that vLLM looks up.
    """
    yield from enumerate(("<pad>", "<eos>", "<bos>", "<unk>", *_GEMMA_SPECIAL[:4]))
    yield PIECES, "<image_soft_token>"
    yield PIECES + 1, "\n" * 4


def _added(token: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": token, **flags, "special": token.strip() != ""}


def train_gemma(lines: Iterable[str], folder: Path) -> None:
    """Write Gemma's tokenizer files, made of ``lines``, into ``folder``."""
    from transformers import GemmaTokenizer

    _train_sentencepiece(
        lines,
        folder,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        add_dummy_prefix=False,
        user_defined_symbols=list(_GEMMA_SPECIAL),
    )
    _write(
        folder,
        "tokenizer_config.json",
        {
            "tokenizer_class": "GemmaTokenizer",
            "processor_class": "Gemma3Processor",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {str(index): _added(token) for index, token in _gemma_added()},
        },
    )
    _write_fast_form(GemmaTokenizer, folder)


def _write_fast_form(tokenizer: Any, folder: Path) -> None:
    """Write ``tokenizer.json`` beside ``tokenizer.model``, as the base models' repositories have both.

    Llama's is the legacy form, in which every piece of text between special tokens gets the dummy prefix:
    what LLaVA was trained with and what llama.cpp does.
    """
    tokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))


def train_qwen(lines: Iterable[str], folder: Path) -> None:
    """Write Qwen's tokenizer files, made of ``lines``, into ``folder``."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _QWEN_SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    _write(
        folder,
        "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "processor_class": "Qwen2_5_VLProcessor",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "additional_special_tokens": list(_QWEN_SPECIAL[1:]),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 32768,
        },
    )


def _write(folder: Path, name: str, data: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
