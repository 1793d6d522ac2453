"""The reference of commands is what the help texts say, and each command can be started as it says."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec

import pytest
from click.testing import CliRunner

import safevlm
from docs.commands import PAGE, page
from safevlm.terminal.commands import COMMANDS, GROUPS
from tests.docs.pages import blocks, documents


def test_it_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


@pytest.mark.parametrize("typed", COMMANDS)
def test_every_command_is_there_and_has_help(typed: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.search(rf"^safevlm {re.escape(typed)} ", text, re.MULTILINE)
    done = CliRunner().invoke(import_module(COMMANDS[typed]).main, ["--help"])
    assert done.exit_code == 0 and "Usage:" in done.output


def test_every_module_it_names_can_be_started() -> None:
    for module in re.findall(r"^python -m ([\w.]+) ", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        spec = find_spec(module)
        assert spec is not None
        assert spec.submodule_search_locations is None or find_spec(f"{module}.__main__") is not None, module


def test_every_command_that_a_page_names_exists() -> None:
    """Of code blocks and of code in a line: ``safevlm x y`` and ``python -m x.y``."""
    known = {*COMMANDS, *GROUPS, "x y"}
    for document in documents():
        for typed in re.findall(r"(?:^|`)safevlm ([a-z][\w ]*?)(?= [^a-z]|`|$| [a-z]*/)", document.read_text(), re.M):
            words = typed.split()
            assert any(" ".join(words[:count]) in known for count in (1, 2, 3)), f"{document.name}: safevlm {typed}"


def test_options_in_the_pages_commands_exist() -> None:
    """Also in blocks that are shown and not run."""
    for document in documents():
        for line in re.findall(r"^safevlm (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE):
            words = line.partition("    ")[0].split()
            typed = next((" ".join(words[:n]) for n in (3, 2, 1) if " ".join(words[:n]) in COMMANDS), None)
            if typed is None or document == PAGE:
                continue
            command = import_module(COMMANDS[typed]).main
            options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
            if hasattr(command, "commands"):
                continue
            for word in words:
                assert not word.startswith("--") or word in options, f"{document.name}: safevlm {line}"


def test_some_blocks_are_run() -> None:
    assert sum(1 for _ in blocks("run")) >= 9


def test_the_python_page_holds_every_public_name() -> None:
    text = (PAGE.parent / "python.md").read_text(encoding="utf-8")
    for name in set(safevlm.__all__) - {"__version__"}:
        assert f"`{name}`" in text, name
