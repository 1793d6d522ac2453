"""What the README says is run: its commands, its Python, its table, the two commands of its start."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = re.compile(r"<!-- run -->\n```(sh|python)\n(.*?)```", re.DOTALL)


def _rounded(line: str) -> list[str]:
    """Return a line's words, probabilities to three places: the fourth depends on the number of threads."""
    return re.sub(r"(0\.\d{3})\d\b", r"\1", line).split()


def test_every_runnable_block_runs_in_order() -> None:
    shutil.rmtree(ROOT / "build" / "readme", ignore_errors=True)
    blocks = RUN.findall(README)
    assert [language for language, _ in blocks] == ["sh", "python", "sh", "sh", "sh", "python", "sh"]
    said = []
    for language, text in blocks:
        lines = [text] if language == "python" else text.strip().splitlines()
        for line in lines:
            command = [sys.executable, "-c", line] if language == "python" else [sys.executable, *shlex.split(line)[1:]]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
            assert done.returncode in ({0, 10} if "-m runtimes" in line else {0}), done.stderr
            said.append(done.stdout)
    assert "guard.fp16.onnx" in said[0]
    assert "block" in said[2], "not one picture of violence was blocked"
    assert len(said[3].splitlines()) == 5
    promised = [line.split() for line in README.splitlines()]
    *_, exported, thresholds, answered, blocked, gptq, int8, gguf, chat, again, before, after, report = said
    assert "distilled head: same class as the exact guard on" in exported
    for text in (
        thresholds.splitlines()[0],
        answered.splitlines()[0],
        answered.splitlines()[-1],
        blocked.splitlines()[0],
    ):
        assert text.split() in promised, "the README shows another output"
    assert answered.startswith("allow") and blocked.startswith("block")
    rounded = [_rounded(line) for line in README.splitlines()]
    for line in gptq.splitlines()[:3]:
        assert _rounded(line) in rounded, "the README shows another output of quantize.gptq"
    assert "tiny-safellava at 8.00 bits a weight" in int8
    for line in gguf.splitlines()[:5]:
        assert line in README.splitlines(), "the README shows another output of export.gguf"
    assert chat == again == f"{answered.splitlines()[-1]}\n", "llama.cpp says what torch says"
    assert "tiny-safellava on holisafe-mini, 3000 rows, 0 failed" in before
    assert "gptq on holisafe-mini, 3000 rows, 0 failed" in after
    assert report.startswith("PASS\n") and report.count("  PASS\n") == 9
    shown = re.search(r"```\nPASS\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    measures = [line.split("  ")[0] for line in shown[1].splitlines()[3:]]
    assert len(measures) == 4 and all(f"\n{measure}  " in report for measure in measures)
    written = {path.name for path in (ROOT / "build" / "readme" / "report").iterdir()}
    assert written == {"report.html", "report.json", "report.md", "junit.xml"}


@pytest.mark.parametrize("command", re.findall(r"^\| `(python -m [\w.]+)", README, re.MULTILINE))
def test_every_command_of_the_table_has_help(command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command.split()[1:], "--help"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_make_demo_and_make_test_exist_as_the_readme_says() -> None:
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", targets, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_file_that_the_readme_links_is_there() -> None:
    for link in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / link).is_file(), link
