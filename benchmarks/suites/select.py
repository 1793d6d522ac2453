"""Which suite ``--suite`` names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.suites.holisafe import HOW_TO_GET_IT, holisafe
from benchmarks.suites.holisafe_mini import holisafe_mini
from benchmarks.suites.suite import Suite, one_row_an_image
from safevlm.errors import InputError

__all__ = ["SUITES", "open_suite"]

SUITES = ("holisafe", "holisafe-mini", "guard", "guard-mini", "utility-mini")
"""``holisafe`` and ``guard`` read --data; ``holisafe-mini`` holds ``utility-mini``'s questions, too."""


def open_suite(name: str, data: Path | None = None, *, limit: int | None = None) -> Suite:
    """Return a suite by name. Raises InputError for a name that there is not, and those of its files."""
    if name not in SUITES:
        raise InputError(f"--suite {name} is unknown. Allowed: {', '.join(SUITES)}.")
    if name in ("holisafe", "guard"):
        if data is None:
            raise InputError(f"--suite {name} needs --data DIR. {HOW_TO_GET_IT}")
        suite = holisafe(data)
        return (one_row_an_image(suite, "guard") if name == "guard" else suite).limited(limit)
    if data is not None:
        raise InputError(f"--suite {name} is built in and takes no --data.")
    suite = holisafe_mini()
    if name == "guard-mini":
        return one_row_an_image(suite, name).limited(limit)
    if name == "utility-mini":
        rows = tuple(row for row in suite.rows if row.kind == "question")
        return replace(suite, name=name, rows=rows).limited(limit)
    return suite.limited(limit)
