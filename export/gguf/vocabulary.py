"""Tokens, scores, merges, special tokens and chat template as llama.cpp reads them.

SentencePiece models (LLaVA, Gemma) become llama.cpp's ``llama`` tokenizer, byte-level BPE (Qwen) its ``gpt2`` with the
pre-tokenizer ``qwen2``. Rows of the embedding without a token are named ``[PAD…]`` and unused, as llama.cpp's own
converter does it, so that ids and rows agree.
"""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from export.gguf.families import gguf_family_of
from export.gguf.writing import gguf_library
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.errors import CheckpointError
from safevlm.network.prompt_tokens import fitting_tokenizer

__all__ = ["vocabulary_keys"]

SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}
WORD_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0


def vocabulary_keys(checkpoint: Checkpoint, vocab_size: int, writer: Any) -> None:
    """Set the tokenizer's metadata for an embedding of ``vocab_size`` rows.

    Raises CheckpointError for a folder without the tokenizer's files, and for more tokens than rows.
    """
    tokenizer = fitting_tokenizer(checkpoint.folder, checkpoint.family.prompt, vocab_size)
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise CheckpointError(
            f"{checkpoint.name}: the tokenizer has token {largest}, but the embedding has only {vocab_size} rows. "
            "They belong to different models."
        )
    language = gguf_family_of(checkpoint).language
    pre = language.pre_tokenizer
    if pre is not None:
        tokens = _byte_bpe(checkpoint.folder, tokenizer, vocab_size, pre, writer)
    else:
        tokens = _sentencepiece(checkpoint.folder, tokenizer, vocab_size, writer)
        _check_bytes(checkpoint.folder, tokens)
    _check_different(checkpoint.folder, tokens)
    writer.add_token_list(tokens)
    for name, attribute in SPECIAL.items():
        token = getattr(tokenizer, attribute, None)
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(tokenizer.bos_token is not None and pre is None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(language.space_prefix)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def _check_different(folder: Path, tokens: list[bytes]) -> None:
    """Refuse two tokens of one text: llama.cpp ends the process on them. It reads a text up to its first NUL."""
    first: dict[bytes, int] = {}
    for token, text in enumerate(tokens):
        read = text.partition(b"\0")[0]
        other = first.setdefault(read, token) if read else token
        if other != token:
            raise CheckpointError(
                f"{folder}: tokens {other} and {token} of the tokenizer are both {read.decode('utf-8', 'replace')!r}; "
                "llama.cpp allows each text only once. Copy the tokenizer's files from the base model."
            )


def _check_bytes(folder: Path, tokens: list[bytes]) -> None:
    """Refuse a vocabulary without a token a byte: llama.cpp ends the process on text that only they could spell."""
    known = set(tokens)
    for byte in range(256):
        if f"<0x{byte:02X}>".encode() not in known and bytes([byte]) not in known:
            raise CheckpointError(
                f"{folder / 'tokenizer.model'} has no token <0x{byte:02X}>; llama.cpp needs one for every byte. Use a "
                "SentencePiece model with byte fallback, as the base model's."
            )


def _unused(token: int, taken: Container[bytes]) -> bytes:
    """Return a name for a row without a token, that no token has."""
    name = f"[PAD{token}]".encode()
    while name in taken:
        name += b"_"
    return name


def _added(tokenizer: Any) -> dict[int, tuple[str, bool]]:
    """Return the tokens that stand beside the model's own vocabulary, and whether each is special."""
    return {
        int(token): (str(each.content), bool(each.special)) for token, each in tokenizer.added_tokens_decoder.items()
    }


def _byte_bpe(folder: Path, tokenizer: Any, vocab_size: int, pre: str, writer: Any) -> list[bytes]:
    """Set everything but the tokens, and return those."""
    gguf = gguf_library()
    added = _added(tokenizer)
    names = {token: text.encode() for text, token in tokenizer.get_vocab().items()}
    taken, types = {*names.values()}, []
    tokens: list[bytes] = []
    for token in range(vocab_size):
        if token in added:
            text, special = added[token]
            tokens.append(text.encode())
            types.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        elif token in names:
            tokens.append(names[token])
            types.append(gguf.TokenType.NORMAL)
        else:
            tokens.append(_unused(token, taken))
            types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_types(types)
    writer.add_token_merges(_merges(folder, tokenizer))
    return tokens


def _merges(folder: Path, tokenizer: Any) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    stated = None if backend is None else json.loads(backend.to_str()).get("model", {}).get("merges")
    if not stated:
        raise CheckpointError(
            f"{folder}: the tokenizer has no merges. Copy tokenizer.json, or vocab.json and merges.txt, from the "
            "base model."
        )
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in stated]


def _sentencepiece(folder: Path, tokenizer: Any, vocab_size: int, writer: Any) -> list[bytes]:
    """Set everything but the tokens, and return those."""
    from sentencepiece import SentencePieceProcessor

    gguf = gguf_library()
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: llama.cpp needs the scores of the SentencePiece model. Copy it from the base model."
        )
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model: {error}. Copy it from the base model.") from error
    if pieces.GetPieceSize() > vocab_size:
        raise CheckpointError(
            f"{path} has {pieces.GetPieceSize()} tokens, but the embedding has only {vocab_size} rows. They belong to "
            "different models."
        )
    taken = {text.encode() for text in tokenizer.get_vocab()}
    tokens = [_unused(token, taken) for token in range(vocab_size)]
    scores = [UNUSED_SCORE] * vocab_size
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token in range(pieces.GetPieceSize()):
        tokens[token] = pieces.IdToPiece(token).encode("utf-8")
        scores[token] = pieces.GetScore(token)
        types[token] = _type(gguf, pieces, token)
    for token, (text, special) in _added(tokenizer).items():
        own = token < pieces.GetPieceSize()
        if own and types[token] == gguf.TokenType.UNKNOWN:
            continue
        text = text if special else text.replace(WORD_MARK, " ")
        tokens[token], scores[token] = text.encode("utf-8"), ADDED_SCORE
        types[token] = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    return tokens


def _type(gguf: Any, pieces: Any, token: int) -> Any:
    kinds = (
        (pieces.IsUnknown, gguf.TokenType.UNKNOWN),
        (pieces.IsControl, gguf.TokenType.CONTROL),
        (pieces.IsUnused, gguf.TokenType.UNUSED),
        (pieces.IsByte, gguf.TokenType.BYTE),
    )
    return next((kind for says, kind in kinds if says(token)), gguf.TokenType.NORMAL)
