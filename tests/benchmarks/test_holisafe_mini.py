"""The suite on disk: HoliSafe-Bench's layout, the same bytes from the same seed, all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.holisafe_mini import PAIRS_FILE, QUESTIONS_FILE, write_suite
from calibration.holisafe_mini.suite import build_suite
from safevlm.errors import InputError


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    suite = build_suite("test", pairs=100, questions=10)
    write_suite(suite, tmp_path / "a")
    write_suite(build_suite("test", pairs=100, questions=10), tmp_path / "b")
    write_suite(build_suite("test", pairs=100, questions=10, seed=1), tmp_path / "c")
    assert tree(tmp_path / "a") == tree(tmp_path / "b") != tree(tmp_path / "c")


def test_one_command_writes_the_published_layout(tmp_path: Path) -> None:
    out = tmp_path / "mini"
    command = [sys.executable, "-m", "benchmarks.holisafe_mini", "--out", str(out)]
    command += ["--pairs", "100", "--questions", "4"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    assert "100 pairs, 4 questions" in said
    rows = json.loads((out / PAIRS_FILE).read_text(encoding="utf-8"))
    assert [row["id"] for row in rows] == list(range(100))
    for row in [*rows, *json.loads((out / QUESTIONS_FILE).read_text(encoding="utf-8"))]:
        with Image.open(out / "images" / row["image"]) as picture:
            assert picture.format == "PNG"
        assert row["image"].startswith(f"{row['category']}/{row['subcategory']}/")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mini"], "something half-written is left behind"


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="Give --out a new folder"):
        write_suite(build_suite("test", pairs=100, questions=0), tmp_path)
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "mine"
