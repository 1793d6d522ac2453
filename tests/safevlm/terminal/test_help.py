"""Help texts stand alone: every option has one, in the project's words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module

import click
import pytest

from safevlm.terminal.commands import COMMANDS

FRAGMENT = re.compile(r"(?:Of|For|In|At|So|Most|Which|What|Where|May|A|The) ")
"""Beginnings that lean on the option's name. "A" and "The" begin sentences about something else."""
WORDS = re.compile(r"\b(?:pictures?|go(?:es)? on|told|tells?|there is none|else)\b", re.IGNORECASE)
ENOUGH = 130


def commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from commands(inner)


@pytest.mark.parametrize("module", sorted(set(COMMANDS.values())))
def test_every_help_text_stands_alone(module: str) -> None:
    for command in commands(import_module(module).main):
        assert command.help and not WORDS.search(command.help), command.name
        for option in command.params:
            if isinstance(option, click.Option):
                text = (option.help or "").partition("  [default")[0]
                assert re.fullmatch(r"[A-Z].*\.", text, re.DOTALL), f"{option.opts}: {text!r}"
                assert not FRAGMENT.match(text) and not WORDS.search(text), f"{option.opts}: {text!r}"
                assert len(text) <= ENOUGH or text.count(", ") >= 5, f"{option.opts}: {text!r}"


def test_the_rule_can_fail() -> None:
    assert FRAGMENT.match("Of the bootstrap.") and WORDS.search("Pictures to judge.")
