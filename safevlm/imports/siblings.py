"""Our packages beside a project's own of the same names: ``export`` and ``benchmarks`` are names that many have.

In a project's folder ``python -m`` and scripts find that project's packages first. Each of our packages therefore
checks on its import that the ones it builds on are ours, and says which folder hides one that is not. The ``safevlm``
command puts ours first, so it works everywhere.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from safevlm.errors import HiddenPackageError
from safevlm.imports.moved import accept_old_paths
from safevlm.terminal.printable import printable

__all__ = ["PACKAGES", "ROOT", "hiding", "join", "put_ours_first", "require_ours"]

ROOT = Path(__file__).resolve().parents[2]
"""The folder that our packages stand in: of a checkout, or where packages are installed."""
PACKAGES = ("runtimes", "calibration", "quantize", "export", "benchmarks")
"""Each builds on ``safevlm`` and on those before it."""


def join(package: str) -> None:
    """Say that one of our packages is imported: those it builds on have to be ours, and its old paths work.

    Raises what :func:`require_ours` does.
    """
    for needed in PACKAGES[: PACKAGES.index(package)]:
        require_ours(needed, package)
    accept_old_paths(ROOT)


def require_ours(needed: str, package: str) -> None:
    """Check that a package is ours, which another one of ours, ``package``, is about to import.

    Raises HiddenPackageError where another package of the same name is found. Where ``python -m`` looks for a
    command, the message is printed and the process ends with 2, as commands do.
    """
    found = _place(needed)
    if found is None or found.parent == ROOT:
        return
    hidden = f"{found} hides the package '{needed}' of Safe-VLM Edge, which '{package}' needs."
    if sys.argv[:1] != ["-m"]:
        command = f", or run the command instead: safevlm {package} …" if package in PACKAGES else "."
        raise HiddenPackageError(f"{hidden} Rename it{command}")
    module = next((word for word in sys.orig_argv if word == package or word.startswith(f"{package}.")), package)
    words = ["safevlm", *module.split("."), *sys.argv[1:]]
    print(f"error: {printable(hidden)} Run instead: {printable(shlex.join(words))}", file=sys.stderr)  # noqa: T201
    raise SystemExit(HiddenPackageError.exit_code)


def hiding(package: str, folder: Path) -> Path | None:
    """Return what ``python -m`` in a folder finds in place of one of our packages, None where it finds ours."""
    found = _of(PathFinder.find_spec(package, [str(folder), *sys.path]))
    return None if found is None or found.parent == ROOT else found


def put_ours_first() -> None:
    """Let our packages' names mean ours in this process, whatever stands first on the path."""
    if not any(isinstance(finder, _OursFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OursFirst())


class _OursFirst:
    """A finder that knows our packages alone, and only where they stand."""

    @staticmethod
    def find_spec(
        name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in PACKAGES:
            return None
        spec = PathFinder.find_spec(name, [str(ROOT)])
        if _of(spec) is None:
            raise ModuleNotFoundError(f"No module named '{name}' beside safevlm", name=name)
        return spec


def _place(package: str) -> Path | None:
    module = sys.modules.get(package)
    return _of(find_spec(package) if module is None else module.__spec__)


def _of(spec: ModuleSpec | None) -> Path | None:
    """Return the folder of a package, or the file of a module; None for neither, such as a folder without code."""
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    origin = Path(spec.origin).resolve()
    return origin.parent if origin.name.startswith("__init__.") else origin
