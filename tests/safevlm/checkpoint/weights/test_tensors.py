"""Headers that lie are refused, tensors are read one at a time, and hashes do not depend on layout or sharding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from safevlm.checkpoint.families import FAMILIES
from safevlm.checkpoint.weights.shard_header import MAX_HEADER_BYTES, read_header
from safevlm.checkpoint.weights.shards import Shards
from safevlm.checkpoint.weights.tensors import TensorStore
from safevlm.errors import CheckpointError
from tests.safevlm.checkpoint.folders import (
    CANONICAL,
    LAYOUTS,
    random_tensors,
    stored_name,
    three_shards,
    write_folder,
    write_json,
    write_safetensors,
)

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def store_of(folder: Path, family: str = "gemma3") -> TensorStore:
    return TensorStore(Shards.local(folder), FAMILIES[family].canonical)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sharded", [False, True])
def test_every_layout_gives_the_same_canonical_names_and_values(layout: str, sharded: bool, tmp_path: Path) -> None:
    family = LAYOUTS[layout][0]
    folder = write_folder(tmp_path, layout, shard_of=three_shards if sharded else None)
    store = store_of(folder, family)
    assert store.names() == tuple(sorted(CANONICAL[family]))
    stored = random_tensors(layout)
    for name, shape in CANONICAL[family].items():
        assert name in store
        assert store.stored_name(name) == stored_name(layout, name)
        assert store.shape(name) == shape
        assert store.dtype(name) == "F16"
        assert torch.equal(store.read(name), stored[stored_name(layout, name)])


def test_several_files_without_index_are_one_checkpoint(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, shard_of=three_shards)
    (folder / "model.safetensors.index.json").unlink()
    assert store_of(folder).names() == tuple(sorted(CANONICAL["gemma3"]))


def test_any_name_of_the_index_is_found(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, shard_of=three_shards)
    (folder / "model.safetensors.index.json").rename(folder / "model.fp16.safetensors.index.json")
    assert store_of(folder).names() == tuple(sorted(CANONICAL["gemma3"]))


def test_only_what_is_asked_for_counts_as_read(tmp_path: Path) -> None:
    store = store_of(write_folder(tmp_path, shard_of=three_shards))
    for name in store.names():
        store.shape(name), store.dtype(name)
    assert (store.read_names, store.bytes_read) == (frozenset(), 0)
    name = "img_safety_head.mlp.0.weight"
    store.read(name)
    assert (store.read_names, store.bytes_read) == (frozenset({name}), 2 * 4 * 8)
    store.sha256(["img_safety_head.mlp.0.bias"])
    assert store.bytes_read == 2 * 4 * 8 + 2 * 4
    assert store.read_names == {name, "img_safety_head.mlp.0.bias"}


def test_pieces_make_the_whole_and_cost_what_they_are(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    whole = store_of(folder)
    for name in whole.names():
        store = store_of(folder)
        expected, rows = whole.read(name), whole.shape(name)[0]
        assert torch.equal(torch.cat([*store.pieces(name, 3)]), expected)
        assert store.bytes_read == expected.nbytes and store.read_names == {name}
        assert torch.equal(store.read_rows(name, 1, rows), expected[1:])
        assert store.bytes_read == expected.nbytes + expected[1:].nbytes
        assert [len(piece) for piece in store.pieces(name)] == [rows], "small ones are one piece"


def test_the_hash_is_the_same_for_every_layout_and_changes_with_one_bit(tmp_path: Path) -> None:
    layouts = [layout for layout, (family, _) in LAYOUTS.items() if family == "llava"]
    stores = [store_of(write_folder(tmp_path / str(i), layout), "llava") for i, layout in enumerate(layouts)]
    stores.append(store_of(write_folder(tmp_path / "shards", layouts[0], shard_of=three_shards), "llava"))
    names = stores[0].names()
    first = stores[0].sha256(names)
    assert {store.sha256(reversed(names)) for store in stores} == {first}
    assert stores[0].sha256(names[1:]) != first
    tensors = random_tensors(layouts[0])
    tensors["img_safety_head.mlp.0.bias"].view(torch.int16)[0] ^= 1
    changed = store_of(write_folder(tmp_path / "changed", layouts[0], tensors=tensors), "llava")
    assert changed.sha256(names) != first


def test_an_unknown_tensor_keeps_its_name_and_a_wrong_name_gets_the_nearest(tmp_path: Path) -> None:
    tensors = {**random_tensors("new Gemma"), "something.new": torch.zeros(1)}
    store = store_of(write_folder(tmp_path, tensors=tensors))
    assert store.stored_name("something.new") == "something.new"
    with pytest.raises(
        CheckpointError, match=r"tensor 'img_safety_head.mlp.0.wieght' is missing.*nearest .*mlp.0.weight"
    ):
        store.read("img_safety_head.mlp.0.wieght")


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    tensors = {**random_tensors("new Gemma"), "x.img_safety_head.mlp.0.bias": torch.zeros(4)}
    with pytest.raises(CheckpointError, match=r"two names of the same tensor, 'img_safety_head.mlp.0.bias'"):
        store_of(write_folder(tmp_path, tensors=tensors))


def test_a_file_cut_after_opening_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    store = store_of(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"cannot be read.*Fetch the file again"):
        store.read("img_safety_head.mlp.3.weight")
    with pytest.raises(CheckpointError, match=r"cut short since it was opened"):
        store.sha256(store.names())


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{not json", b"", "header is not valid JSON"),
        (b"\xff\xfe{}", b"", "header is not valid JSON"),
        (b"[" * 100_000, b"", "header is not valid JSON"),
        (b'{"a":{},"a":{}}', b"", "the key 'a' appears twice"),
        ([], b"", "must be a JSON object, not list"),
        ({"t": 1}, b"", "'t': it must be an object with dtype, shape and data_offsets"),
        ({"t": {**ONE, "dtype": "F31"}}, bytes(8), "'t': dtype 'F31' is unknown; known are .*BF16"),
        ({"t": {**ONE, "dtype": ["F32"]}}, bytes(8), "'t': dtype .* is unknown"),
        ({"t": {**ONE, "shape": [-2]}}, bytes(8), r"'t': shape \[-2\] is not a list of at most 16 sizes"),
        ({"t": {**ONE, "shape": [True, 2]}}, bytes(8), "'t': shape .* is not a list of at most 16 sizes"),
        ({"t": {**ONE, "shape": [3]}}, bytes(8), r"'t': shape \[3\] of F32 takes 12 bytes, .* span 8"),
        ({"t": {**ONE, "data_offsets": [8, 0]}}, bytes(8), r"'t': data_offsets \[8, 0\] is not \[begin, end\]"),
        ({"t": {**ONE, "data_offsets": [0]}}, bytes(8), r"is not \[begin, end\]"),
        ({"t": ONE}, bytes(7), "truncated: tensor 't' ends at byte"),
        ({"t": {**ONE, "data_offsets": [4, 12]}}, bytes(12), "'t': it begins at byte .* leaves a gap"),
        ({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12), "'b': it begins at byte .* overlaps"),
        ({"t": ONE}, bytes(9), "1 bytes follow the last tensor"),
    ],
)
def test_a_header_that_lies_is_refused(header: Any, data: bytes, message: str, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "liar.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "Fetch this file again" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"1234567", "truncated: 7 bytes"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), "33,554,432 are allowed"),
        ((50).to_bytes(8, "little") + b"{}", "a header of 50 bytes is announced, 2 bytes follow"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer.*git lfs pull"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "no.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_every_cut_of_a_shard_is_noticed_when_the_folder_is_opened(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, shard_of=three_shards)
    path = folder / three_shards("img_safety_head")
    whole = path.read_bytes()
    for length in range(0, len(whole), 17):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"00003-of-00003.*truncated"):
            store_of(folder)
    path.write_bytes(whole)
    assert len(store_of(folder)) == len(CANONICAL["gemma3"])


@pytest.mark.parametrize("indexed", [True, False])
def test_a_missing_shard_is_named_with_a_tensor_of_it(indexed: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, shard_of=three_shards)
    shard = three_shards("img_safety_head")
    (folder / shard).unlink()
    message = rf"shard '{shard}' is missing.*'img_safety_head.mlp.0.bias'.*Fetch it again"
    if not indexed:
        (folder / "model.safetensors.index.json").unlink()
        message = rf"shard '{shard}' is missing.*says there are 3"
    with pytest.raises(CheckpointError, match=message):
        store_of(folder)


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/model.safetensors", "a/../../m.safetensors", "C:\\m.safetensors",
     "..\\m.safetensors", "C:m.safetensors", "./m.safetensors", "m.bin", 7, None],
)  # fmt: skip
def test_an_index_that_leaves_the_folder_is_refused(shard: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "inside", shard_of=three_shards)
    write_folder(tmp_path)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": shard}})
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is placed in .* inside the folder is allowed"):
        store_of(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_without_a_weight_map_is_refused(index: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, shard_of=three_shards)
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match="'weight_map' must be a non-empty object"):
        store_of(folder)


def edit_index(folder: Path, name: str, shard: str | None) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if shard is None:
        del index["weight_map"][name]
    else:
        index["weight_map"][name] = shard
    write_json(path, index)


def test_an_index_and_shards_that_disagree_are_refused(tmp_path: Path) -> None:
    head, vision = three_shards("img_safety_head"), three_shards("visual")
    folder = write_folder(tmp_path / "a", shard_of=three_shards)
    edit_index(folder, "ghost.weight", head)
    with pytest.raises(CheckpointError, match=rf"places tensor 'ghost.weight' in shard '{head}', which lacks it"):
        store_of(folder)
    folder = write_folder(tmp_path / "b", shard_of=three_shards)
    edit_index(folder, "img_safety_head.mlp.0.bias", vision)
    with pytest.raises(CheckpointError, match=r"'img_safety_head.mlp.0.bias'"):
        store_of(folder)
    folder = write_folder(tmp_path / "c", shard_of=three_shards)
    edit_index(folder, "img_safety_head.mlp.0.bias", None)
    with pytest.raises(CheckpointError, match=r"holds tensor 'img_safety_head.mlp.0.bias', which .* does not list"):
        store_of(folder)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_shards_is_refused(indexed: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, shard_of=three_shards)
    raw = random_tensors("new Gemma")
    twice = {name: value for name, value in raw.items() if "img_safety_head" in name or name.endswith(".norm.weight")}
    write_folder(tmp_path / "other", tensors=twice)
    (tmp_path / "other" / "model.safetensors").rename(folder / three_shards("img_safety_head"))
    if not indexed:
        (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"'model.language_model.norm.weight' is in two shards"):
        store_of(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_pickle_is_refused_with_the_reason_and_never_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(CheckpointError, match=rf"pickle only \({name}\).*can run any code.*save_file") as caught:
        store_of(tmp_path)
    assert "only .safetensors files are opened" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [("config.json", "no .safetensors file"), ("manifest.json", "guard bundle"), ("x.gguf", "no guard head")],
)
def test_a_folder_of_another_kind_is_told_apart(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        store_of(tmp_path)


def test_names_shapes_and_hashes_need_no_torch(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    code = (
        "import sys\nfrom pathlib import Path\nfrom safevlm.checkpoint.families import GEMMA3\n"
        "from safevlm.checkpoint.weights.shards import Shards\n"
        "from safevlm.checkpoint.weights.tensors import TensorStore\n"
        "store = TensorStore(Shards.local(Path(sys.argv[1])), GEMMA3.canonical)\n"
        "assert store.shape('img_safety_head.mlp.0.bias') == (4,)\nstore.sha256(store.names())\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
