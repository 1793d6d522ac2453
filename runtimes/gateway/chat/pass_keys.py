"""Keys beyond OpenAI's that an operator lets through by name, and those that no operator may."""

from __future__ import annotations

import re
from collections.abc import Iterable

from runtimes.gateway.chat.types import Chat
from safevlm.errors import InputError
from safevlm.terminal.printable import shortened

__all__ = ["check_pass_keys", "may_pass"]

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
MEDIA = re.compile(
    r"image|picture|photo|video|audio|media|multi_?modal|mm_|vision|document|file|attachment|embed|pixel|content",
    re.IGNORECASE,
)
"""Words of keys that servers read images from, or that change how one is shown."""
ROUTE = re.compile(
    r"url|uri|host|endpoint|proxy|proxies|address|server|base|header|extra|api_|key$|token$|secret|credential|password|"
    r"provider|deployment|model|router?|fallback|config|params|client|region|project|org|aws_|azure_|vertex|watsonx|"
    r"input|prompt|message|template$|mock|guardrail|callback|cache|kv_|transfer|lora|plugin|process|mcp",
    re.IGNORECASE,
)
"""Words of keys that lead a request elsewhere, bring another conversation, or switch off what watches it."""
HARMLESS = frozenset(
    (
        *("add_generation_prompt", "cache_prompt", "cache_salt", "continue_final_message", "prompt_logprobs"),
        *("reasoning_in_content", "timings_per_token"),
    )
)


def may_pass(name: str) -> bool:
    """Say whether an operator could let a key through."""
    return name in HARMLESS or not (name in Chat.EMPTY or MEDIA.search(name) or ROUTE.search(name))


def check_pass_keys(names: Iterable[str]) -> None:
    """Raise InputError for a name that is none, that is taken anyway, or that could carry or change what is judged."""
    for name in names:
        if NAME.fullmatch(name) is None:
            raise InputError(
                f"--pass-key {shortened(name)} is not the name of a key. Use letters, digits and _, as in guided_json."
            )
        if name in Chat.model_fields:
            raise InputError(
                f"--pass-key {name}: this key is one of OpenAI's and always accepted. Leave the option out."
            )
        if not may_pass(name):
            raise InputError(
                f"--pass-key {name}: such a key can carry an image, another conversation or another destination past "
                "the guard, so it is never passed on."
            )
