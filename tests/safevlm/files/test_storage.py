"""Refusals to write are told: which place, why, what is free; everything else stays what it is."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from safevlm.errors import InputError, StorageError
from safevlm.files.storage import REASONS, check_room, locale_problem, shown_bytes, storage_problem, storing


def test_bytes_come_in_the_unit_that_tells() -> None:
    counts = (0, 1, 2048, 3 * 2**20, 5 * 2**30, 7 * 2**40)
    assert [shown_bytes(count) for count in counts] == ["0 KiB", "1 bytes", "2 KiB", "3.0 MiB", "5.0 GiB", "7.0 TiB"]


@pytest.mark.parametrize("number", REASONS)
def test_each_refusal_of_the_system_names_the_place(number: int, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, storing(tmp_path / "out", kept="All rows are kept."):
        raise OSError(number, os.strerror(number), str(tmp_path / "out" / "file"))
    said = str(caught.value)
    assert str(tmp_path / "out") in said and REASONS[number] in said and "All rows are kept. " in said
    assert ("free" in said) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_what_is_no_matter_of_a_place_stays_what_it_is(tmp_path: Path) -> None:
    for error in (
        KeyError("x"),
        OSError("no number"),
        ConnectionRefusedError(111, "refused"),
        PermissionError(1, "kill"),
    ):
        with pytest.raises(type(error)), storing(tmp_path):
            raise error
        assert storage_problem(error, [str(tmp_path)]) is None
    with pytest.raises(InputError, match="told already"), storing(tmp_path):
        raise InputError("told already")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_graph(path: Path) -> None:
    weights = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, (10_000,), bytes(40_000), raw=True)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [weights])), path)


@pytest.mark.parametrize(
    "save",
    [
        lambda path: save_file({"a": torch.zeros(10_000)}, path),
        lambda path: torch.save(torch.zeros(10_000), path),
        lambda path: np.zeros(10_000).tofile(path),
        save_graph,
        lambda path: Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99), np.uint8)).save(path, "PNG"),
    ],
    ids=["safetensors", "torch", "numpy", "onnx", "Pillow"],
)
def test_libraries_words_for_what_cannot_be_written_are_known(save: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"file would be larger|disk is full"), storing(tmp_path):  # noqa: SIM117
        with files_of_at_most(2000):
            save(tmp_path / "file")


def test_a_full_device_and_a_full_database_are_known(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="disk is full"), storing(tmp_path):
        Path("/dev/full").write_bytes(b"x")
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute("PRAGMA max_page_count = 2")
        database.execute("CREATE TABLE t (x)")
        with pytest.raises(StorageError, match="disk is full"), storing(tmp_path):
            database.execute("INSERT INTO t VALUES (zeroblob(100000))")


def test_room_is_asked_for_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room(tmp_path / "not" / "yet", 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 9, 3 * 2**20))
    with pytest.raises(
        StorageError, match=r"out: about 7\.0 GiB are needed, but the file system / has only 3\.0 MiB free"
    ):
        check_room(tmp_path / "out", 7 * 2**30)


def test_the_full_one_among_a_commands_places_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()

    def usage(folder: Path) -> object:
        free = 0 if Path(folder).is_relative_to(small) else 2**40
        return shutil._ntuple_diskusage(2**40, 0, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    arguments = ["--model", "m", "--labels", str(tmp_path), f"--out={small / 'run'}"]
    for error in (OSError(errno.ENOSPC, "No space left"), RuntimeError("the writer failed")):
        told = storage_problem(error, arguments)
        assert told is not None and told.startswith(f"{small / 'run'}: the disk is full")
    monkeypatch.setenv("TMPDIR", str(small))
    told = storage_problem(OSError(errno.ENOSPC, "No space left"), ["--out", str(tmp_path)])
    assert told is not None and told.startswith(f"{small}: the disk is full") and "set TMPDIR" in told


def test_letters_are_told_only_where_names_hold_them() -> None:
    error = UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed")
    assert "not valid UTF-8" in str(locale_problem(error, ["b\udcff"]))
    assert locale_problem(error, ["plain"]) is None and locale_problem(KeyError("x"), ["b\udcff"]) is None
