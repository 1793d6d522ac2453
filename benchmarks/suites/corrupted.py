"""A guard suite that also has each of its images under corruptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.suites.suite import Suite
from calibration.labelled.corruptions import Corruption
from safevlm.errors import InputError

__all__ = ["corrupted"]


def corrupted(suite: Suite, corruptions: Sequence[Corruption]) -> Suite:
    """Return a guard suite with its rows and, for each corruption, the same rows under it, ``IMAGE+jpeg:50``.

    Its name says which, in whatever order they were given: ``guard+blur:1.5+jpeg:50``.

    Raises InputError for a suite with rows for the language model.
    """
    if not corruptions:
        return suite
    if any(row.kind != "image" for row in suite.rows):
        raise InputError(f"--under is for the guard's suites, guard and guard-mini, not {suite.name}. Leave it out.")
    names = sorted(map(str, corruptions))
    under = [row.model_copy(update={"id": f"{row.id}+{name}", "under": name}) for name in names for row in suite.rows]
    return replace(suite, name="+".join((suite.name, *names)), rows=(*suite.rows, *under))
