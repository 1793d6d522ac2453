"""API keys out of the environment, or out of a file."""

from __future__ import annotations

import os
import re

from safevlm.errors import InputError

__all__ = ["checked_key", "read_key"]

VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,99}")
"""Names of variables that are surely not keys."""


def read_key(variable: str, *, needed: bool) -> str | None:
    """Return the key in an environment variable, None where there is none and none is ``needed``.

    Raises InputError, without the key, when it is needed and missing, or could not be sent in a header. A name that
    does not look like one is not repeated, either: somebody may have given the key itself.
    """
    key = os.environ.get(variable, "").strip()
    plain = VARIABLE.fullmatch(variable) is not None
    named = f"the environment variable {variable}" if plain else "the environment variable that was named"
    if not key:
        if needed:
            advice = (
                "set it to the API key"
                if plain
                else "give the name of the variable that holds the key, not the key itself"
            )
            raise InputError(f"{named} is not set, or empty: {advice}.")
        return None
    return checked_key(key, named)


def checked_key(key: str, where: str) -> str:
    """Return a key that can be sent in a header. Raises InputError, without it; ``where`` it came from."""
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"{where} holds spaces, several lines or other characters that an API key cannot have.")
    return key
