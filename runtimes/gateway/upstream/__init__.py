"""The language model behind a gateway: a server by its URL, or a model in this process."""

from typing import TYPE_CHECKING

from safevlm.imports.moved import old_names

if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)
