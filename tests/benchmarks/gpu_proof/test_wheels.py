"""Wheels in loads: no load is larger than it may be, and what is joined is what was split."""

from __future__ import annotations

import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu_proof import wheels
from benchmarks.gpu_proof.wheels import INDEX_BYTES, download, install, prepare, split
from safevlm.errors import InputError

SLOW = settings(deadline=None, derandomize=True, max_examples=12)


def write_wheel(folder: Path, name: str, content: str) -> Path:
    """Write a wheel of one module that pip installs on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD")))
    return path


@SLOW
@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=6), room=st.integers(1, 300))
def test_loads_are_small_enough_and_give_the_wheels_again(sizes: list[int], room: int) -> None:
    with TemporaryDirectory() as place:
        source, folder = Path(place, "source"), Path(place, "loads")
        source.mkdir()
        paths = []
        for number, size in enumerate(sizes):
            paths.append(source / f"w{number}.whl")
            paths[-1].write_bytes(bytes((number * 7 + at) % 251 for at in range(size)))
        found = split(paths, folder, room + INDEX_BYTES)
        for load in folder.iterdir():
            assert sum(path.stat().st_size for path in load.iterdir() if path.name != "wheels.json") <= room
        there = {path.name: path for path in folder.rglob("*") if path.is_file()}
        for wheel, path in zip(found, paths, strict=True):
            pieces = [there[piece.name] for piece in wheel.pieces]
            assert b"".join(piece.read_bytes() for piece in pieces) == path.read_bytes()
            assert wheels._sha256(pieces) == wheel.sha256


def test_wheels_are_joined_installed_and_found(tmp_path: Path) -> None:
    one, other = write_wheel(tmp_path, "wheel_one", "X = 1\n" * 3000), write_wheel(tmp_path, "wheel_two", "X = 2\n")
    split([one, other], tmp_path / "loads", 6000 + INDEX_BYTES)
    site = tmp_path / "site"
    pieces = sorted((tmp_path / "loads").rglob("wheel_one*.1-of-*"))
    assert len(pieces) == 1, "the wheel is in pieces"
    held = pieces[0].rename(tmp_path / "held")
    folders, told = install(tmp_path / "loads", site)
    states = {each["wheel"].partition("-")[0]: each["state"] for each in told}
    assert states["wheel_two"] == "installed" and "1 of 4 pieces are missing" in states["wheel_one"]
    pieces[0].write_bytes(b"x" * held.stat().st_size)
    _, told = install(tmp_path / "loads", site)
    assert "SHA-256 differs" in told[0]["state"] and not (site / "wheel_one-1.0-py3-none-any").exists()
    held.rename(pieces[0])
    folders, told = install(tmp_path / "loads", site)
    assert {each["state"] for each in told} == {"installed"}
    assert {path.name for folder in folders for path in folder.glob("*.py")} == {"wheel_one.py", "wheel_two.py"}
    assert [path.name for path in site.iterdir() if path.name.startswith(".")] == []


def test_a_folder_of_plain_wheels_will_do_and_one_that_does_not_fit_is_named(tmp_path: Path) -> None:
    write_wheel(tmp_path / "plain", "wheel_three", "X = 3\n")
    folders, _ = install(tmp_path / "plain", tmp_path / "site")
    assert [folder.name for folder in folders] == ["wheel_three-1.0-py3-none-any"]
    (tmp_path / "plain" / "nothing-1.0-cp27-cp27m-win32.whl").write_bytes(b"no wheel")
    folders, told = install(tmp_path / "plain", tmp_path / "site")
    assert folders == [], "half of a set would hide what works"
    assert "pip install failed" in told[0]["state"] and "nothing-1.0" in told[0]["state"]


@pytest.mark.parametrize("content", ["no JSON", '[{"name": "a"}]', "[1]"])
def test_an_index_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "wheels.json").write_text(content)
    with pytest.raises(InputError, match="is not an index that --prepare wrote"):
        install(tmp_path, tmp_path / "site")


def test_prepared_is_what_pip_gave_for_the_other_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def pip(*arguments: Any) -> None:
        asked.append(arguments)
        write_wheel(Path(arguments[arguments.index("--dest") + 1]), f"wheel_{len(asked)}", "X = 1\n")

    monkeypatch.setattr(wheels, "_pip", pip)
    found = prepare(tmp_path / "out")
    assert [each.name.partition("-")[0] for each in found] == ["wheel_1", "wheel_2"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["load-1"]
    assert "pydantic>=2.10" in asked[0] and "--no-deps" not in asked[0] and "--no-deps" in asked[1]
    assert all(("3.12" in each, "manylinux2014_x86_64" in each) == (True, True) for each in asked)
    with pytest.raises(InputError, match="already exists"):
        prepare(tmp_path / "out")


def test_what_pip_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(wheels, "PLATFORMS", ("any",))
    with pytest.raises(InputError, match=r"pip download failed: No matching distribution found for no-such"):
        download(["no-such"], tmp_path, dependencies=False)
