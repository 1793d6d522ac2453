"""How every command ends: one message and an exit code for what was expected, a traceback for a bug."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from models.errors import InputError, SafeVLMError
from models.printable import printable, shortened

__all__ = ["INTERRUPTED", "USAGE", "grid_option", "leave", "printable", "run"]

USAGE = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def run(command: click.Command, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a click command and exit: with the whole number it returns, else 0.

    SafeVLMError becomes ``error: message`` on stderr and its own code, wrong usage 2 (so is a path that is too long
    for the system, whoever looked at it), Ctrl-C 130. Every other exception is a bug of ours and keeps its traceback
    (Python then exits with 1).
    """
    try:
        code = command.main(None if arguments is None else list(arguments), standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(USAGE)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except SafeVLMError as error:
        click.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        click.echo(f"error: {shortened(str(error.filename))}: no path can be that long. Give a shorter one.", err=True)
        sys.exit(USAGE)
    sys.exit(code if isinstance(code, int) else 0)


def leave(code: int) -> NoReturn:
    """End this process at once: threads inside a library would abort the interpreter's orderly end, or hold it up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def grid_option(text: str | None) -> tuple[int, int] | None:
    """Read ``448`` or ``448x672`` (height x width, pixels)."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdigit() for side in sides):
        raise InputError(f"--grid {text}: one side in pixels (448) or height x width (448x672) is allowed.")
    return int(sides[0]), int(sides[-1])
