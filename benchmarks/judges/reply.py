"""Reading a judge's reply: strictly, because a guess would be a score that nobody gave."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["parse_reply"]

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)
_WORDS = {"true": True, "false": False}


def parse_reply(text: str) -> bool | None:
    """Return what a judge said, None for anything that is not exactly one of:

    - ``{"result": true}`` or ``{"result": false}``, one key and no other, the value also as the word in quotes;
    - the bare word, in any case;
    - either of them alone in a Markdown code fence, white space around it.
    """
    said = text.strip()
    fenced = _FENCE.fullmatch(said)
    if fenced is not None:
        said = fenced[1].strip()
    if said.lower() in _WORDS:
        return _WORDS[said.lower()]
    try:
        found = json.loads(said, object_pairs_hook=list)  # a list of pairs: a repeated key must not vanish
    except (ValueError, RecursionError):
        return None
    return _value(found) if said.startswith("{") else None


def _value(pairs: Any) -> bool | None:
    if len(pairs) != 1 or pairs[0][0] != "result":
        return None
    value = pairs[0][1]
    if isinstance(value, bool):
        return value
    return _WORDS.get(value.strip().lower()) if isinstance(value, str) else None
