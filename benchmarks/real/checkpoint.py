"""Put a language model with real weights into a Safe-VLM checkpoint: small vision tower and guard head, both random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.real.gguf_model import LanguageModel, read_gguf
from benchmarks.real.names import ABOUT, CALIBRATION, CHECKPOINT, HELD_OUT, LANGUAGE_MODEL
from benchmarks.real.packages import ENVIRONMENT, RealWeights, package_files, whole_file
from benchmarks.real.texts import answered_prompts, held_out_text
from benchmarks.tiny.blueprints import BLUEPRINTS
from safevlm.checkpoint.architectures import ARCHITECTURES
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.families import FAMILIES
from safevlm.checkpoint.family import HEAD_PREFIX, Family
from safevlm.checkpoint.guard_head import standard_classes
from safevlm.errors import InputError
from safevlm.files.draft import draft_of, publish
from safevlm.files.storage import storing
from safevlm.network.head import GuardHead

__all__ = ["put_into_checkpoint", "write_real_checkpoint"]

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def write_real_checkpoint(
    weights: RealWeights,
    folder: Path,
    *,
    environment: Path = ENVIRONMENT,
    layers: int | None = None,
    rows: int = 128,
    max_new_tokens: int = 256,
    seed: int = 0,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Write ``folder``, which must not exist, with the weights that ``environment`` has.

    ``checkpoint/`` is the Safe-VLM, ``language_model/`` the language model alone in transformers' layout,
    ``calibration.jsonl`` holds ``rows`` prompts with the model's own answers of at most ``max_new_tokens``,
    ``held_out.txt`` prose of another kind. ``layers`` cuts the language model; ``seed`` draws tower and head.

    Raises InputError when ``folder`` exists, a package is missing or there are not so many layers; CheckpointError
    for an altered file; MissingExtraError.
    """
    if folder.exists():
        raise InputError(f"{folder} already exists. Give --out a new folder, or remove this one.")
    files = package_files(weights, environment)
    family = FAMILIES[weights.family]
    report("reading the weights")
    with whole_file(weights, files) as path:
        language = read_gguf(path, dtype=DTYPES[family.half], layers=layers)
    with draft_of(folder) as draft, storing(folder, advice="give --out another place"):
        put_into_checkpoint(language, family, draft, renamed=weights.renamed, seed=seed)
        report("answering the prompts to calibrate on")
        answered = answered_prompts(
            open_checkpoint(draft / CHECKPOINT, tap="language_model"), rows, max_new_tokens=max_new_tokens
        )
        (draft / CALIBRATION).write_text(answered, encoding="utf-8")
        (draft / HELD_OUT).write_text(held_out_text(), encoding="utf-8")
        about = {"weights": weights.title, "packages": weights.packages, "sha256": weights.sha256, "note": weights.note}
        _write(draft / ABOUT, {**about, "layers": int(language.config.num_hidden_layers), "seed": seed})
        publish(draft, folder)


def put_into_checkpoint(
    language: LanguageModel, family: Family, folder: Path, *, renamed: Any = None, seed: int = 0
) -> None:
    """Write ``checkpoint/`` and ``language_model/`` below ``folder``, with the tokenizer in both.

    The tower and the processor are those of the family's tiny checkpoint; ``renamed`` gives special tokens the names
    that the family's prompt has.
    """
    whole, alone = folder / CHECKPOINT, folder / LANGUAGE_MODEL
    blueprint, architecture = BLUEPRINTS[family.tiny], ARCHITECTURES[family.key]
    text = {**language.config.to_dict(), "dtype": str(DTYPES[family.half]).removeprefix("torch.")}
    config: Any = architecture.config_class(
        text_config=text,
        vision_config=dict(blueprint.vision),
        tie_word_embeddings=bool(language.config.tie_word_embeddings),
        **blueprint.top,
    )
    for place in (whole, alone):
        place.mkdir(parents=True)
        _write_tokenizer(language, place, renamed or {})
    parts = _drawn_parts(architecture.whole_class, config, family, seed)
    inner = {
        name.replace("model.", family.language_prefix, 1) if name.startswith("model.") else name: value
        for name, value in language.tensors.items()
    }
    save_file({**parts, **inner}, whole / "model.safetensors", {"format": "pt"})
    save_file(dict(language.tensors), alone / "model.safetensors", {"format": "pt"})
    stated = json.loads(config.to_json_string(use_diff=False))
    guard = {"safety_categories": list(standard_classes())}
    _write(whole / "config.json", {**stated, "architectures": [architecture.whole_class.__name__], **guard})
    _write(whole / "preprocessor_config.json", blueprint.processor)
    _write(alone / "config.json", {**text, "architectures": [language.architecture]})


def _drawn_parts(whole_class: Any, config: Any, family: Family, seed: int) -> dict[str, Tensor]:
    """Return vision tower, projector and guard head as their classes draw them."""
    light = type(config).from_dict(config.to_dict())
    light.text_config.num_hidden_layers = 1
    if getattr(light.text_config, "layer_types", None):
        light.text_config.layer_types = light.text_config.layer_types[:1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = whole_class(light)
        width = int(config.text_config.hidden_size)
        head = GuardHead((width, width // 2, len(standard_classes())))
    found = {name: value for name, value in model.state_dict().items() if name.startswith(family.vision_prefixes)}
    found |= {f"{HEAD_PREFIX}{name}": value for name, value in head.state_dict().items()}
    return {name: value.to(DTYPES[family.half]).contiguous() for name, value in found.items()}


def _write_tokenizer(language: LanguageModel, folder: Path, renamed: Any) -> None:
    """Write the tokenizer's files, special tokens under the names that the prompt has."""
    language.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for path in folder.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        for old, new in renamed.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        path.write_text(text, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = language.tokenizer.convert_ids_to_tokens
    for kind in ("bos", "eos"):
        token = vocabulary(getattr(language.config, f"{kind}_token_id"))
        stated[f"{kind}_token"] = renamed.get(token, token)
    _write(path, {**stated, "clean_up_tokenization_spaces": False})


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, default=list) + "\n", encoding="utf-8")
