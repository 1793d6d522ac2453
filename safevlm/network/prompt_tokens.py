"""Turn a question or a dialogue about one image into token ids, with a placeholder where the image's features go.

Works with tokenizers that have no image token (original LLaVA: 32,000 words, none of them ``<image>``), so
no embedding has to grow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig

from safevlm.checkpoint.family import PromptFormat
from safevlm.checkpoint.tokenizer_files import refused_tokenizer
from safevlm.errors import CheckpointError, InputError, QuestionError
from safevlm.files.json_file import read_json_object
from safevlm.files.regular_file import require_regular
from safevlm.network.dialogue import Around, ChatFormat, Turn

__all__ = [
    "IMAGE",
    "answer_ids",
    "check_ids",
    "check_tokenizer",
    "dialogue_ids",
    "fitting_tokenizer",
    "load_tokenizer",
    "prompt_ids",
    "single_id",
    "stated_ends",
    "stop_ids",
    "text_dialogue_ids",
    "text_ids",
]

SPECIAL_TOKEN = re.compile(r"<[^<>\s]+>")

IMAGE = -200
"""Stands for one image feature among token ids; the number that LLaVA's own code uses."""


def load_tokenizer(folder: Path) -> Any:
    """Return the checkpoint's tokenizer through ``AutoTokenizer``, from its folder, running none of its code.

    Raises CheckpointError, naming the file, when one is missing, damaged or not one that the installed libraries know.
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
        found = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, local_files_only=True)
        found.encode("a", add_special_tokens=False)  # some settings are read no sooner
        return found
    except Exception as error:  # tokenizers raises Exception itself
        raise refused_tokenizer(folder, error) from error


def fitting_tokenizer(folder: Path, prompt: PromptFormat, rows: int) -> Any:
    """Return the checkpoint's tokenizer once it is known to fit; see :func:`check_tokenizer`."""
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, folder, prompt, rows)
    return tokenizer


def check_ids(tokenizer: Any, sequences: Sequence[Sequence[int]], rows: int) -> None:
    """Raise InputError when a prompt holds a token that an embedding of ``rows`` rows has none for."""
    beyond = max(map(max, sequences))
    if beyond >= rows:
        raise InputError(
            f"a prompt holds token {beyond} ({str(tokenizer.convert_ids_to_tokens(beyond))!r}), for which the "
            "embedding has no row. Leave it out of the question."
        )


def check_tokenizer(tokenizer: Any, folder: Path, prompt: PromptFormat, rows: int) -> None:
    """Refuse a tokenizer that cannot write the family's prompt, or has words beyond an embedding of ``rows`` rows.

    Raises CheckpointError for a special token of the prompt that it would split, text that it would lose, and a word
    without a row. Tokens added above the rows (LLaVA's ``<image>``) are allowed as long as no prompt holds them.
    """
    text = "".join([prompt.before_image, prompt.after_image, prompt.after_question, prompt.end_of_turn])
    advice = "Copy the tokenizer's files from the base model that the checkpoint was trained from."
    split = [token for token in SPECIAL_TOKEN.findall(text) if single_id(tokenizer, token) is None]
    if split:
        raise CheckpointError(
            f"{folder}: the tokenizer has no token {split[0]!r}, which this family's prompt contains. {advice}"
        )
    kept = tokenizer.decode(_encode(tokenizer, text), skip_special_tokens=False).replace(
        tokenizer.unk_token or "\0", ""
    )
    if 2 * len("".join(kept.split())) < len("".join(text.split())):
        raise CheckpointError(
            f"{folder}: the tokenizer's vocabulary lacks most of the prompt: {text[:60]!r}… becomes {kept[:60]!r}. "
            f"{advice}"
        )
    added = set(tokenizer.added_tokens_decoder)
    beyond = max((token for token in tokenizer.get_vocab().values() if token not in added), default=0)
    if beyond >= rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has token {beyond}, but the embedding has only {rows} rows. They belong to "
            f"different models. {advice}"
        )


