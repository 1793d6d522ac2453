"""Which suite ``--suite`` names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.suites.holisafe import HOW_TO_GET_IT, holisafe
from benchmarks.suites.holisafe_mini import PAIRS, QUESTIONS, holisafe_mini
from benchmarks.suites.suite import Suite, one_row_an_image
from safevlm.errors import InputError

__all__ = ["SUITES", "open_suite"]

SUITES = ("holisafe", "holisafe-mini", "guard", "guard-mini", "utility-mini")
"""``holisafe`` and ``guard`` read --data; ``holisafe-mini`` holds ``utility-mini``'s questions, too."""


def open_suite(
    name: str,
    data: Path | None = None,
    *,
    limit: int | None = None,
    pairs: int | None = None,
    questions: int | None = None,
) -> Suite:
    """Return a suite by name; ``pairs`` and ``questions`` are sizes of a built-in one.

    Raises InputError for a name that there is not, sizes of a suite that has its own, and what is wrong with its files.
    """
    if name not in SUITES:
        raise InputError(f"--suite {name} is unknown. Allowed: {', '.join(SUITES)}.")
    if name in ("holisafe", "guard"):
        if (pairs, questions) != (None, None):
            raise InputError(f"--suite {name} has its own size. --pairs and --questions are for built-in suites.")
        if data is None:
            raise InputError(f"--suite {name} needs --data DIR. {HOW_TO_GET_IT}")
        suite = holisafe(data)
        return (one_row_an_image(suite, "guard") if name == "guard" else suite).limited(limit)
    if data is not None:
        raise InputError(f"--suite {name} is built in and takes no --data.")
    suite = holisafe_mini(pairs=pairs or PAIRS, questions=questions or QUESTIONS)
    if name == "guard-mini":
        return one_row_an_image(suite, name).limited(limit)
    if name == "utility-mini":
        rows = tuple(row for row in suite.rows if row.kind == "question")
        return replace(suite, name=name, rows=rows).limited(limit)
    return suite.limited(limit)
