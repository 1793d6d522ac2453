"""Speed, size and memory, measured beside peers."""

from typing import TYPE_CHECKING

from safevlm.imports.moved import old_names

if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)
