"""API keys out of the environment."""

from __future__ import annotations

import os

from safevlm.errors import InputError

__all__ = ["read_key"]


def read_key(variable: str, *, needed: bool) -> str | None:
    """Return the key in an environment variable, None where there is none and none is ``needed``.

    Errors: InputError, without the key, when it is needed and missing, or could not be sent in a header.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        if needed:
            raise InputError(f"the environment variable {variable} is not set, or empty: it should hold the API key.")
        return None
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"the environment variable {variable} holds spaces or other characters that no API key has.")
    return key
