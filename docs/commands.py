"""Write docs/reference/commands.md from the help texts of all commands: ``python docs/commands.py``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click

from safevlm.terminal.commands import COMMANDS, GROUPS, PROGRAM

PAGE = Path(__file__).parent / "reference" / "commands.md"
OPENING = """# Commands
<!-- Written by docs/commands.py from the help texts. Change those, then run `make docs`. -->

Each command has two names for the same thing: `safevlm x y` works everywhere, `python -m x.y` where no folder hides ours. Every
command prints this text with `--help`. Those that print JSON do so with `--json`. All end with the same [exit codes](exit-codes.md).
"""


def page() -> str:
    """Return the page: a section for each group, a part for each command, in the order in which safevlm lists them."""
    ungrouped = [typed for typed, module in COMMANDS.items() if len(_names(module)) == 1 and " " not in typed]
    sections = [_section("General", "", ungrouped)] if ungrouped else []
    for group, text in GROUPS.items():
        typed = [each for each in COMMANDS if each.split()[0] == group]
        sections.append(_section(group, text, typed))
    return "\n".join([OPENING, *sections]).rstrip("\n") + "\n"


def _section(title: str, text: str, commands: list[str]) -> str:
    parts = [f"## {title}", "", *([text, ""] if text else [])]
    for typed in commands:
        parts += _command(import_module(COMMANDS[typed]).main, typed, _names(COMMANDS[typed]))
    return "\n".join(parts)


def _names(module: str) -> list[str]:
    return [typed for typed, other in COMMANDS.items() if other == module]


def _command(command: click.Command, typed: str, names: list[str]) -> Iterator[str]:
    """Yield the lines of a command, and of the commands that it is made of."""
    context = click.Context(command, info_name=f"{PROGRAM} {names[0]}")
    yield f"### {typed}"
    yield ""
    yield from (_paragraphs(command.help) if command.help else ())
    yield "```"
    for name in names:
        yield f"{PROGRAM} {name} {_usage(command, context)}"
    if typed.split()[0] in GROUPS:
        yield f"python -m {typed.replace(' ', '.')} {_usage(command, context)}"
    yield "```"
    yield ""
    yield from _options(command, context)
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _inner(inner, f"{typed} {name}")


def _inner(command: click.Command, typed: str) -> Iterator[str]:
    context = click.Context(command, info_name=typed)
    yield f"#### {typed}"
    yield ""
    yield from (_paragraphs(command.help) if command.help else ())
    yield from _options(command, context)


def _usage(command: click.Command, context: click.Context) -> str:
    return " ".join(command.collect_usage_pieces(context))


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        yield " ".join(paragraph.split())
        yield ""


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    """Yield a table of the options, but for ``--help``."""
    rows = [
        record
        for option in command.get_params(context)
        if option.name != "help" and (record := option.get_help_record(context)) is not None
    ]
    if rows:
        yield "| option | what it does |"
        yield "|---|---|"
        yield from (f"| `{_cell(shown)}` | {_cell(text)} |" for shown, text in rows)
        yield ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
