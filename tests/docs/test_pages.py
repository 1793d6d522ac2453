"""What the documentation says is run: its commands and its Python, in reading order, and the output it shows."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT, Block, blocks

BUILT = ROOT / "build" / "docs"
MAY_BLOCK = re.compile(r"safevlm (check|gate|chat) ")


def run(block: Block, before: dict[str, str]) -> list[tuple[str, str]]:
    """Run a block's lines, or its Python as a whole; return each with its output. What was run before is not again."""
    found = []
    for line in [block.text] if block.language == "python" else block.text.strip().splitlines():
        if line not in before:
            before[line] = output_of(line, block)
        found.append((line, before[line]))
    return found


def output_of(line: str, block: Block) -> str:
    words = ["-c", line] if block.language == "python" else ["-m", *shlex.split(line.removeprefix("python -m "))]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode in ({0, 10} if MAY_BLOCK.match(line) else {0}), f"{block.page}: {line}\n{done.stderr}"
    return done.stdout


def plain(line: str, *, numbers: bool) -> list[str]:
    """Return a line's words without what differs from run to run.

    That is times, and the fourth digit of a probability, which depends on the number of threads; with ``numbers`` all.
    """
    if numbers:
        return re.sub(r"[\d.,]*\d", "#", line).split()
    return re.sub(r"(0\.\d{3})\d\b", r"\1", re.sub(r"[\d.]+ ms\b", "# ms", line)).split()


def shown(block: Block, said: str) -> bool:
    """Say whether every line of an output block stands in what was printed."""
    numbers = block.mark.endswith("numbers vary")
    lines = [plain(line, numbers=numbers) for line in said.splitlines()]
    return all(plain(line, numbers=numbers) in lines for line in block.text.splitlines() if line.strip())


@pytest.fixture(scope="module")
def said() -> list[tuple[str, str]]:
    """Everything that was run, in order, with its output; output blocks were compared on the way."""
    shutil.rmtree(BUILT, ignore_errors=True)
    done: list[tuple[str, str]] = []
    before: dict[str, str] = {}
    for block in blocks("run", "output", "output, numbers vary"):
        if block.mark == "run":
            done += run(block, before)
            continue
        here = [text for _, text in done[-8:]]
        assert any(shown(block, text) for text in here), f"{block.page} shows another output:\n{block.text}\n{here}"
    return done


def output(said: list[tuple[str, str]], *words: str) -> str:
    """Return the output of the one command that holds these words."""
    found = {text for line, text in said if all(word in line for word in words)}
    assert len(found) == 1, f"{len(found)} commands with {words}"
    return found.pop()


def test_every_task_has_commands_that_run(said: list[tuple[str, str]]) -> None:
    run_on = {block.page for block in blocks("run")}
    tasks = {f"docs/{name}.md" for name in ("split", "gate", "compress", "device", "compare")}
    assert run_on >= {"README.md", *tasks}


def test_what_the_commands_print_is_what_the_pages_promise(said: list[tuple[str, str]]) -> None:
    assert "guard.fp16.onnx" in output(said, "export onnx", "tiny-safegem")
    checked = [text for line, text in said if line.startswith("safevlm check")]
    assert len(checked) == 2 and all("\nblock " in text and "\nallow " in text for text in checked)
    judged = output(said, "rglob", "guard.judge")
    assert len(judged.splitlines()) == 5
    allowed, blocked = output(said, "safevlm gate", "00011.png"), output(said, "safevlm gate", "00032.png")
    assert allowed.startswith("allow") and blocked.startswith("block")
    answer = f"{allowed.splitlines()[-1]}\n"
    assert output(said, "safevlm chat") == answer, "llama.cpp says what torch says"
    assert output(said, "open_gate", "build/docs/gguf") == answer
    assert output(said, "open_gate", "result.verdict") == f"allow guard {answer}"
    assert "tiny-safellava at 8.00 bits per weight" in output(said, "quantize int8")


def test_compressed_and_not_are_compared(said: list[tuple[str, str]]) -> None:
    assert "tiny-safellava on holisafe-mini, 3000 rows, 0 failed" in output(said, "benchmarks run", "run-16")
    assert "gptq on holisafe-mini, 3000 rows, 0 failed" in output(said, "benchmarks run", "run-4")
    report = output(said, "benchmarks regress")
    assert report.startswith("PASS\n") and report.count("  PASS\n") == 17
    written = {path.name for path in (BUILT / "report").iterdir()}
    assert written == {"report.html", "report.json", "report.md", "junit.xml"}


@pytest.mark.parametrize(
    ("page", "printed", "same"),
    [
        ("p 0.1234\n", "p 0.1239\nmore\n", True),
        ("p 0.1234\n", "p 0.1334\n", False),
        ("guard 5 ms\n", "guard 71.3 ms\n", True),
        ("safe\nblock\n", "safe\n", False),
    ],
)
def test_an_output_block_is_compared(page: str, printed: str, same: bool) -> None:
    assert shown(Block("page", "output", "", page), printed) is same
    assert shown(Block("page", "output, numbers vary", "", "n 1,200 of 7 %"), "n 9 of 12.5 %")
    assert not shown(Block("page", "output, numbers vary", "", "n 1,200 of 7 %"), "n 9 in 12.5 %")
