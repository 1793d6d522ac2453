"""Tokenizers that cannot be read or do not fit are refused by file; every stated end ends an answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.families import FAMILIES
from safevlm.errors import CheckpointError, InputError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.prompt_tokens import check_tokenizer, load_tokenizer, stated_ends

WORLD = Path(__file__).parents[2] / "fixtures" / "world" / "checkpoints"


def copied(tmp_path: Path, name: str = "tiny-safellava", *, weights: bool = False) -> Path:
    folder = tmp_path / name
    shutil.copytree(open_checkpoint(name).folder, folder, ignore=lambda *_: [] if weights else ["model.safetensors"])
    return folder


def edited(file: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return edit


def without_fast(content: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(content)

    return edit


NEWER = rf"tokenizer.json: the installed tokenizers {version('tokenizers')} cannot .*pip install --upgrade"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.copy(WORLD / "tokenizer_newer.json", folder / "tokenizer.json"), NEWER),
        (edited("tokenizer.json", lambda raw: raw["model"].update(type="Newer")), NEWER),
        (edited("tokenizer.json", lambda raw: raw.update(normalizer={"type": "Newer"})), NEWER),
        (edited("tokenizer.json", lambda raw: raw["model"].update(merges=["qq zz"])), NEWER),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"[]"), NEWER),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"), NEWER),
        (
            lambda folder: (folder / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            r"tokenizer.json: a Git LFS pointer",
        ),
        (without_fast(b"junk" * 99), r"tokenizer.model: not a SentencePiece model \(396 bytes\)"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_bytes(b"null"),
            r"tokenizer_config.json: .* must be a JSON object",
        ),
        (lambda folder: (folder / "tokenizer_config.json").write_bytes(b"\xef\xbb\xbf{}"), "byte-order mark"),
        (
            lambda folder: (folder / "special_tokens_map.json").write_bytes(b"[1]"),
            r"special_tokens_map.json: .* must be a JSON object",
        ),
        (edited("tokenizer_config.json", lambda raw: raw.update(model_max_length="many")), "no tokenizer can be read"),
        (edited("tokenizer_config.json", lambda raw: raw.update(tokenizer_class=5)), "no tokenizer can be read"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_by_file(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = copied(tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


def test_the_version_that_wrote_a_newer_file_is_reported(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    edited("config.json", lambda raw: raw.update(transformers_version="9.1.0"))(folder)
    shutil.copy(WORLD / "tokenizer_newer.json", folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match=rf"by transformers '9.1.0', {version('transformers')} is installed"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tiny-safellava", "tiny-safeqwen", "tiny-safegem"])
def test_the_shipped_tokenizers_fit(name: str) -> None:
    checkpoint = open_checkpoint(name)
    rows = checkpoint.tensors.shape("model.language_model.embed_tokens.weight")[0]
    check_tokenizer(load_tokenizer(checkpoint.folder), checkpoint.folder, checkpoint.family.prompt, rows)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(CheckpointError, match=r"no token '<\|im_start\|>', which this family's prompt contains"):
        check_tokenizer(tokenizer, folder, FAMILIES["qwen2_5_vl"].prompt, 896)
    with pytest.raises(CheckpointError, match=r"has token 895, but the embedding has only 500 rows"):
        check_tokenizer(tokenizer, folder, FAMILIES["llava"].prompt, 500)
    without_fast(b"")(folder)
    with pytest.raises(CheckpointError, match=r"lacks most of the prompt|not a SentencePiece model"):
        check_tokenizer(load_tokenizer(folder), folder, FAMILIES["llava"].prompt, 896)


def test_an_added_token_without_a_row_is_refused_where_a_question_holds_it(tmp_path: Path) -> None:
    folder = copied(tmp_path, weights=True)
    token = {"id": 896, "content": "<pad2>", "special": True, "normalized": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    edited("tokenizer.json", lambda raw: raw["added_tokens"].append(token))(folder)
    vlm = load_safe_vlm(open_checkpoint(folder))
    assert vlm.embed_text(["Why?"]).inputs_embeds.shape[0] == 1
    with pytest.raises(InputError, match=r"token 896 \('<pad2>'\), for which the embedding has no row"):
        vlm.embed_text(["Why <pad2>?"])


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 2}, {5, 7}),
        ({"eos_token_id": 5}, {}, {5}),
        ({"do_sample": True}, {"eos_token_id": 2}, set()),
        (None, {"eos_token_id": [2, 3]}, {2, 3}),
        (None, {"eos_token_id": None, "text_config": {"eos_token_id": 9}}, {9}),
        (None, {}, set()),
    ],
)
def test_ends_are_read_where_transformers_reads_them(
    generation: dict[str, Any] | None, config: dict[str, Any], ends: set[int], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stated_ends(tmp_path) == ends


@pytest.mark.parametrize("value", ["2", [1, "2"], True, {"a": 1}, 1.5])
def test_an_end_that_is_no_number_is_refused(value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        CheckpointError, match=r"generation_config.json: eos_token_id is .* a list of token ids is allowed"
    ):
        stated_ends(tmp_path)


def test_every_stated_end_ends_an_answer(tmp_path: Path) -> None:
    folder = copied(tmp_path, weights=True)
    whole = load_safe_vlm(open_checkpoint(folder))
    written = whole.generate(whole.embed_text(["What is drawn?"]))[0]
    assert len(written) > 2
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, written[1]]}))
    vlm = load_safe_vlm(open_checkpoint(folder))
    cut = vlm.generate(vlm.embed_text(["What is drawn?"]))[0]
    assert cut == written[: written.index(written[1])]
