"""The names of the library: which they are, where they come from, what they load."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import safevlm
from tests.test_imports import HEAVY, ROOT

NAMES = {
    "BundleError", "Bundle", "BusyError", "Checkpoint", "CheckpointError", "EngineUnavailableError", "Finding", "Gate",
    "GateResult", "Guard", "HubError", "ImageFileError", "ImageSource", "InputError", "Judgement", "Manifest",
    "MissingExtraError", "Policy", "Preprocessing", "QuestionError", "SafeVLMError", "Thresholds", "Verdict",
    "__version__", "open_bundle", "open_checkpoint", "open_gate", "open_image", "read_policy",
}  # fmt: skip
"""What users import: a name that goes or changes its meaning breaks their programs."""


def test_the_names_are_these_each_documented() -> None:
    assert set(safevlm.__all__) == NAMES and len(NAMES) <= 30
    assert set(dir(safevlm)) >= NAMES
    assert safevlm.__doc__ is not None
    for name in NAMES - {"__version__"}:
        found = getattr(safevlm, name)
        assert f"``{name}``" in safevlm.__doc__, f"{name} is not in the docstring of safevlm"
        assert found is getattr(safevlm, name)
        if isinstance(found, type) or name.islower():
            assert found.__doc__, f"{name} has no docstring"


def test_type_checkers_are_told_the_same_as_the_table_says() -> None:
    tree = ast.parse(Path(safevlm.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(told) == NAMES - {"__version__"}
    for name, module in told.items():
        assert module is not None and getattr(import_module(module), name) is getattr(safevlm, name)


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import safevlm", {"numpy", "pydantic", "click", "PIL", "runtimes"}),
        ("from safevlm import Guard", {"huggingface_hub"}),
        ("from safevlm import *", set()),
    ],
)
def test_nothing_is_loaded_before_it_is_asked_for(code: str, loaded: set[str]) -> None:
    code = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    assert not set(done.stdout.split()) & (HEAVY | loaded)


def test_a_name_that_there_is_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Gaurd'"):
        getattr(safevlm, "Gaurd")  # noqa: B009
