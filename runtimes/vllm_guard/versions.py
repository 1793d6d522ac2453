"""Which versions of vLLM the connector is for: it reads their KV cache, whose layout is no promise of theirs."""

from __future__ import annotations

import re
from importlib.util import find_spec

from safevlm.errors import InputError

__all__ = ["TESTED", "api_problem", "require_tested", "version_problem"]

TESTED = ("0.32",)
"""Series whose verdicts were compared with the torch path's."""
API = (
    "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "vllm.model_executor.models.extract_hidden_states",
    "vllm.v1.kv_cache_interface",
)
"""Modules that the connector stands on."""


def version_problem(version: str) -> str | None:
    """Say why a version of vLLM is not one that the connector was tried with; None where it is."""
    matched = re.match(r"(\d+)\.(\d+)(?:\.|$|[^\d])", version)
    series = f"{matched[1]}.{matched[2]}" if matched else ""
    if series in TESTED:
        return None
    tested = ", ".join(TESTED)
    oldest = tuple(map(int, TESTED[0].split(".")))
    if matched and (int(matched[1]), int(matched[2])) < oldest:
        return f"vLLM {version} is too old for the guard's connector. Install vLLM {tested}."
    return (
        f"the guard's connector was not tested with vLLM {version or '(unknown version)'}. Install vLLM {tested}, or "
        "give --allow-untested-vllm after comparing its verdicts."
    )


def api_problem() -> str | None:
    """Say which module that the connector stands on this environment's vLLM lacks; None where it has all."""
    for module in API:
        try:
            found = find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"this vLLM has no {module}, which the guard's connector needs. Install vLLM {', '.join(TESTED)}."
    return None


def require_tested(version: str, *, allow_untested: bool) -> None:
    """Raise InputError for a vLLM that lacks the connector API, or whose verdicts nobody compared."""
    problem = api_problem() or (None if allow_untested else version_problem(version))
    if problem is not None:
        raise InputError(problem)
