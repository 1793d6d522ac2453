"""Find the tokenizer's file that a library refuses, and say what would read it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from safevlm.checkpoint.weights.shard_header import GIT_LFS_MARK
from safevlm.errors import CheckpointError
from safevlm.files.json_file import read_json_object

__all__ = ["refused_tokenizer"]

JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COPY = "copy the tokenizer's files from the base model"


def refused_tokenizer(folder: Path, error: BaseException) -> CheckpointError:
    """Return the error to raise for a folder whose tokenizer transformers refused with ``error``.

    Raises CheckpointError at once for a file that is not JSON or has a byte-order mark.
    """
    for name in (*JSON_FILES, "tokenizer.json", "tokenizer.model"):
        path = folder / name
        if path.is_file() and path.read_bytes().startswith(GIT_LFS_MARK):
            return CheckpointError(f"{path}: a Git LFS pointer, not the file itself. Run `git lfs pull` in the folder.")
        if path.is_file() and name in JSON_FILES:
            read_json_object(path, needed_for="the tokenizer's settings")
            if path.read_bytes().startswith(BYTE_ORDER_MARK):
                return CheckpointError(
                    f"{path}: begins with a byte-order mark, which transformers does not read. Save it as UTF-8 "
                    "without one."
                )
    return _refused_vocabulary(folder) or CheckpointError(
        f"{folder}: no tokenizer can be read from this folder ({_one_line(error)}). It needs tokenizer.json or "
        "tokenizer.model, and a tokenizer_config.json with a tokenizer_class of transformers. Copy them from the "
        "base model if they are missing."
    )


def _refused_vocabulary(folder: Path) -> CheckpointError | None:
    """Try the file that holds the vocabulary by its own library."""
    fast, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if fast.is_file():
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(fast))
        except Exception as error:  # tokenizers raises Exception itself
            return CheckpointError(
                f"{fast}: the installed tokenizers {version('tokenizers')} cannot read it ({_one_line(error)}). It is "
                f"damaged, or from a newer version{_saved_by(folder)}: run `pip install --upgrade tokenizers "
                f"transformers`, or {COPY}."
            )
    elif pieces.is_file():
        import sentencepiece

        try:
            readable = pieces.stat().st_size > 0 and sentencepiece.SentencePieceProcessor(model_file=str(pieces))
        except (OSError, RuntimeError):
            readable = None
        if not readable:
            return CheckpointError(
                f"{pieces}: not a SentencePiece model ({pieces.stat().st_size:,} bytes), or cut short. Fetch it again, "
                f"or {COPY}."
            )
    return None


def _saved_by(folder: Path) -> str:
    """Return which transformers wrote the checkpoint, as far as it says."""
    saved = read_json_object(folder / "config.json", needed_for="a checkpoint's configuration")
    by = saved.get("transformers_version")
    if not isinstance(by, str):
        return ""
    return f" (config.json was saved by transformers {by[:20]!r}, {version('transformers')} is installed)"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
