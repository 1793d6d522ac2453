"""All commands in surroundings that are not as they should be: no traceback, and a code that tells what happened.

Closed and full standard streams, a locale without UTF-8, names in other letters, places that are full or cannot be
written, no home.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.judges.server import judging, make_run
from tests.benchmarks.runs.sample_runs import pair_rows
from tests.killing import TEXT_ROW, Warm
from tests.runtimes.bundles import picture, write_bundle

ROOT = Path(__file__).parents[1]
PACKAGES = ("benchmarks", "calibration", "export", "quantize", "runtimes", "safevlm")
COMMANDS = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if "    run(main)" in path.read_text(encoding="utf-8")
)
BARE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a bundle, an image that it blocks, one that it allows, and both again under other names."""
    folder = tmp_path / "mit blanks"
    for name in ("bundle", "bündel"):
        write_bundle(folder / name)
    picture(folder / "red.png", (255, 0, 0))
    picture(folder / "green.png", (0, 255, 0))
    shutil.copyfile(folder / "red.png", folder / "röt.png")
    shutil.copyfile(folder / "red.png", os.fsencode(folder) + b"/r\xf6t.png")
    shutil.copyfile(folder / "red.png", folder / "-dash.png")
    return folder


def check(place: Path, command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run ``$CHECK`` in a shell, which knows how to close and redirect streams."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "CHECK": f"{sys.executable} -m runtimes.check", **environment}
    done = subprocess.run(["bash", "-c", command], cwd=place, env=variables, capture_output=True, timeout=600)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr.decode()
    return done


STREAMS = {
    "closed stdout": ">&-",
    "closed stdin": "<&-",
    "closed stderr": "2>&-",
    "all closed": "<&- >&- 2>&-",
    "full stdout": "> /dev/full",
    "full stderr": "2> /dev/full",
    "reader gone": "| true",
}


@pytest.mark.parametrize("redirection", STREAMS.values(), ids=STREAMS)
def test_a_block_ends_as_10_whatever_the_streams_are(place: Path, redirection: str) -> None:
    assert check(place, f"set -o pipefail; $CHECK bundle red.png {redirection}").returncode == 10


def test_an_answer_that_is_lost_is_no_success(place: Path) -> None:
    lost = check(place, "$CHECK bundle green.png --json > /dev/full")
    assert lost.returncode == 2 and b"standard output cannot be written: No space left" in lost.stderr
    for wanted in (">&-", "| true"):  # nobody is to read it, or has read enough
        assert check(place, f"set -o pipefail; $CHECK bundle green.png {wanted}").returncode == 0
    assert b"missing" in check(place, "$CHECK nowhere red.png >&-").stderr


@pytest.mark.parametrize("variables", [BARE, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {}])
def test_names_in_other_letters_are_judged_or_refused(place: Path, variables: dict[str, str]) -> None:
    bundle = "bundle" if variables is BARE else "bündel"  # of which ONNX Runtime takes UTF-8 alone
    done = check(place, f"$CHECK {bundle} r*t.png -- -dash.png", **variables)
    assert done.returncode == 10 and done.stdout.count(b"block") == 3
    if variables in (BARE, {}):
        assert check(place, f"$CHECK {bundle} ü.png $'\\xf6.png'", **variables).returncode == 2
    if variables is BARE:
        other = check(place, "$CHECK bündel red.png", **variables)
        assert other.returncode == 2 and b"PYTHONUTF8=1" in other.stderr


def test_no_home_a_strict_mask_and_no_folder_to_be_in(place: Path) -> None:
    assert check(place, "umask 077; $CHECK bundle red.png", HOME="/proc/none", TMPDIR="/nowhere").returncode == 10
    assert check(place, "unset HOME; $CHECK bundle green.png").returncode == 0
    assert check(place, 'mkdir gone; cd gone; rmdir "$OLDPWD/gone"; $CHECK ../bundle red.png').returncode in (2, 10)


def test_every_command_says_that_its_answer_was_lost(parent: Warm, tmp_path: Path) -> None:
    assert len(COMMANDS) > 20
    for command in COMMANDS:
        name = f"{command}.__main__" if (ROOT / command.replace(".", "/")).is_dir() else command
        module = {"runtimes.gate": "runtimes.gate.__main__"}.get(name, name)
        ended = parent.run(module, "--help", under=tmp_path, stdout="/dev/full")
        assert ended.code == 2 and "standard output cannot be written" in ended.said, (command, ended.said)


WRITING = {
    "quantize.gptq": (
        "--model",
        "tiny-safegem",
        "--calibration",
        "{rows}",
        "--mix",
        "text=1",
        "--samples",
        "1",
        "--guard-images",
        "0",
        "--answers",
        "given",
    ),
    "export.onnx": ("--model", "tiny-safegem", "--parity-images", "1"),
    "export.gguf.__main__": ("--model", "tiny-safegem", "--type", "f16", "--parity-images", "0"),
    "benchmarks.run": ("--model", "tiny-safegem", "--suite", "guard-mini", "--limit", "24"),
    "benchmarks.holisafe_mini": ("--pairs", "100"),
    "benchmarks.random_checkpoint": ("--shape", "SafeGem-12B", "--layers", "1", "--sparse"),
    "benchmarks.regress": ("--baseline", "{run}", "--candidate", "{run}"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "run", pair_rows(2))


@pytest.mark.parametrize("command", WRITING)
def test_a_place_that_is_full_or_cannot_be_written_is_named(
    command: str, parent: Warm, run: Path, tmp_path: Path
) -> None:
    (rows := run.with_name("rows.jsonl")).write_text(TEXT_ROW, encoding="utf-8")
    given = [each.format(run=run, rows=rows) for each in WRITING[command]]
    refused = parent.run(command, *given, "--out", "/proc/none/out", under=tmp_path)
    assert refused.code == 2 and "/proc/none" in refused.said and "Traceback" not in refused.said, refused.said
    out = tmp_path / "out"
    full = parent.run(command, *given, "--out", str(out), under=tmp_path, most_bytes=2000)
    assert full.code == 2 and "Traceback" not in full.said, full.said
    assert str(out) in full.said and "the file would be larger than this file system" in full.said
    assert "once this is fixed, run: python -m " in full.said
    assert ("--resume" in full.said) == (command == "benchmarks.run")
    assert all(path.name.startswith(".") or command == "benchmarks.run" for path in tmp_path.iterdir())


def test_a_judge_whose_place_is_full_keeps_what_it_scored(parent: Warm, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", pair_rows(8))
    with judging() as server:
        arguments = ["--run", str(folder), "--endpoint", server.url, "--judge-model", "m", "--no-images"]
        cache = ["--cache", str(tmp_path / "cache")]
        full = parent.run("benchmarks.judge", *arguments, *cache, under=tmp_path, most_bytes=2000)
        assert full.code == 2 and "--resume" in full.said and "Traceback" not in full.said, full.said
        done = parent.run("benchmarks.judge", *arguments, *cache, "--resume", under=tmp_path)
        assert done.code == 0, done.said


SLOW = """
import click, signal, threading
from pathlib import Path
from safevlm.terminal.commandline import run
from safevlm.files.draft import draft_of

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)

@click.command()
@click.argument("out", type=Path)
def main(out):
    with draft_of(out) as draft:
        print("begun", flush=True)
        threading.Event().wait()

run(main)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_and_its_draft(tmp_path: Path, number: signal.Signals, code: int) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        assert [path.name[:13] for path in tmp_path.iterdir()] == [".out.partial-"]
        process.send_signal(number)
        _, said = process.communicate(timeout=600)
    assert process.returncode == code and "Traceback" not in said, said
    assert not list(tmp_path.iterdir())


def test_two_exports_at_once_leave_one_whole_bundle(parent: Warm, tmp_path: Path) -> None:
    """Each replaces what is there in one step, while others do."""
    new = [write_bundle(tmp_path / f"new{number}") for number in range(2)]
    out = tmp_path / "here" / "out"
    out.parent.mkdir()
    all_ended = parent.run_at_once("tests.replacing", [(str(source), str(out)) for source in new * 2], out.parent)
    assert [ended.code for ended in all_ended] == [0] * 4, all_ended
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in new[0].iterdir())
