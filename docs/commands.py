"""Write docs/reference/commands.md from the help texts of all commands: ``python -m docs.commands``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click

from safevlm.terminal.commands import COMMANDS, GROUPS, PROGRAM

PAGE = Path(__file__).parent / "reference" / "commands.md"
OPENING = """# Commands
<!-- Written by `python -m docs.commands` from the help texts. Change those, then run `make docs`. -->

Every command can be typed in two ways: `safevlm x y` works everywhere, `python -m x.y` where no folder of the same name
hides ours. `--help` prints what stands here. All commands end with the same [exit codes](exit-codes.md).
"""


def page() -> str:
    """Return the page: those in daily use, which need no group, then a section for each group."""
    daily = [typed for typed in COMMANDS if typed.split()[0] not in GROUPS]
    known = {COMMANDS[typed] for typed in daily}
    sections = [("In daily use", "These need no group.", daily)]
    for group, text in GROUPS.items():
        typed = [each for each, module in COMMANDS.items() if each.split()[0] == group and module not in known]
        sections += [(group, text, typed)] if typed else []
    return "\n".join([OPENING, *(line for each in sections for line in _section(*each))]).rstrip("\n") + "\n"


def _section(title: str, text: str, commands: list[str]) -> Iterator[str]:
    yield from (f"## {title}", "", text, "")
    for typed in commands:
        module = COMMANDS[typed]
        names = [other for other in COMMANDS if COMMANDS[other] == module]
        yield from _command(import_module(module).main, typed, names)


def _command(command: click.Command, typed: str, names: list[str]) -> Iterator[str]:
    """Yield the lines of a command by all its names, and of the commands that it is made of."""
    context = click.Context(command, info_name=typed)
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (f"### {typed}", "", *_paragraphs(command.help or ""), "```")
    yield from (f"{PROGRAM} {name} {usage}" for name in names)
    yield from (f"python -m {name.replace(' ', '.')} {usage}" for name in names if name.split()[0] in GROUPS)
    yield from ("```", "", *_options(command, context))
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _inner(inner, f"{typed} {name}")


def _inner(command: click.Command, typed: str) -> Iterator[str]:
    context = click.Context(command, info_name=typed)
    yield from (f"#### {typed}", "", *_paragraphs(command.help or ""), *_options(command, context))


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        yield from (" ".join(paragraph.split()), "")


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    """Yield a table of the options, but for ``--help``."""
    rows = [
        record
        for option in command.params
        if isinstance(option, click.Option) and (record := option.get_help_record(context)) is not None
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
