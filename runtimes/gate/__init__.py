"""The gate: an image passes the guard before a language model answers about it."""

from typing import TYPE_CHECKING

from safevlm.imports.moved import old_names

if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)
