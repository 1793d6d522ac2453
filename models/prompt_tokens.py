"""Turn one question about one image into token ids, with a placeholder where the image's features go.

Works with tokenizers that have no image token (original LLaVA: 32,000 words, none of them ``<image>``), so
no embedding has to grow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig

from models.errors import CheckpointError, InputError
from models.family import PromptFormat
from models.json_file import read_json_object
from models.regular_file import require_regular

__all__ = ["IMAGE", "answer_ids", "load_tokenizer", "prompt_ids", "stop_ids", "text_ids"]

IMAGE = -200
"""Stands for one image feature among token ids; the number that LLaVA's own code uses."""


def load_tokenizer(folder: Path) -> Any:
    """Return the checkpoint's tokenizer through ``AutoTokenizer``, from its folder, running none of its code.

    Errors: CheckpointError when the files are missing or not a tokenizer that transformers knows.
    """
    try:
        for path in sorted(folder.iterdir()):  # transformers opens what it likes of them, and would wait for a FIFO
            if not path.is_dir():
                require_regular(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}). Remove it.") from error
    stated = read_json_object(folder / "config.json", needed_for="a checkpoint's configuration")
    known = stated.get("model_type") in CONFIG_MAPPING and (folder / "tokenizer.json").is_file()
    # Without tokenizer.json, transformers 5 reads a LLaVA's tokenizer.model by a general class that loses the
    # mark before the first word. An empty config leaves the choice to tokenizer_config.json.
    config = None if known else PreTrainedConfig()
    try:
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{folder}: no tokenizer can be read from this folder ({error}). Needed is tokenizer.json or "
            "tokenizer.model with a tokenizer_config.json whose tokenizer_class transformers has; copy them "
            "from the base model if the checkpoint lacks them."
        ) from error


def prompt_ids(tokenizer: Any, prompt: PromptFormat, question: str, image_tokens: int) -> list[int]:
    """Return the ids of one user turn, ``IMAGE`` standing ``image_tokens`` times at the image's place.

    Where the tokenizer has the image token, the text is tokenised whole, as the family's processor does it.
    Else it is tokenised in two pieces around the image, as LLaVA's own ``tokenizer_image_token`` does.

    Errors: InputError when the question itself contains the image token.
    """
    if prompt.image_token in question:
        raise InputError(
            f"the question contains {prompt.image_token!r}, which stands for the image: {question[:80]!r}. "
            "Exactly one image is asked about; leave the token out."
        )
    after = prompt.after_image + question + prompt.after_question
    placeholder = _single_id(tokenizer, prompt.image_token)
    if placeholder is None:
        before_ids, after_ids = _encode(tokenizer, prompt.before_image), _encode(tokenizer, after)
    else:
        ids = _encode(tokenizer, prompt.before_image + prompt.image_token + after)
        at = ids.index(placeholder)
        before_ids, after_ids = ids[:at], ids[at + 1 :]
    return [*before_ids, *[IMAGE] * image_tokens, *after_ids]


def text_ids(tokenizer: Any, prompt: PromptFormat, question: str) -> list[int]:
    """Return the ids of one user turn without an image."""
    return _encode(tokenizer, prompt.before_text + question + prompt.after_question)


def answer_ids(tokenizer: Any, prompt: PromptFormat, answer: str) -> list[int]:
    """Return the ids of an answer, the end of its turn included."""
    return _encode(tokenizer, answer + prompt.end_of_turn)


def stop_ids(tokenizer: Any, prompt: PromptFormat) -> frozenset[int]:
    """Return the ids that end an answer: the family's end of turn and the tokenizer's end of sequence."""
    found = {_single_id(tokenizer, prompt.end_of_turn), tokenizer.eos_token_id}
    return frozenset(found - {None})


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Tokenise text in which special tokens stand by name.

    A leading beginning-of-sequence token is set as an id: some SentencePiece tokenizers put their word mark
    before the first word only if nothing stands before it.
    """
    bos = tokenizer.bos_token
    if bos and text.startswith(bos):
        return [tokenizer.bos_token_id, *_encode(tokenizer, text.removeprefix(bos))]
    return cast("list[int]", tokenizer.encode(text, add_special_tokens=False))


def _single_id(tokenizer: Any, token: str) -> int | None:
    """Return the id of a token that the vocabulary holds whole, else ``None``."""
    found = tokenizer.convert_tokens_to_ids(token)
    known = isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == token
    return found if known else None
