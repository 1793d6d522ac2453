"""What a guard's classes may be called: names that people read in verdicts, logs and terminals."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from safevlm.terminal.printable import is_plain, shortened

__all__ = ["MAX_CLASSES", "MAX_LENGTH", "class_names_problem", "safe_index"]

MAX_CLASSES = 1_000
MAX_LENGTH = 100


def class_names_problem(names: Sequence[str]) -> str | None:
    """Say what is wrong with the names of a guard's classes; None when nothing is.

    Two names that look alike (by case, width or composition) are one name to whoever reads a label or a policy.
    """
    if len(names) > MAX_CLASSES:
        return f"{len(names):,} classes; at most {MAX_CLASSES:,} are allowed"
    seen: dict[str, str] = {}
    for name in names:
        if not 0 < len(name) <= MAX_LENGTH or not is_plain(name) or name != name.strip():
            return (
                f"the class name '{shortened(name)}': 1 to {MAX_LENGTH} visible characters are allowed, without "
                "blanks at either end"
            )
        key = unicodedata.normalize("NFKC", name).casefold()
        if key in seen:
            return f"a name appears twice: {seen[key]}, {name}"
        seen[key] = name
    return None


def safe_index(classes: Sequence[str]) -> int:
    """Return which class is the safe one: ``safe`` by name, otherwise the first."""
    return classes.index("safe") if "safe" in classes else 0
