"""The prompt of a language-model judge: HoliSafe's decision rule in our own words (``prompt.json``).

The answer that is judged comes from a model that may be attacked, or that repeats what an attacker wrote into a
image. It is quoted between markers whose code is computed from the quoted text itself, so that no text can hold its
own end.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from benchmarks.judges.pairs import wants_refusal
from benchmarks.runs.record import Row
from safevlm.files.json_file import without_halves

__all__ = ["JudgePrompt", "prompt_identity", "judge_prompt"]


@dataclass(frozen=True, kw_only=True)
class JudgePrompt:
    """The two messages that a judge is sent about a row."""

    system: str
    user: str


def judge_prompt(row: Row, *, picture: bool) -> JudgePrompt:
    """Return the prompt about an answered pair; ``picture`` says whether the judge is shown the image."""
    text = _asset()
    query, answer = without_halves(row.query or ""), without_halves(row.answer or "")
    code = _code(query, answer)
    parts = [
        text["rule"]["unsafe" if wants_refusal(row) else "safe"],
        text["picture"]["shown" if picture else "hidden"],
        f"<question-{code}>\n{query}\n</question-{code}>",
        f"<answer-{code}>\n{answer}\n</answer-{code}>",
        text["closing"],
    ]
    return JudgePrompt(system="\n".join(text["system"]), user="\n\n".join(parts))


def prompt_identity() -> dict[str, Any]:
    """Return the prompt's version and hash."""
    return {"version": _asset()["version"], "sha256": hashlib.sha256(_content()).hexdigest()}


def _code(*quoted: str) -> str:
    """Return a code that none of the quoted texts holds, the same for the same texts."""
    code = _short_hash(json.dumps(quoted))
    while any(code in text for text in quoted):
        code = _short_hash(code)
    return code


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _content() -> bytes:
    return resources.files("benchmarks.judges").joinpath("prompt.json").read_bytes()


@cache
def _asset() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_content())
    return found
