"""``python -m runtimes.check`` as a user runs it: output, exit codes, messages, time, and what it loads."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from runtimes.check import exit_code, table
from runtimes.guard.verdict import Judgement
from tests.runtimes.bundles import GREEN, RED, RTX, engine_file, picture, write_bundle

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=600)


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "runtimes.check", *arguments)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def safe(tmp_path: Path) -> Path:
    return picture(tmp_path / "safe.png", GREEN)


@pytest.fixture
def unsafe(tmp_path: Path) -> Path:
    return picture(tmp_path / "unsafe.png", RED)


def test_allowed_images_exit_0_with_an_aligned_table(bundle: Path, safe: Path) -> None:
    done = check(bundle, safe, safe)
    assert (done.returncode, done.stderr) == (0, "")
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["verdict", "p(unsafe)", "class", "p(class)", "file"]
    assert [line.split() for line in lines] == [["allow", "0.0000", "safe", "1.0000", str(safe)]] * 2
    assert {line.index(str(safe)) for line in lines} == {header.index("file")}
    assert "\x1b" not in done.stdout


def test_an_engine_that_does_not_run_here_costs_one_line_on_stderr(tmp_path: Path, safe: Path) -> None:
    folder = tmp_path / "bundle"
    bundle = write_bundle(folder, engine_file(folder, **(RTX | {"machine": "riscv64"})))
    done = check(bundle, safe)
    assert done.returncode == 0 and done.stdout.splitlines()[1].split()[0] == "allow"
    (line,) = done.stderr.splitlines()
    assert line.startswith("ONNX Runtime judges: ")
    refused = check(bundle, safe, "--runtime", "tensorrt")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")
    verified = check(bundle, "--verify")
    assert verified.returncode == 2 and verified.stdout.startswith("skipped  engines/guard.fp16.plan: ")
    assert check(write_bundle(tmp_path / "plain"), "--verify").returncode == 2
    assert "--verify and IMAGE cannot be combined" in check(bundle, safe, "--verify").stderr


def test_a_blocked_image_exits_10_and_json_has_the_stated_shape(bundle: Path, safe: Path, unsafe: Path) -> None:
    done = check(bundle, safe, unsafe, "--json", "--threads", "1", "--runtime", "onnxruntime", "--precision", "fp32")
    assert (done.returncode, done.stderr) == (10, "")
    allowed, blocked = json.loads(done.stdout)
    assert set(blocked) == {"file", "verdict", "label", "p_unsafe", "probs", "view_mode"}
    assert (blocked["file"], blocked["verdict"], blocked["label"]) == (str(unsafe), "block", "weapon")
    assert blocked["p_unsafe"] > 0.99 and set(blocked["probs"]) == {"safe", "weapon", "drug"}
    assert allowed["verdict"] == "allow" and allowed["p_unsafe"] < 0.01


def test_an_unreadable_image_exits_2_and_the_others_are_judged(bundle: Path, safe: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(safe.read_bytes()[:50])
    done = check(bundle, bad, safe, "--json")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and str(bad) in done.stderr
    failed, allowed = json.loads(done.stdout)
    assert failed["verdict"] == "error" and failed["error"] in done.stderr
    assert (failed["label"], failed["p_unsafe"], failed["probs"]) == (None, None, {})
    assert allowed["verdict"] == "allow" and "error" not in allowed


def test_a_folder_stands_for_its_images_whatever_their_names(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    names = ["a.PNG", "b.jpg", "c.jfif", "d.JPG~", "deep/.hidden.webp", "deep/e.mpo", "deep/f.pnm", "g"]
    kinds = ["PNG", "JPEG", "JPEG", "JPEG", "WEBP", "MPO", "PPM", "GIF"]
    for name, kind in zip(names, kinds, strict=True):
        Image.new("RGB", (20, 20), GREEN).save(folder / name, kind)
    done = check(bundle, folder, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert [entry["file"] for entry in json.loads(done.stdout)] == [str(folder / name) for name in names]
    (tmp_path / "empty").mkdir()
    done = check(bundle, tmp_path / "empty")
    assert done.returncode == 2 and "a folder without image files" in done.stderr


def test_what_is_no_image_in_a_folder_is_named_and_keeps_the_exit_code_from_0(
    bundle: Path, safe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    safe.rename(folder / "safe.png")
    others = [folder / name for name in ("a\x1b[31m\nb.txt", "labels.json", "void", "x1", "x2", "x3")]
    for path in others:
        path.write_text("" if path.name == "void" else "not an image")
    os.mkfifo(folder / "x4")
    done = check(bundle, folder, "--json")
    assert done.returncode == 2 and "\x1b" not in done.stderr and done.stderr.count("\n") == 1
    assert "7 files are not images and were not judged: " in done.stderr and r"\x1b[31m\nb.txt" in done.stderr
    assert "x3" not in done.stderr and done.stderr.endswith(" and 2 more\n")
    judged, *rest = json.loads(done.stdout)
    assert judged["verdict"] == "allow" and [entry["file"] for entry in rest] == [*map(str, others), str(folder / "x4")]
    assert {entry["verdict"] for entry in rest} == {"not_image"} and all(set(entry) == set(judged) for entry in rest)
    assert check(bundle, folder, "--allow-others").returncode == 0
    (folder / "bad.png").write_bytes(b"not an image, by its name a damaged one")
    (folder / "phone").write_bytes(b"\0\0\0\x20ftypheic" + bytes(40))
    done = check(bundle, folder, "--allow-others", "--json")
    assert done.returncode == 2
    verdicts = {Path(entry["file"]).name: entry["verdict"] for entry in json.loads(done.stdout)}
    assert verdicts["bad.png"] == verdicts["phone"] == "error"


def test_an_image_that_other_readers_show_is_judged_too(bundle: Path, safe: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden.png"
    Image.new("RGBA", (20, 20), (*RED, 0)).save(hidden)
    done = check(bundle, hidden, safe)
    header, worst, ordinary = (line.split("  ") for line in done.stdout.splitlines())
    assert done.returncode == 10 and [cell.strip() for cell in header if cell.strip()][4:] == ["view", "file"]
    assert worst[0] == "block" and "transparency ignored" in map(str.strip, worst)
    assert ordinary[0] == "allow" and "-" in map(str.strip, ordinary)
    judged, _ = json.loads(check(bundle, hidden, safe, "--json").stdout)
    assert judged["view"] == "transparency ignored" and judged["view"] in judged["views"] and len(judged["views"]) == 4


def test_a_bad_bundle_is_one_message_and_no_traceback(bundle: Path, safe: Path) -> None:
    path = bundle / "guard.fp32.onnx"
    path.write_bytes(path.read_bytes()[:-3])
    for arguments in ((bundle, safe), (bundle / "none", safe)):
        done = check(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument"),
        (("--runtime", "vulkan"), "is not one of"),
        (("--precision", "int3"), "no onnx file of precision 'int3'"),
        (("--runtime", "tensorrt"), "no engine file"),
    ],
)
def test_wrong_usage_exits_2(bundle: Path, safe: Path, arguments: tuple[str, ...], message: str) -> None:
    done = check(bundle, *([safe] if arguments else []), *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_name_cannot_write_to_the_terminal(bundle: Path, tmp_path: Path) -> None:
    name = tmp_path / "a\x1b[31m\nallow.png"
    Image.new("RGB", (8, 8), RED).save(name, "PNG")
    done = check(bundle, name)
    assert done.returncode == 10 and "\x1b" not in done.stdout and len(done.stdout.splitlines()) == 2


def test_the_exit_code_puts_safety_first() -> None:
    allow, block, unsure, error = (Judgement("f", v) for v in ("allow", "block", "unsure", "error"))
    assert exit_code([allow]) == 0
    assert exit_code([allow, error]) == 2
    assert exit_code([error, block]) == 10
    assert exit_code([allow, unsure]) == 10
    assert exit_code([allow], others=1) == 2 and exit_code([block], others=1) == 10


def test_colour_is_on_the_verdict_and_changes_no_width() -> None:
    judgements = [
        Judgement("f.png", "block", "weapon", 0.9, {"weapon": 0.9}),
        Judgement("g.png", "error", error="x"),
    ]
    plain, coloured = table(judgements, colour=False), table(judgements, colour=True)
    assert coloured[1] == plain[1].replace("block  ", "\x1b[31mblock  \x1b[0m", 1)
    assert plain[2].split() == ["error", "-", "-", "-", "g.png"]


LIGHT = """
import sys
import runtimes.guard.judge, runtimes.check
with runtimes.guard.judge.Guard.open(sys.argv[1]) as guard:
    assert guard.judge([sys.argv[2]])[0].verdict == "allow"
heavy = {"torch", "transformers", "onnx", "safetensors", "huggingface_hub", "rich", "scipy", "tensorrt"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_a_device_loads_neither_torch_nor_transformers(bundle: Path, safe: Path) -> None:
    done = python("-c", LIGHT, bundle, safe)
    assert done.returncode == 0, done.stderr


def test_the_whole_process_is_quick(bundle: Path, safe: Path) -> None:
    """Hold the processor's time to the bound of 1.5 s: on free cores the clock shows less, on busy ones more."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert check(bundle, safe).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent <= 1.5
