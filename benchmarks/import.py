"""Write others' answers as a run record: ``python -m benchmarks.import FILE --out RUN``.

The word is Python's own, so nothing can import this module by name: all of it is in ``benchmarks.importing``.
"""

from __future__ import annotations

from benchmarks.importing.command import main
from models.commandline import run

if __name__ == "__main__":
    run(main)
