"""llama.cpp's C bindings as llama-cpp-python has them, and what they log."""

from __future__ import annotations

import ctypes
import logging
from importlib import import_module
from typing import Any

from models.errors import MissingExtraError

__all__ = ["last_error", "llama_libraries"]

_log = logging.getLogger(__name__)


def llama_libraries() -> tuple[Any, Any]:
    """Return the modules ``llama_cpp.llama_cpp`` and ``llama_cpp.mtmd_cpp``, silent but for errors, which are logged.

    Errors: MissingExtraError.
    """
    try:
        llama, mtmd = import_module("llama_cpp.llama_cpp"), import_module("llama_cpp.mtmd_cpp")
    except ImportError as error:
        raise MissingExtraError("llama-cpp-python", "gguf", "running GGUF files") from error
    if not _Quiet.callbacks:
        said = llama.llama_log_callback(_Quiet.say)
        _Quiet.callbacks.append(said)  # C holds no reference
        for module, name in ((llama, "llama_log_set"), (mtmd, "mtmd_log_set"), (mtmd, "mtmd_helper_log_set")):
            getattr(module, name)(said, ctypes.c_void_p(0))
        llama.llama_backend_init()
    return llama, mtmd


def last_error() -> str:
    """Return what llama.cpp last said went wrong."""
    return _Quiet.last_error or "no reason was given"


class _Quiet:
    """llama.cpp's log: errors are kept for the next message, the rest goes to ours at debug level."""

    callbacks: list[Any] = []  # noqa: RUF012  # one for the process, as llama.cpp has one log
    last_error = ""

    @staticmethod
    def say(level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level == 3 and line:  # GGML_LOG_LEVEL_ERROR
            _Quiet.last_error = line
        if line:
            _log.debug("llama.cpp: %s", line)
