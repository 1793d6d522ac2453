"""Thirty kills at random moments of the long commands: what they had done is not lost, what they left misleads nobody.

Afterwards the command goes on, or begins anew, and ends with what it would have ended with: equal but for times, dates,
memory, and the note that it was resumed.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes.guard.bundle import open_bundle
from safevlm.contract.manifest import Manifest
from safevlm.files.draft import remove_abandoned
from tests.benchmarks.judges.server import judging, make_run, pairs
from tests.killing import TEXT_ROW, Warm
from tests.runtimes.bundles import write_bundle

VARIES = {
    "created", "finished", "resumed", "seconds", "seconds_per_layer", "peak_memory_bytes", "max_memory_bytes", "ms",
    "latency", "fitted_on", "began",
}  # fmt: skip
"""Keys of records that may differ: times, dates, memory, and the note of being resumed."""


@dataclass(frozen=True)
class Case:
    """A command, with ``{out}`` where it writes, how often it is killed, and what makes it go on."""

    module: str
    arguments: tuple[str, ...]
    kills: int
    again: tuple[str, ...] = ()
    record: str | None = None
    """The file in ``out`` that says ``resumed``."""
    inside: bool = False
    """Whether it writes into a folder that is there before."""


CASES = {
    "gptq": Case(
        module="quantize.gptq",
        arguments=("--model", "tiny-safegem", "--out", "{out}", "--calibration", "{rows}", "--mix", "text=1",
                   "--samples", "1", "--guard-images", "0", "--answers", "given", "--group-size", "32", "--bits", "8"),
        kills=3,
        record="compression.json",
    ),
    "int8": Case(
        module="quantize.int8",
        arguments=("--model", "tiny-safegem", "--out", "{out}", "--calibration", "{rows}", "--mix", "text=1",
                   "--samples", "1", "--guard-images", "0", "--answers", "given"),
        kills=2,
        record="compression.json",
    ),
    "onnx": Case(
        module="export.onnx",
        arguments=("--model", "tiny-safegem", "--out", "{out}", "--parity-images", "1"),
        kills=1,
    ),
    "gguf": Case(
        module="export.gguf.__main__",
        arguments=("--model", "tiny-safegem", "--out", "{out}", "--type", "f16", "--parity-images", "0"),
        kills=7,
    ),
    "run": Case(
        module="benchmarks.run",
        arguments=("--model", "tiny-safegem", "--suite", "guard-mini", "--limit", "24", "--batch", "4", "--out",
                   "{out}"),
        kills=7,
        again=("--resume",),
        record="run.json",
    ),
    "judge": Case(
        module="benchmarks.judge",
        arguments=("--run", "{out}", "--endpoint", "{url}", "--judge-model", "judge", "--no-images", "--cache",
                   "{out}/cache", "--concurrency", "1"),
        kills=5,
        again=("--resume",),
        record="judges/judge.json",
        inside=True,
    ),
    "thresholds": Case(
        module="calibration.thresholds",
        arguments=("--bundle", "{out}", "--labels", "{labels}", "--alpha", "0.3", "--max-fpr", "0.9"),
        kills=4,
        inside=True,
    ),
    "distill": Case(
        module="calibration.distill",
        arguments=("--model", "tiny-safellava", "--images", "{images}", "--out", "{out}/head.safetensors",
                   "--min-agreement", "0", "--pooling", "mean"),
        kills=1,
        inside=True,
    ),
}  # fmt: skip


@pytest.fixture
def given(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Inputs of the commands: 200 images and their labels, a calibration row, the URL of a judge."""
    folder = tmp_path / "given"
    (folder / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), ["image,label"]
    for number in range(200):
        rgb = np.zeros((8, 8, 3), np.uint8)
        rgb[..., number % 3] = rng.integers(100, 256)
        rgb[number // 8 % 8, number % 8] = number  # no two alike
        Image.fromarray(rgb).save(folder / "images" / f"{number:03d}.png")
        rows.append(f"images/{number:03d}.png,{(1, 0, 2)[number % 3]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "rows.jsonl").write_text(TEXT_ROW, encoding="utf-8")
    with judging() as server:
        yield {
            "images": str(folder / "images"),
            "labels": str(folder / "labels.csv"),
            "rows": str(folder / "rows.jsonl"),
            "url": server.url,
        }


def test_thirty_kills_are_tried() -> None:
    assert sum(case.kills for case in CASES.values()) == 30


@pytest.mark.parametrize("name", CASES)
def test_what_was_killed_ends_as_if_it_had_not_been(
    name: str, parent: Warm, given: dict[str, str], tmp_path: Path
) -> None:
    case, chance = CASES[name], random.Random(f"kills of {name}")
    whole, place = _begin(case, tmp_path / "whole"), _begin(case, tmp_path / "killed")
    undisturbed = parent.run(case.module, *_filled(case, whole, given), under=tmp_path / "whole")
    assert undisturbed.code == 0, undisturbed.said
    wanted, kills, again, resumed = _content(whole), 0, False, 0
    while kills < case.kills:
        more = case.again if again else ()
        moment = chance.randint(1, max(1, undisturbed.events // (2 if case.record else 1)))
        ended = parent.run(case.module, *_filled(case, place, given), *more, under=tmp_path / "killed", kill_at=moment)
        if ended.code == -9:
            kills, again = kills + 1, True
            _check_left(case, place, wanted)
            continue
        assert ended.code == 0, ended.said
        resumed += _check_whole(case, place, wanted, again=again)
        shutil.rmtree(tmp_path / "killed")
        place, again = _begin(case, tmp_path / "killed"), False
    ended = parent.run(case.module, *_filled(case, place, given), *(case.again if again else ()), under=tmp_path)
    assert ended.code == 0, ended.said
    resumed += _check_whole(case, place, wanted, again=again)
    assert bool(resumed) == (case.record is not None), "no record says that its run was resumed"


def _begin(case: Case, folder: Path) -> Path:
    folder.mkdir()
    out = folder / "out"
    if case.module == "benchmarks.judge":
        make_run(out, pairs(12))
    elif case.module == "calibration.thresholds":
        out.mkdir()
        write_bundle(out)
    elif case.inside:
        out.mkdir()
    return out


def _filled(case: Case, out: Path, given: dict[str, str]) -> list[str]:
    return [each.format(out=out, **given) for each in case.arguments]


def _check_left(case: Case, out: Path, wanted: dict[str, Any]) -> None:
    """What a kill leaves is nothing, a draft under a hidden name, something resumable, or the whole."""
    assert all(path == out or path.name.startswith(".") for path in out.parent.iterdir())
    if case.module == "calibration.thresholds":
        Manifest.read(out)
    elif out.exists() and not case.again and not case.inside:
        assert _content(out) == wanted, "half an artifact under its own name"


def _check_whole(case: Case, out: Path, wanted: dict[str, Any], *, again: bool) -> int:
    """Check what a command ended with; return how often its record says that it was resumed."""
    assert _content(out) == wanted
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    if case.record is None:
        return 0
    resumed = json.loads((out / case.record).read_text(encoding="utf-8"))["resumed"]
    assert bool(resumed) <= again, "never killed, and said to be resumed"
    return len(resumed)


def _content(folder: Path) -> dict[str, Any]:
    """Return what is in a folder, by relative path; of JSON what may not vary."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or "cache" in name:
            continue
        found[name] = path.read_bytes()
        if path.suffix == ".json":
            found[name] = _steady(json.loads(found[name]))
        elif path.suffix == ".jsonl":
            found[name] = [_steady(json.loads(line)) for line in found[name].splitlines()]
    return found


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(each) for key, each in value.items() if key not in VARIES}
    return [_steady(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("exchange", ["--exchange", "--no-exchange"])
def test_a_kill_while_a_bundle_is_replaced_loses_neither_bundle(exchange: str, parent: Warm, tmp_path: Path) -> None:
    """At every event: with two names exchanged in one step, and on file systems that cannot do that."""
    old, new = (write_bundle(_made(tmp_path / name), created=f"2026-01-0{day}T00:00:00+00:00") for name, day in
                (("old", 1), ("new", 2)))  # fmt: skip
    known = {Manifest.read(folder).created for folder in (old, new)}
    moment, code = 0, -9
    while code == -9:
        moment += 1
        place = _made(tmp_path / str(moment))
        out = Path(shutil.copytree(old, place / "out"))
        code = parent.run("tests.replacing", str(new), str(out), exchange, under=place, kill_at=moment).code
        assert exchange == "--no-exchange" or out.exists(), "there is a moment without any bundle"
        remove_abandoned(out)
        assert open_bundle(out).manifest.created in known
        assert [path.name for path in place.iterdir()] == ["out"]
    assert code == 0 and moment > 6 and Manifest.read(out).created == Manifest.read(new).created


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
