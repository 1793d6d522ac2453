"""Options that several commands share are worded once, and runtimes are named in one table."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtimes.guard.select import ONNX_RUNTIMES, RUNTIMES
from safevlm.errors import InputError
from safevlm.terminal.options import parse_grid

ROOT = Path(__file__).parents[3]
FOLDERS = ("safevlm", "runtimes", "calibration", "quantize", "export", "benchmarks")
SHARED = {"--revision", "--tap", "--grid", "--device", "--threads", "--json"}
MODULES = ("safevlm/terminal/options.py", "runtimes/guard/options.py")
EXTRAS = "safevlm/installed/libraries.py"
"""Lists extras, some of which are called as runtimes are."""
BUILDERS = "export/tensorrt/request.py"
"""Lists builders of engines, two of which are called as runtimes are."""
PEERS = "benchmarks/speed/"
"""Measures runtimes that are not ours to judge with, such as torch.compile, and names them."""


def option_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that ``click.option`` is called with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "click.option":
            yield from (each.value for each in node.args if isinstance(each, ast.Constant))


def runtime_lists(tree: ast.AST) -> Iterator[int]:
    """Yield the lines of literal collections that name two runtimes or more."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            named = {each.value for each in node.elts if isinstance(each, ast.Constant)}
            if len(named & set(RUNTIMES)) > 1:
                yield node.lineno


@pytest.mark.parametrize("folder", FOLDERS)
def test_shared_options_and_runtimes_are_named_once(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        name, tree = str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))
        if name not in MODULES:
            again = SHARED & set(option_names(tree))
            assert not again, f"{name} words {', '.join(again)} again: take it from safevlm.terminal.options"
        if not name.startswith(PEERS) and name not in (EXTRAS, BUILDERS):
            assert not list(runtime_lists(tree)), f"{name} lists runtimes: take RUNTIMES of runtimes.guard.select"


def test_a_second_wording_and_a_second_list_are_seen() -> None:
    assert SHARED & set(option_names(ast.parse('@click.option("--grid", help="Size.")\ndef main(grid): pass')))
    assert list(runtime_lists(ast.parse('click.Choice(["auto", "openvino"])')))


def test_what_runs_onnx_files_is_a_runtime() -> None:
    assert set(ONNX_RUNTIMES) < set(RUNTIMES)


@pytest.mark.parametrize(("text", "size"), [(None, None), ("448", (448, 448)), ("448X672", (448, 672))])
def test_a_grid_is_one_side_or_two(text: str | None, size: tuple[int, int] | None) -> None:
    assert parse_grid(text) == size


@pytest.mark.parametrize("text", ["", "4y4", "448x", "1x2x3", "-448", "4.5"])
def test_another_grid_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="one side in pixels"):
        parse_grid(text)
