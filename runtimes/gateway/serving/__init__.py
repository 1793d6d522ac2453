"""The server around the routes: connections, limits, clients, logs, metrics."""

from typing import TYPE_CHECKING

from safevlm.imports.moved import old_names

if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)
