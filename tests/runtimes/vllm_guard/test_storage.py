"""A verdict is read once, by the request that it is of; anything else is an error."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from runtimes.vllm_guard.storage import Storage, StoredError
from safevlm.errors import StorageError


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "verdicts")


def test_what_is_written_is_read_once(storage: Storage) -> None:
    storage.write("r", "0a", {"images": [[1.0, 0.0]]})
    assert storage.take("r", "0a")["images"] == [[1.0, 0.0]]
    assert list(storage.folder.iterdir()) == []
    with pytest.raises(StoredError, match="wrote no verdict"):
        storage.take("r", "0a")


def test_names_of_requests_are_no_paths(storage: Storage) -> None:
    storage.write("../../x", "0a", {})
    assert [path.name for path in storage.folder.iterdir()] == ["0a.json"]


@pytest.mark.parametrize("changed", [{"request": "other"}, {"nonce": "0b"}, {"request": None}])
def test_a_verdict_of_another_request_is_an_error_and_removed(storage: Storage, changed: dict[str, str]) -> None:
    storage.write("r", "0a", {"images": []})
    path = storage.folder / "0a.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(StoredError, match="not of this request"):
        storage.take("r", "0a")
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"request": "r"'])
def test_half_a_file_is_an_error(storage: Storage, content: str) -> None:
    (storage.folder / "0a.json").write_text(content)
    with pytest.raises(StoredError):
        storage.take("r", "0a")


def test_a_full_folder_holds_nothing_half(storage: Storage) -> None:
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, kept[1]))
    try:
        with pytest.raises(OSError):
            storage.write("r", "0a", {"images": [[0.5] * 20]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert list(storage.folder.iterdir()) == []


def test_a_folder_that_vanished_is_an_error(storage: Storage) -> None:
    storage.close()
    assert not storage.folder.exists()
    with pytest.raises(OSError):
        storage.write("r", "0a", {})
    with pytest.raises(StoredError):
        storage.take("r", "0a")
    storage.remove("0a")


def test_a_place_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/verdicts")):
        with pytest.raises(StorageError, match="cannot hold verdicts"):
            Storage.open(place)


def test_a_place_that_others_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(StorageError, match="others may write"):
        Storage.open(tmp_path / "open")
