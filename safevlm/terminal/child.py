"""Our modules as child processes: ``python -m safevlm.terminal.child MODULE ARGUMENT…``.

It does what ``python -m MODULE ARGUMENT…`` does, but finds our packages before those of the same names in the folder
that it is run in.
"""

from __future__ import annotations

import runpy
import sys

from safevlm.imports.siblings import put_ours_first

__all__ = ["module_arguments"]


def module_arguments(module: str, *arguments: object) -> list[str]:
    """Return what to give to a Python that is to run one of our modules."""
    return ["-m", "safevlm.terminal.child", module, *map(str, arguments)]


if __name__ == "__main__":
    put_ours_first()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
