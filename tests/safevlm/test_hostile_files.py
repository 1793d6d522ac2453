"""Whatever a file says or is, its reader ends soon, with an object or with one line that can be shown."""

from __future__ import annotations

import json
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from safevlm.checkpoint.hub import find_model
from safevlm.checkpoint.weights.shard_header import MAX_HEADER_BYTES, read_header
from safevlm.checkpoint.weights.shards import Shards
from safevlm.contract.class_names import class_names_problem
from safevlm.contract.gguf_manifest import GgufManifest
from safevlm.contract.manifest import Manifest
from safevlm.errors import BundleError, CheckpointError, GuardHeadError, InputError, SafeVLMError
from safevlm.files.json_file import MAX_ITEMS, parse_json, read_json_object
from safevlm.files.regular_file import open_regular, open_to_append, read_regular
from safevlm.files.table_file import read_table
from safevlm.images.image import open_image
from safevlm.terminal.printable import is_plain, one_line, printable, shortened

WORLD = Path(__file__).parents[1] / "fixtures" / "world" / "hostile"
HEADERS = [line.split("\t") for line in (WORLD / "headers.txt").read_text().splitlines()]
NAMES = [json.loads(line) for line in (WORLD / "names.txt").read_text().splitlines()]
DATA = bytes(16)
GOOD = {
    "a": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
}
PROFILE = settings(deadline=None, derandomize=True, max_examples=150, database=None)


def shard(folder: Path, header: bytes, data: bytes = DATA, name: str = "model.safetensors") -> Path:
    path = folder / name
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def distilled_head(path: Path) -> object:
    from safevlm.network.distilled_head import DistilledHead

    return DistilledHead.read(path)


def gguf(path: Path) -> object:
    return GgufManifest.read(path.parent)


READERS: dict[str, Callable[[Path], object]] = {
    "manifest.json": Manifest.read,
    "gguf.json": gguf,
    "config.json": lambda path: read_json_object(path, needed_for="a test"),
    "policy.toml": lambda path: read_table(path, "policy"),
    "model.safetensors": read_header,
    "head.safetensors": distilled_head,
    "image.png": open_image,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "/dev/zero", "/dev/tty", "loop", "missing"])