def stated_ends(folder: Path) -> frozenset[int]:
    """Return the ids that end an answer by ``generation_config.json``, or by ``config.json`` where there is none.

    Raises CheckpointError for an ``eos_token_id`` that is no whole number or list of them.
    """
    path = folder / "generation_config.json"
    config = read_json_object(folder / "config.json", needed_for="a checkpoint's configuration")
    stated = read_json_object(path, needed_for="generation settings") if path.is_file() else config
    value = stated.get("eos_token_id")
    text = config.get("text_config")
    if value is None and stated is config and isinstance(text, dict):
        value = text.get("eos_token_id")
    ends = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ends):
        name = "config.json" if stated is config else path.name
        raise CheckpointError(
            f"{folder / name}: eos_token_id is {value!r}; a token id or a list of token ids is allowed. Fetch the "
            "file again."
        )
    return frozenset(ends)


def prompt_ids(tokenizer: Any, prompt: PromptFormat, question: str, image_tokens: int) -> list[int]:
    """Return the ids of one user turn, ``IMAGE`` standing ``image_tokens`` times at the image's place.

    Raises InputError when the question itself contains the image token.
    """
    if prompt.image_token in question:
        raise QuestionError(
            f"the question contains {prompt.image_token!r}, which stands for the image: {question[:80]!r}. Leave it "
            "out; each question is about exactly one image."
        )
    around = Around(prompt.before_image, prompt.after_image + question + prompt.after_question)
    return _around_ids(tokenizer, prompt.image_token, around, image_tokens)


def dialogue_ids(tokenizer: Any, chat: ChatFormat, turns: Sequence[Turn], image_tokens: int) -> list[int]:
    """Return the ids of a dialogue in the same way. Raises QuestionError, see :meth:`ChatFormat.check`."""
    return _around_ids(tokenizer, chat.image_token, chat.around(turns), image_tokens)


def _around_ids(tokenizer: Any, image_token: str, around: Around, image_tokens: int) -> list[int]:
    """Where the tokenizer has the image token, tokenise the text whole, as the family's processor does it.

    Else it is tokenised in two pieces around the image, as LLaVA's own ``tokenizer_image_token`` does.
    """
    placeholder = single_id(tokenizer, image_token)
    if placeholder is None:
        before_ids, after_ids = _encode(tokenizer, around.before), _encode(tokenizer, around.after)
    else:
        ids = _encode(tokenizer, around.before + image_token + around.after)
        at = ids.index(placeholder)
        before_ids, after_ids = ids[:at], ids[at + 1 :]
    return [*before_ids, *[IMAGE] * image_tokens, *after_ids]


def text_ids(tokenizer: Any, prompt: PromptFormat, question: str) -> list[int]:
    """Return the ids of one user turn without an image."""
    return _encode(tokenizer, prompt.before_text + question + prompt.after_question)


def text_dialogue_ids(tokenizer: Any, chat: ChatFormat, turns: Sequence[Turn]) -> list[int]:
    """Return the ids of a dialogue without an image. Raises QuestionError, see :meth:`ChatFormat.text`."""
    return _encode(tokenizer, chat.text(turns))


def answer_ids(tokenizer: Any, prompt: PromptFormat, answer: str) -> list[int]:
    """Return the ids of an answer, the end of its turn included."""
    return _encode(tokenizer, answer + prompt.end_of_turn)


def stop_ids(tokenizer: Any, prompt: PromptFormat) -> frozenset[int]:
    """Return the ids that end an answer: the family's end of turn and the tokenizer's end of sequence."""
    found = {single_id(tokenizer, prompt.end_of_turn), tokenizer.eos_token_id}
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


def single_id(tokenizer: Any, token: str) -> int | None:
    """Return the id of a token that the vocabulary holds whole, else ``None``."""
    found = tokenizer.convert_tokens_to_ids(token)
    known = isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == token
    return found if known else None
