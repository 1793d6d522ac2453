"""A guard head in a file of its own is read with the rest, and nothing else is believed to lie there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.weights.shards import GUARD_FILE
from safevlm.errors import CheckpointError, GuardHeadError
from tests.safevlm.checkpoint.folders import random_tensors, three_shards, write_folder


def apart(folder: Path, *, sharded: bool = False) -> Path:
    """Write a checkpoint whose head lies in the guard's file."""
    tensors = random_tensors("new Gemma")
    head = {name: tensor for name, tensor in tensors.items() if "img_safety_head" in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in head}
    write_folder(folder, tensors=rest, shard_of=three_shards if sharded else None)
    (folder / GUARD_FILE).parent.mkdir()
    save_file(head, folder / GUARD_FILE)
    return folder


@pytest.mark.parametrize("sharded", [False, True])
def test_both_places_hold_the_same_checkpoint(sharded: bool, tmp_path: Path) -> None:
    inside = open_checkpoint(write_folder(tmp_path / "inside"))
    beside = open_checkpoint(apart(tmp_path / "beside", sharded=sharded))
    assert beside.head == inside.head and beside.tensors.names() == inside.tensors.names()
    assert not beside.ignored.files and not beside.ignored.tensors
    for name in inside.head_names():
        assert torch.equal(beside.tensors.read(name), inside.tensors.read(name))
    names = inside.tensors.names()
    assert beside.tensors.sha256(names) == inside.tensors.sha256(names), "a guard's hash does not tell where it lies"


def test_an_index_may_name_the_guard_s_file(tmp_path: Path) -> None:
    head = GUARD_FILE
    folder = tmp_path / "out"
    (folder / GUARD_FILE).parent.mkdir(parents=True)
    write_folder(folder, shard_of=lambda name: head if "img_safety_head" in name else three_shards(name))
    assert open_checkpoint(folder).head == open_checkpoint(write_folder(tmp_path / "inside")).head


def test_a_head_in_both_places_is_refused(tmp_path: Path) -> None:
    folder = apart(tmp_path)
    write_folder(folder)
    with pytest.raises(CheckpointError, match=r"in two shards, .*guard/head\.safetensors"):
        open_checkpoint(folder)


def test_a_part_of_the_model_in_the_guard_s_file_is_refused(tmp_path: Path) -> None:
    """No other reader would see it: what is judged here would not be what they run."""
    folder = apart(tmp_path)
    more = {"model.language_model.layers.0.self_attn.k_proj.weight": torch.zeros(8, 8)}
    save_file({**load_file(folder / GUARD_FILE), **more}, folder / GUARD_FILE)
    with pytest.raises(CheckpointError, match=r"holds tensor 'model\.language_model.*only 'img_safety_head\.mlp"):
        open_checkpoint(folder)


def test_a_folder_copied_without_the_guard_says_which_file_is_missing(tmp_path: Path) -> None:
    folder = apart(tmp_path)
    (folder / GUARD_FILE).unlink()
    with pytest.raises(GuardHeadError, match=r"needs its 'guard/head\.safetensors'"):
        open_checkpoint(folder)
