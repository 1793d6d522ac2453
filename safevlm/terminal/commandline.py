"""How every command ends: one message and an exit code for what was expected, a traceback for a bug."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import click

from safevlm.errors import InputError, SafeVLMError, StorageError
from safevlm.files.storage import locale_problem, storage_problem
from safevlm.imports.siblings import PACKAGES
from safevlm.machine import memory_problem
from safevlm.terminal.commands import PROGRAM
from safevlm.terminal.printable import printable
from safevlm.terminal.standard_streams import settled, standard_streams

__all__ = ["USAGE", "as_started", "leave", "printable", "run"]

USAGE = 2
SIGNALLED = 128
"""Plus the signal's number, as shells have it: 130 for SIGINT."""
ENDING = (signal.SIGTERM, signal.SIGHUP)
COMMAND = re.compile(rf"\bpython -m ((?:{'|'.join(PACKAGES)})(?:\.\w+)+)")


def run(command: click.Command, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a click command and exit: with the integer it returns, otherwise 0.

    SafeVLMError becomes ``error: message`` on stderr and its own code, and so does what the surroundings cause (a full
    disk or memory, a folder that may not be written, a locale that lacks a letter); wrong usage 2, Ctrl-C 130, SIGTERM
    143, SIGHUP 129. Every other exception is a bug of ours and keeps its traceback (Python then exits with 1). Standard
    output that cannot be written changes no verdict: see :func:`safevlm.terminal.standard_streams.settled`.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    with standard_streams(), _orderly_end() as signals:
        sys.exit(settled(_code(command, given, signals)))


def _code(command: click.Command, arguments: list[str], signals: list[int]) -> int:
    """Run a command and return the code of its end; what it ended with is said on standard error."""
    try:
        code = command.main(list(arguments), standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        number = signals[0] if signals else signal.SIGINT
        click.echo("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}", err=True)
        return SIGNALLED + number
    except SafeVLMError as error:
        _say_error(command, str(error))
        if isinstance(error, StorageError):
            _say_again(command, arguments)
        return error.exit_code
    except Exception as error:
        if full := memory_problem(error):
            _say_error(command, f"{full} Free memory, or ask for less at once.")
            return InputError.exit_code
        told = storage_problem(error, arguments) or locale_problem(error, arguments)
        if told is None:
            raise
        _say_error(command, told)
        _say_again(command, arguments)
        return StorageError.exit_code
    return code if isinstance(code, int) else 0


def as_started(text: str, command: click.Command | None = None) -> str:
    """Return a text with the commands in it written as this process was started.

    ``python -m export.trt`` becomes ``safevlm export trt`` under ``safevlm``, and ``python -m safevlm export trt``
    under ``python -m safevlm``. ``command`` is what was run; by default, the command that is running, if one is.
    """
    context = click.get_current_context(silent=True)
    root = context.find_root().command if command is None and context is not None else command
    if root is None or root.name != PROGRAM:
        return text
    return COMMAND.sub(lambda found: " ".join([_start(root), *_words(found[1])]), text)


def _words(module: str) -> list[str]:
    return module.removeprefix("runtimes.").split(".")


def _start(command: click.Command) -> str:
    """Return what is typed to start this process, before its arguments."""
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return str(command.name) if specification is None else f"python -m {specification.name.removesuffix('.__main__')}"


def _say_error(command: click.Command, message: str) -> None:
    click.echo(f"error: {printable(as_started(message, command))}", err=True)


def _say_again(command: click.Command, arguments: Sequence[str]) -> None:
    """Print the command to run once the place is fixed: the same one, with ``--resume`` where it has that."""
    options = _run_command(command, list(arguments)).params
    resume = ["--resume"] if any(option.name == "resume" for option in options) else []
    typed = shlex.join([*arguments, *(each for each in resume if each not in arguments)])
    click.echo(printable(f"once this is fixed, run: {_start(command)} {typed}"), err=True)


def _run_command(command: click.Command, arguments: list[str]) -> click.Command:
    """Return the command that the arguments of a group name."""
    while isinstance(command, click.Group) and arguments:
        _, found, arguments = command.resolve_command(click.Context(command, resilient_parsing=True), arguments)
        if found is None:
            break
        command = found
    return command


@contextmanager
def _orderly_end() -> Iterator[list[int]]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that drafts are removed; a second one ends it at once.

    Yields the numbers of those that came. What somebody else handles or ignores (nohup) stays so.
    """
    came: list[int] = []

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        came.append(number)
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()
    ours = [each for each in ENDING if main_thread and signal.getsignal(each) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield came
    finally:
        for number in ours:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)


def leave(code: int) -> NoReturn:
    """End this process at once: threads inside a library would abort the interpreter's orderly end, or hold it up."""
    os._exit(settled(code))
