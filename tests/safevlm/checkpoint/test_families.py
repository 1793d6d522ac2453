"""What differs between families stands in their tables, and nothing else asks which family a checkpoint is of."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.gguf.families import GGUF_FAMILIES
from export.guard.trunks import TRUNKS
from safevlm.checkpoint.architectures import ARCHITECTURES
from safevlm.checkpoint.families import FAMILIES

ROOT = Path(__file__).parents[3]
FOLDERS = ("safevlm", "runtimes", "calibration", "quantize", "export", "benchmarks")
TABLES = (
    "safevlm/checkpoint/families/",
    "safevlm/checkpoint/architectures/",
    "export/gguf/families/",
    "export/guard/trunks.py",
    "benchmarks/shapes/configs.py",
    "benchmarks/tiny/blueprints.py",
    "benchmarks/real/packages.py",
    "runtimes/vllm_guard/head.py",
)
"""Where a family's key, or a class of its own, may be named."""
CLASSES = {architecture.config_class.__name__ for architecture in ARCHITECTURES.values()}


def asked(source: str) -> Iterator[int]:
    """Yield the lines that ask for a family by name: by its key, or by its config's class."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                if isinstance(side, ast.Attribute) and side.attr == "key" and "family" in ast.unparse(side.value):
                    yield node.lineno
        named = node.value if isinstance(node, ast.Constant) else node.id if isinstance(node, ast.Name) else None
        if isinstance(named, str) and named in {*FAMILIES, *CLASSES}:
            yield getattr(node, "lineno", 0)


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_but_the_tables_asks_for_a_family(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        name = str(path.relative_to(ROOT))
        lines = [] if name.startswith(TABLES) else list(asked(path.read_text(encoding="utf-8")))
        assert not lines, f"{name}:{lines[0]} asks for one family: say what differs in a field of its table instead"


@pytest.mark.parametrize(
    "line",
    [
        "if checkpoint.family.key == 'gemma3': pass",
        "if family.key in KEYS: pass",
        "if guard.family.key != other: pass",
        "grid = {'qwen2_5_vl': 448}.get(name)",
        "if blueprint.family == 'llava': pass",
        "if isinstance(config, LlavaConfig): pass",
    ],
)
def test_each_way_of_asking_is_seen(line: str) -> None:
    assert list(asked(line))


def test_every_family_has_its_tables() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES) == set(TRUNKS) >= set(GGUF_FAMILIES)
    assert all(key == family.key for key, family in FAMILIES.items())
    classes = [architecture.config_class for architecture in ARCHITECTURES.values()]
    assert len(set(classes)) == len(classes), "architecture_of tells families by their config's class"
