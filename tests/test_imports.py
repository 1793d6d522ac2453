"""Who may import whom, and what a device must not load."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "safevlm": set(),
    "calibration": {"safevlm", "runtimes"},  # thresholds are fitted through the runner that will judge
    "quantize": {"safevlm", "calibration"},
    "runtimes": {"safevlm"},
    "export": {"safevlm", "calibration", "quantize", "runtimes"},
    "benchmarks": {"safevlm", "calibration", "quantize", "runtimes", "export"},
}
FREE_FILES = {"safevlm/errors.py", "safevlm/machine.py", "safevlm/version.py"}
"""Modules at the top of a folder that are no command: every subject stands on them."""
NAMED_IN_TYPES_ALONE = {"safevlm/__init__.py": {"runtimes"}}
"""The one exception: ``safevlm`` hands on names of ``runtimes``, which it imports, by text, when they are asked for."""
HEAVY = {"torch", "transformers", "onnx", "scipy", "huggingface_hub"}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_nothing_imports_upwards(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        named = NAMED_IN_TYPES_ALONE.get(str(path.relative_to(ROOT)), set())
        forbidden = imported(path) & set(MAY_IMPORT) - MAY_IMPORT[folder] - {folder} - named
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def modules(root: Path, folders: Iterable[str]) -> dict[str, Path]:
    """Return every module below ``folders`` by its dotted name; a package has its folder's."""
    paths = {
        path.relative_to(root).with_suffix(""): path for folder in folders for path in (root / folder).rglob("*.py")
    }
    return {".".join(part for part in name.parts if part != "__init__"): path for name, path in paths.items()}


def named(path: Path, package: str) -> Iterator[tuple[str, str]]:
    """Yield each import wherever it stands, in functions and under TYPE_CHECKING too: the module, the name in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            yield from ((source, alias.name) for alias in node.names)


def circle(root: Path, folders: Iterable[str]) -> list[str]:
    """Return modules that import each other in a ring, the first one again at the end; none: an empty list."""
    known = modules(root, folders)
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = {(f"{source}.{attribute}", source) for source, attribute in named(path, package)}
        graph[name] = {next((module for module in pair if module in known), name) for pair in found} - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    assert not circle(ROOT, MAY_IMPORT)


def test_no_command_is_imported_by_another_module() -> None:
    """``python -m runtimes.gate`` would run it a second time, under another name, so that two of each class existed."""
    for name, path in modules(ROOT, MAY_IMPORT).items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        twice = [pair for pair in named(path, package) if "__main__" in (*pair[0].split("."), pair[1])]
        assert not twice, f"{name} imports {twice}"


@pytest.mark.parametrize(
    "back",
    [
        "from toy.one import first",
        "from toy import one",
        "import toy.one",
        "from . import one",
        "def late():\n    from toy.one import first",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy.one import first",
    ],
)
def test_a_circle_is_found_wherever_the_import_stands(tmp_path: Path, back: str) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").write_text("")
    (tmp_path / "toy" / "one.py").write_text("from toy.two import second\nfirst = second\n")
    (tmp_path / "toy" / "two.py").write_text("import sys\nsecond = sys\n")
    assert circle(tmp_path, ["toy"]) == []
    (tmp_path / "toy" / "two.py").write_text(f"{back}\n")
    assert set(circle(tmp_path, ["toy"])) == {"toy.one", "toy.two"}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_at_the_top_stand_commands_and_subjects_alone(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        name = str(path.relative_to(ROOT))
        command = 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
        assert command or path.name == "__init__.py" or name in FREE_FILES, f"{name} belongs into a subject's folder"


@pytest.mark.parametrize(
    "module",
    [
        "safevlm.__main__",
        "safevlm.doctor",
        "runtimes.guard.judge",
        "runtimes.check",
        "runtimes.gate",
        "runtimes.gate.__main__",
        "runtimes.language.torch_language",
        "runtimes.guard.openvino_runner",
        "runtimes.language.llamacpp_language",
        "runtimes.chat",
        "runtimes.gateway.app",
        "safevlm.images.image",
        "safevlm.contract.preprocessing",
        "safevlm.contract.manifest",
        "export.trt",
    ],
)
def test_a_device_loads_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print(*sorted(name for name in sys.modules if '.' not in name))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    assert not set(done.stdout.split()) & HEAVY


def test_modules_stay_small_enough_to_read() -> None:
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*.py"):
            lines = path.read_text(encoding="utf-8").count("\n")
            assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines: it asks to be two modules"
