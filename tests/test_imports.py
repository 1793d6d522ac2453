"""Who may import whom, and what a device must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
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
