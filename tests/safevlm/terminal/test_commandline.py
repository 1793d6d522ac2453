"""Every command ends with one message and the code of what happened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from safevlm.errors import BundleError, EngineUnavailableError, ParityError, StorageError
from safevlm.terminal.commandline import printable, run


def ended(command: click.Command, *arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        run(command, arguments)
    return caught.value.code


def raising(error: BaseException) -> click.Command:
    @click.command()
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [(BundleError("it is\x1b[31m altered"), 2), (ParityError("p"), 1), (EngineUnavailableError("e"), 6)],
)
def test_our_errors_become_a_message_and_their_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(raising(error)) == code
    printed = capsys.readouterr()
    assert printed.err == f"error: {printable(str(error))}\n" and printed.out == ""
    assert "\x1b" not in printed.err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: out of memory\nat kernel.cu:7")])
def test_memory_that_ran_out_is_a_message_and_no_traceback(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(raising(error)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: The") and printed.endswith("Free memory, or ask for less at once.\n")
    assert printed.count("\n") == 1


def test_wrong_usage_is_2_and_help_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    command = click.Command("demo", params=[click.Argument(["bundle"])], help="Say hello.")
    assert ended(command) == 2
    assert "Missing argument 'BUNDLE'" in capsys.readouterr().err
    assert ended(command, "x", "--nonsense") == 2
    assert "No such option" in capsys.readouterr().err
    assert ended(command, "--help") == 0
    assert "Say hello." in capsys.readouterr().out


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(raising(KeyboardInterrupt())) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_returned_number_is_the_exit_code() -> None:
    assert ended(click.Command("demo", callback=lambda: 10)) == 10
    assert ended(click.Command("demo", callback=lambda: None)) == 0
    assert ended(click.Command("demo", callback=lambda: click.get_current_context().exit(3))) == 3


HANGING = """
import threading, time
from safevlm.terminal.commandline import leave
threading.Thread(target=time.sleep, args=(60,)).start()
print("said")
leave(10)
"""


def test_a_process_is_left_at_once_and_what_was_said_is_kept() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", HANGING], cwd=root, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (10, "said\n", "")


def test_a_path_that_is_too_long_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    path = click.Argument(["path"], type=click.Path(path_type=Path))
    assert ended(click.Command("demo", params=[path], callback=lambda path: path.is_dir()), "x" * 6_000) == 2
    assert "a name in it is too long" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        run(raising(FileNotFoundError(2, "missing")), [])


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()), [])


def test_control_characters_are_escaped_and_letters_kept() -> None:
    assert printable("grün 図\n") == "grün 図\n"
    assert printable("\x1b[2J\r\x07\udcff") == "\\x1b[2J\\r\\x07\\udcff"


@pytest.mark.parametrize("resumable", [True, False])
def test_a_full_disk_names_the_command_of_a_group_to_run_again(
    resumable: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def compress(**_: object) -> None:
        raise StorageError("the disk is full")

    if resumable:
        compress.params.append(click.Option(["--resume"], is_flag=True))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as in a script that pip installs
    group = click.Group("safevlm", commands=[click.Group("quantize", commands={"gptq": compress})])
    assert ended(group, "quantize", "gptq") == 2
    again = "once this is fixed, run: safevlm quantize gptq" + " --resume" * resumable
    assert capsys.readouterr().err.splitlines() == ["error: the disk is full", again]