def test_what_is_no_regular_file_is_refused_at_once(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # a socket's path may not be long
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
    elif kind == "folder" and name != "manifest.json":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind.startswith("/dev"):
        path.symlink_to(kind)
    with pytest.raises(InputError) as caught:
        READERS[name](path)
    assert is_plain(str(caught.value)) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("path", ["x" * 5_000, "a/" * 3_000, "nul\0", "\ud800"])
def test_a_path_that_cannot_be_one_is_refused(name: str, path: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        READERS[name](tmp_path / path / name)
    assert is_plain(str(caught.value))


def test_a_regular_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes; at most 4 are allowed"):
        read_regular(path, 4)
    with open_regular(path) as stream:
        assert not os.get_inheritable(stream.fileno())


def test_a_log_is_appended_to_and_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path: Path) -> None:
    for line in (b"one\n", b"two\n"):
        with open_to_append(tmp_path / "log") as stream:
            stream.write(line)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a FIFO that nobody reads"):
        open_to_append(tmp_path / "pipe")
    with open(tmp_path / "pipe", opener=lambda path, _: os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as reader:
        with open_to_append(tmp_path / "pipe") as stream:
            stream.write(b"line\n")
        assert reader.read() == "line\n"


@pytest.mark.parametrize(("header", "message"), HEADERS)
def test_a_hostile_header_is_refused(header: str, message: str, tmp_path: Path) -> None:
    path = shard(tmp_path, header.encode())
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert is_plain(str(caught.value))


@pytest.mark.parametrize(
    "header",
    [
        b'{"t":{"dtype":"F32","shape":[' + b"9" * 5_000 + b'],"data_offsets":[0,16]}}',
        b'{"t":{"dtype":"F32","shape":[' + b"9" * 99 + b'],"data_offsets":[0,16]}}',
        b'{"t":{"dtype":"F32","shape":[' + b",".join([b"4611686018427387904"] * 16) + b'],"data_offsets":[0,16]}}',
        b'{"t":' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"' + b"n" * 100_000 + b'":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b'{"a\\u001b[2J\\u202e\\n":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}}',
        b" " * 10_000_000 + b"{}",
        b"{" + b",".join(b'"%d":{}' % number for number in range(100_000)) + b"}",
        b"[" + b"{}," * (MAX_ITEMS + 1),
    ],
    ids=["digits", "99 digits", "product", "deep", "long name", "escapes", "blanks", "many", "items"],
)
def test_a_header_made_to_crash_or_fill_is_refused(header: bytes, tmp_path: Path) -> None:
    path = shard(tmp_path, header)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 40 * len(header) + 2**22
    finally:
        tracemalloc.stop()
    assert is_plain(str(caught.value)) and len(str(caught.value)) < 1_000


def test_a_header_that_is_announced_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(2**40)  # sparse
    with pytest.raises(CheckpointError, match="are allowed"):
        read_header(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A good header with a field replaced, a key doubled, bytes changed, or blanks added."""
    header = json.loads(json.dumps(GOOD))
    how = draw(st.sampled_from(["field", "number", "bytes", "double", "blanks", "none"]))
    if how == "field":
        part = draw(st.sampled_from([header, header["a"], header["b"]]))
        part[draw(st.sampled_from([*part, "__metadata__"]))] = draw(json_values)
    if how == "number":
        sizes = draw(st.sampled_from([header["a"]["shape"], header["b"]["data_offsets"]]))
        sizes[draw(st.integers(0, 1))] = draw(st.integers(-2, 20) | st.sampled_from([2**31, 2**63, 2**64]))
    text = json.dumps(header)
    if how == "double":
        text = text[:-1] + f', {draw(st.sampled_from(["", " "]))}"a": {json.dumps(draw(json_values))}}}'
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    if how == "bytes":
        for _ in range(draw(st.integers(1, 3))):
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    if how == "blanks":
        content = bytearray(
            draw(st.sampled_from([b" ", b"\n", b"\t", b"\xef\xbb\xbf", b""])) + content + b" " * draw(st.integers(0, 9))
        )
    return bytes(content)


@PROFILE
@given(header=headers(), data=st.sampled_from([DATA, DATA[:-1], DATA + b"\0", b""]))
def test_what_is_accepted_safetensors_accepts_and_reads_alike(
    header: bytes, data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = shard(tmp_path_factory.getbasetemp(), header, data, "mutated.safetensors")
    try:
        entries = read_header(path)
    except CheckpointError as error:
        assert is_plain(str(error))
        return
    with safe_open(path, framework="pt") as file:
        assert {name: list(entry.shape) for name, entry in entries.items()} == {
            name: file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118  # no mapping
        }


@PROFILE
@given(header=headers())
def test_what_safetensors_refuses_is_refused(header: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = shard(tmp_path_factory.getbasetemp(), header, name="refused.safetensors")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError:
        with pytest.raises(CheckpointError):
            read_header(path)


@PROFILE
@given(
    content=st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))
)
def test_json_is_an_object_or_a_line(content: bytes) -> None:
    try:
        value = parse_json(content)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    json.dumps(value, ensure_ascii=False).encode()


def test_a_key_that_appears_twice_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"num_attention_heads": 8, "num_attention_heads": 4}}')
    with pytest.raises(CheckpointError, match="the key 'num_attention_heads' appears twice"):
        read_json_object(tmp_path / "config.json", needed_for="a test")
    shard(tmp_path, b"{}", b"", "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"t": "a.safetensors", "t": "b.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match="the key 't' appears twice"):
        Shards.local(tmp_path)
    (tmp_path / "policy.json").write_text('{"confirm": true, "confirm": false}')
    with pytest.raises(InputError, match="the key 'confirm' appears twice"):
        read_table(tmp_path / "policy.json", "policy")


@pytest.mark.parametrize("name", NAMES)
def test_a_class_name_that_deceives_is_refused(name: str) -> None:
    assert class_names_problem(["safe", "weapon", name]) is not None


def test_honest_class_names_are_taken() -> None:
    assert class_names_problem(["safe", "financial_advice", "Waffen & Gewalt", "武器", "насилие", "हिंसा"]) is None
    assert class_names_problem(["safe"] * 2) and class_names_problem(["safe", "x" * 101])


@PROFILE
@given(text=st.text(st.characters(codec=None), max_size=40))
def test_what_is_shown_is_plain_and_errors_are(text: str) -> None:
    assert is_plain(one_line(text)) and one_line(one_line(text)) == one_line(text)
    assert all(map(is_plain, printable(text).split("\n")))
    assert is_plain(shortened(text, 5)) and len(shortened(text * 1_000, 5)) <= 6
    for kind in (SafeVLMError, BundleError, GuardHeadError):
        assert is_plain(str(kind(f"a name: {text}")))


@pytest.mark.parametrize("name", ["x" * 5_000, "\0", "~" + "x" * 300, "a/" * 3_000])
def test_a_model_that_cannot_be_named_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        find_model(name, None)
