"""Import paths of 0.1: every one works, says so, and gives the very same things."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from safevlm.imports.moved import MOVED

ROOT = Path(__file__).parents[3]
PACKAGES_NOW = sorted(old for old, homes in MOVED.items() if homes[0].startswith(f"{old}."))
MODULES = sorted(set(MOVED) - set(PACKAGES_NOW))


def public(module: str) -> dict[str, object]:
    found = import_module(module)
    return {name: getattr(found, name) for name in getattr(found, "__all__", ())}


@pytest.mark.parametrize("old", MODULES)
def test_a_module_that_moved_gives_the_same_things(old: str) -> None:
    for name in [each for each in sys.modules if f"{each}.".startswith(f"{old}.")]:
        del sys.modules[name]
    parent = old.rpartition(".")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a parent that moved, too
        import_module(parent)
    with pytest.warns(DeprecationWarning) as warned:
        module = import_module(old)
    (warning,) = warned
    for home in MOVED[old]:
        assert home in str(warning.message) and f"{old} is now" in str(warning.message)
        for name, found in public(home).items():
            assert getattr(module, name) is found, name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize("old", PACKAGES_NOW)
def test_a_module_that_is_a_package_now_gives_the_same_things(old: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        package = import_module(old)
    for home in MOVED[old]:
        for name, found in public(home).items():
            with pytest.warns(DeprecationWarning, match=rf"{old}\.{name} is now {old}\.\w+\.{name};"):
                assert getattr(package, name) is found
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


def test_no_old_path_hides_what_is_there_today() -> None:
    for old in MODULES:
        assert not (ROOT / f"{old.replace('.', '/')}.py").exists(), old


def test_the_warning_stands_at_the_line_that_imports() -> None:
    sys.modules.pop("runtimes.judge", None)
    with pytest.warns(DeprecationWarning, match=r"runtimes\.judge is now runtimes\.guard\.judge") as warned:
        from runtimes.judge import Guard  # type: ignore[import-not-found]
    assert [each.filename for each in warned] == [__file__]
    from runtimes.guard.judge import Guard as Now

    assert Guard is Now
    with pytest.warns(DeprecationWarning) as warned:
        from runtimes.gate import Gate  # type: ignore[attr-defined]
    assert {each.filename for each in warned} == {__file__}
    assert Gate is import_module("runtimes.gate.gate").Gate


def test_models_has_no_old_path() -> None:
    assert not any(old.split(".")[0] == "models" for old in MOVED)
