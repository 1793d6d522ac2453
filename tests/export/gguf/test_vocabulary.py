"""llama.cpp splits text into the very tokens that the checkpoint's own tokenizer gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from calibration.holisafe_mini.suite import build_suite
from export.gguf.artifact import GgufOptions, export_gguf
from export.gguf.vocabulary import _check_bytes, _check_different
from runtimes.language.gguf_artifact import open_gguf
from runtimes.language.llamacpp_language import open_session
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.checkpoint.hub import TINY_CHECKPOINTS
from safevlm.errors import CheckpointError
from safevlm.network.prompt_tokens import IMAGE, load_tokenizer, prompt_ids
from tests.export.gguf.geometries import write_geometry

ODD = [
    "",
    " ",
    "two  blanks",
    "a\nb\n\nc",
    "Where is THE square?!",
    "caf\u00e9 \u4f60\u597d \U0001f642",
    "12345 3.14",
    "it's  'quoted'",
]


@pytest.mark.parametrize("name", sorted(TINY_CHECKPOINTS))
def test_prompts_have_the_same_tokens(name: str, gguf_folder: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(name)
    tokenizer, prompt = load_tokenizer(checkpoint.folder), checkpoint.family.prompt
    suite = build_suite("test", pairs=100, questions=20)
    questions = [*ODD, *(each.row["query"] for each in (*suite.pairs, *suite.questions))]
    with open_session(open_gguf(gguf_folder(name))) as session, session.using() as llama:
        for question in questions:
            ids = prompt_ids(tokenizer, prompt, question, 1)
            at = ids.index(IMAGE)
            assert llama.tokens(prompt.before_image) == ids[:at]
            assert llama.tokens(prompt.after_image + question + prompt.after_question) == ids[at + 1 :], question
            text = question.strip()
            assert llama.text(tokenizer.encode(text, add_special_tokens=False)).strip() == text


@pytest.mark.parametrize("name", sorted(TINY_CHECKPOINTS))
def test_metadata_is_complete(name: str, gguf_folder: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(name)
    tokenizer = load_tokenizer(checkpoint.folder)
    fields = gguf.GGUFReader(gguf_folder(name) / "model.f16.gguf").fields
    rows = build_config(checkpoint).text_config.vocab_size
    assert len(fields["tokenizer.ggml.tokens"].data) == len(fields["tokenizer.ggml.token_type"].data) == rows
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    projector = gguf.GGUFReader(gguf_folder(name) / "mmproj.f16.gguf").fields
    mean = [float(value) for value in projector["clip.vision.image_mean"].contents()]
    assert mean == pytest.approx([float(value) for value in checkpoint.processor["image_mean"]])


def test_vocabularies_that_llama_cpp_ends_the_process_on_are_refused(tmp_path: Path) -> None:
    every_byte = [f"<0x{byte:02X}>".encode() for byte in range(256)]
    _check_bytes(tmp_path, every_byte)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model has no token <0x0A>; llama\.cpp needs one for every"):
        _check_bytes(tmp_path, [token for token in every_byte if token != b"<0x0A>"])
    _check_different(tmp_path, [b"a", b"b", b"", b"", b"\0x", b"\0y"])
    for twice in ([b"a", b"b", b"a"], [b"a", b"b", b"a\0z"]):
        with pytest.raises(CheckpointError, match="tokens 0 and 2 of the tokenizer are both 'a'"):
            _check_different(tmp_path, twice)


def test_a_tokenizer_model_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_geometry("llava", tmp_path / "checkpoint", text={"vocab_size": 700})
    with pytest.raises(CheckpointError, match="the embedding has only 700 rows"):
        export_gguf(open_checkpoint(folder), tmp_path / "out", GgufOptions(type="f16"))
    folder = write_geometry("llava", tmp_path / "torn")
    (folder / "tokenizer.model").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a SentencePiece model"):
        export_gguf(open_checkpoint(folder), tmp_path / "out", GgufOptions(type="f16"))
