"""A draft becomes its folder in one step; drafts of the dead go, drafts of the living stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import safevlm.files.draft
from safevlm.errors import InputError, StorageError
from safevlm.files.draft import draft_of, publish, remove_abandoned


def put(out: Path, text: str, *, replace: bool = False) -> None:
    with draft_of(out) as draft:
        (draft / "file").write_text(text, encoding="utf-8")
        publish(draft, out, replace=replace)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_only_where_that_is_asked_for(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(safevlm.files.draft, "_exchange", lambda *_: False)
    out = tmp_path / "deep" / "out [1]*"
    put(out, "one")
    with pytest.raises(InputError, match="was created by something else meanwhile"):
        put(out, "two")
    put(out, "three", replace=True)
    assert (out / "file").read_text(encoding="utf-8") == "three"
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_link_is_kept_and_its_target_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere/out")
    put(tmp_path / "link", "one")
    put(tmp_path / "link", "two", replace=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "out" / "file").read_text(encoding="utf-8") == "two"


def test_places_that_cannot_be_had_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, word in (
        (Path("/proc"), "mount point"),
        (tmp_path / "file" / "out", "a file of that name exists"),
        (tmp_path / ("x" * 250), "too long"),
    ):
        with pytest.raises(StorageError, match=word):
            put(out, "one")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_abandoned_drafts_go_and_what_was_moved_aside_comes_back(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f".out.partial-{ended.pid}-abc", f".out.partial-{ended.pid}-abc.replaced", ".out.partial-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name, encoding="utf-8")
    with draft_of(tmp_path / "out") as living:
        remove_abandoned(tmp_path / "out")
        assert living.exists()
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"out", living.name, ".out.partial-x"}
    assert (tmp_path / "out" / "file").read_text(encoding="utf-8").endswith(".replaced")


def test_a_container_with_the_same_process_number_is_no_hindrance(tmp_path: Path) -> None:
    """In containers a command is process 1 each time: what the last one left does not stop the next."""
    left = tmp_path / f".out.partial-{os.getpid()}"
    left.mkdir()
    put(tmp_path / "out", "one")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
