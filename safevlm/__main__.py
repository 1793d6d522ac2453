"""The command ``safevlm``, and ``python -m safevlm``, which is the same: all of our commands, found in any folder."""

from __future__ import annotations

import sys
from typing import NoReturn

from safevlm.errors import InputError
from safevlm.imports.siblings import put_ours_first

__all__ = ["main"]


def main() -> NoReturn:
    """Run the program; our packages are found before those of the same names in the folder it is run in."""
    put_ours_first()
    try:
        from safevlm.terminal.commandline import run
        from safevlm.terminal.commands import program
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        print("error: the package 'click' is not installed: pip install safevlm-edge", file=sys.stderr)  # noqa: T201
        sys.exit(InputError.exit_code)
    run(program())


if __name__ == "__main__":
    main()
