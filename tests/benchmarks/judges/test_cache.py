"""The cache outlives its process, bears several, and refuses files that are none."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from benchmarks.judges.cache import AnswerCache
from safevlm.errors import InputError

ROOT = Path(__file__).parents[3]


def test_answers_are_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/cache.sqlite"
    with AnswerCache(path) as cache:
        cache.put("a", True, "m")
        cache.put("b", False, "m")
        cache.put("a", False, "m")  # the first answer stands
    with AnswerCache(path) as cache:
        assert (cache.get("a"), cache.get("b"), cache.get("c")) == (True, False, None)


WRITER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from benchmarks.judges.cache import AnswerCache
with AnswerCache(Path(sys.argv[1])) as cache:
    print("open", flush=True)
    sys.stdin.readline()
    for number in range(150):
        cache.put(f"{sys.argv[2]}-{number}", number % 2 == 0, "m")
        cache.put(f"both-{number}", True, "m")
    print("done", flush=True)
    sys.stdin.readline()
"""


def test_two_processes_lose_nothing_and_a_killed_one_breaks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    command = [sys.executable, "-c", WRITER, str(path)]
    started = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for name in ("one", "two")
    ]
    for step in ("open", "done"):
        for process in started:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == f"{step}\n"
        if step == "open":
            for process in started:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
    for process in started:
        process.kill()  # without closing the file
        process.communicate()
    with AnswerCache(path) as cache:
        found = [cache.get(f"{name}-{number}") for name in ("one", "two") for number in range(150)]
        assert found == [number % 2 == 0 for number in range(150)] * 2
        assert all(cache.get(f"both-{number}") for number in range(150))


def test_a_new_file_may_be_opened_by_several_at_once(tmp_path: Path) -> None:
    for turn in range(40):  # without trying again, some turn finds the file locked
        together = Barrier(4)

        def opened(_: int, path: Path = tmp_path / f"{turn}.sqlite", together: Barrier = together) -> bool:
            together.wait()
            with AnswerCache(path) as cache:
                return cache.get("a") is None

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(opened, range(4)))


def test_a_file_that_is_no_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"my notes " * 1000)
    with pytest.raises(InputError, match=r"notes\.txt cannot be used.*--cache"):
        AnswerCache(path).__enter__()
    assert path.read_bytes() == b"my notes " * 1000


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        AnswerCache(tmp_path).__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be used"):
        AnswerCache(tmp_path / "file/cache.sqlite").__enter__()


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 7")
    database.close()
    with pytest.raises(InputError, match="version 7; this release reads 1"):
        AnswerCache(path).__enter__()
