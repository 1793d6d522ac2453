"""Write others' answers as a run record: ``python -m benchmarks.import FILE --out RUN``.

The word is Python's own, so nothing can import this module by name: all of it is in ``benchmarks.runs.importing``.
"""

from __future__ import annotations

from benchmarks.runs.importing.command import main
from safevlm.terminal.commandline import run

if __name__ == "__main__":
    run(main)
