"""Write what lies beside a checkpoint's weights as its readers ask for it: tokenizer, processor, generation, template.

The source's own files are kept and completed. What transformers and vLLM need and original checkpoints often lack:

- a token for the image in the tokenizer: original LLaVA has none (see :class:`ImageToken`);
- ``tokenizer.json``: from ``tokenizer.model`` alone they build another tokenizer;
- ``processor_config.json``, which says how many placeholders an image takes;
- ``preprocessor_config.json``, also where settings are the base model's, or LLaVA's padding stands in ``config.json``;
- ``generation_config.json``, which says what ends an answer;
- a chat template.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any

from safevlm.checkpoint.architectures import ARCHITECTURES
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.checkpoint.hub import LIGHT_PATTERNS
from safevlm.files.json_file import read_json_object
from safevlm.network.prompt_tokens import load_tokenizer, prompt_ids, single_id, stated_ends, stop_ids

__all__ = ["ImageToken", "copy_light_files", "image_token_of", "write_companions"]

log = logging.getLogger(__name__)

NOT_COPIED = ("config.json", "*.index.json", "quantize_config.json", "compression.json")
PROCESSOR, PREPROCESSOR, GENERATION = "processor_config.json", "preprocessor_config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@dataclass(frozen=True, kw_only=True)
class ImageToken:
    """The token that stands for an image's features in a prompt."""

    text: str
    id: int
    is_new: bool
    """Whether the tokenizer has it not yet; it is then the first id that no token has."""

    def rows(self, count: int) -> int:
        """Return how many rows an embedding of ``count`` needs: transformers looks every token up."""
        return max(count, self.id + 1)


def image_token_of(checkpoint: Checkpoint, tokenizer: Any) -> ImageToken:
    """Return the image token of a checkpoint's tokenizer, or the one to add."""
    text = checkpoint.family.chat.image_token
    found = single_id(tokenizer, text)
    if found is not None:
        return ImageToken(text=text, id=found, is_new=False)
    return ImageToken(text=text, id=max(tokenizer.get_vocab().values()) + 1, is_new=True)


def copy_light_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, processor, chat template and generation settings."""
    for path in sorted(source.iterdir()):
        light = any(fnmatch(path.name, pattern) for pattern in LIGHT_PATTERNS)
        if path.is_file() and light and not any(fnmatch(path.name, pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, folder / path.name)


def write_companions(checkpoint: Checkpoint, tokenizer: Any, token: ImageToken, folder: Path) -> None:
    """Copy the light files of a checkpoint into ``folder``, where its config.json is, and complete them.

    A prompt that the completed tokenizer splits otherwise is logged. Raises CheckpointError; OSError.
    """
    config = build_config(checkpoint)
    copy_light_files(checkpoint.folder, folder)
    if not (folder / TOKENIZER).is_file() and hasattr(tokenizer, "backend_tokenizer"):
        tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
    if token.is_new:
        _add(token, folder)
    _write_processor(checkpoint, config, folder)
    ends = stop_ids(tokenizer, checkpoint.family.prompt) | stated_ends(checkpoint.folder)
    _write_generation(config, sorted(ends), folder)
    stated = _read(folder / TOKENIZER_CONFIG)
    if not any((folder / name).is_file() for name in TEMPLATES) and not stated.get("chat_template"):
        template = resources.files("safevlm.checkpoint").joinpath("chat_templates", f"{checkpoint.family.key}.jinja")
        if template.is_file():
            (folder / TEMPLATES[0]).write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    before, after = (_prompt_of(checkpoint, each) for each in (tokenizer, load_tokenizer(folder)))
    if before != after:
        log.warning(
            "%s: with %s as a token, the tokenizer writes a prompt as %s, which was %s around the image. Readers of "
            "this layout see the former.",
            *(checkpoint.name, token.text, after, before),
        )


def _prompt_of(checkpoint: Checkpoint, tokenizer: Any) -> list[int]:
    return prompt_ids(tokenizer, checkpoint.family.prompt, "What is this?", 1)


def _add(token: ImageToken, folder: Path) -> None:
    """Add the token where tokenizers are read from; no other text is split otherwise."""
    entry = {"content": token.text, **ADDED}
    if (folder / TOKENIZER).is_file():
        whole = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))  # its library has read it
        _write(folder / TOKENIZER, {**whole, "added_tokens": [*whole["added_tokens"], {"id": token.id, **entry}]})
    stated = _read(folder / TOKENIZER_CONFIG)
    known = stated.get("added_tokens_decoder")
    if known is not None or not (folder / TOKENIZER).is_file():
        stated["added_tokens_decoder"] = {**(known or {}), str(token.id): entry}
        _write(folder / TOKENIZER_CONFIG, stated)


def _write_processor(checkpoint: Checkpoint, config: Any, folder: Path) -> None:
    """Write the image processor's settings as they are followed here, and how an image's placeholders are counted."""
    architecture = ARCHITECTURES[checkpoint.family.key]
    settings = {key: value for key, value in checkpoint.processor.items() if key != "image_aspect_ratio"}
    if checkpoint.processor.get("image_aspect_ratio") == "pad":
        settings |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}  # the class that pads
    _write(folder / PREPROCESSOR, {**settings, "processor_class": architecture.processor_class})
    stated = _read(folder / PROCESSOR)
    stated.pop("image_processor", None)
    counts = {"processor_class": architecture.processor_class, **architecture.placeholders(config)}
    _write(folder / PROCESSOR, {**stated, **counts})


def _write_generation(config: Any, ends: list[int], folder: Path) -> None:
    """Write what ends an answer; what the source says of sampling stays."""
    own = {key: getattr(config.text_config, key, None) for key in ("bos_token_id", "pad_token_id")}
    stated = _read(folder / GENERATION)
    known = {key: value for key, value in own.items() if value is not None and key not in stated}
    _write(folder / GENERATION, {**stated, **known, "eos_token_id": ends[0] if len(ends) == 1 else ends})


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path, needed_for="a checkpoint's settings") if path.is_file() else {}


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
