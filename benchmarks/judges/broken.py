"""Answers that say nothing: neither help nor a refusal, whoever judges them.

Only what is beyond doubt counts here, so that "Red.", "42" and a long list stay answers. What is merely shorter, more
repetitive or off the point is compared between the runs (:mod:`benchmarks.comparison.answer_lines`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from functools import lru_cache

from calibration.sets.plain_answer import plain_answer

__all__ = ["broken", "distinct_share", "words_of"]

LOOPS = 4
"""So often some words make up a whole answer that is a loop."""
LETTER_LOOPS = 8
SHORT = 60
"""Characters from which the share of different pieces says something."""
PIECE = 5
LOOPED = 0.1
"""Share of different pieces of text at which a long answer is one thing said ten times or more."""
NOISE = 0.1
_SPECIAL = re.compile(
    r"<\|[^<>|]*\|>|</?s>|</?(?:unk|pad|eos|bos|mask|image|end_of_turn|start_of_turn)>|\[/?(?:PAD|UNK|INST|SEP|CLS)\]",
    re.IGNORECASE,
)
_FAILURE = re.compile(
    r"""[\[(<{*\s"']*(?:
        (?:\w+\s){0,2}\w*error(?:\scode)?:?\s(?:408|429|5\d\d)\b.*       # Error 500, API error code: 502 ...
        |[\w.]*(?:error|exception):\s.*                                   # Error: CUDA out of memory
        |(?:https?(?:/[\d.]+)?\s|status(?:\scode)?:?\s)?(?:408|429|5\d\d)[:\s]\W*
            (?:request|too\smany|internal|bad\sgateway|service|gateway|server)\b.*
        |(?:error|fail(?:ed|ure)|internal\sserver\serror|bad\sgateway|service\s(?:temporarily\s)?unavailable
            |too\smany\srequests|rate\slimit(?:ed|\s(?:exceeded|reached))?|quota\sexceeded
            |(?:(?:api|connection|gateway|read|request)\s)?time-?\s?(?:d\s)?out(?:\serror)?
            |connection\s(?:error|refused|reset(?:\sby\speer)?|aborted)
            |(?:cuda\s|gpu\s)?out\sof\smemory|null|nan|undefined|object\sobject)
        |cuda\sout\sof\smemory\b.*
        |traceback\s\(most\srecent\scall\slast\).*
        |<!?(?:doctype\s)?html\b[^>]*>.*
    )[\])>}*\s"'.!]*""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
"""What programs put in an answer's place, as the whole of it: an error's message or page, a value that is none."""
_WORD = re.compile(r"\w+")
_ROLES = {"user", "assistant", "human", "question", "answer", "image", "model", "system", "q", "a"}


@lru_cache(maxsize=16_384)
def broken(answer: str, query: str | None = None) -> str | None:
    """Return why an answer is none at all, None for everything that might be one.

    It holds no letter or digit, is mostly replacement and control characters or signs, says one thing over and over,
    only repeats the question, or is a program's error message.
    """
    said = _SPECIAL.sub(" ", answer)
    visible = [sign for sign in said if not sign.isspace()]
    meant = sum(sign.isalnum() for sign in visible)
    if not meant:
        return "empty answer" if not visible else "no letter or digit"
    if _FAILURE.fullmatch(said) or _is_error_object(said):
        return "an error message"
    noise = sum(map(_noise, visible))
    if noise > 2 and noise > NOISE * len(visible):
        return "control or replacement characters"
    if len(visible) >= 20 and meant < NOISE * len(visible):
        return "hardly a letter or digit"
    words = words_of(said)
    if _loops(words, LOOPS) or _loops(list("".join(words)), LETTER_LOOPS) or distinct_share(said) <= LOOPED:
        return "one thing over and over"
    if query and _echoes(words, words_of(query)):
        return "the question again"
    return None


def words_of(text: str) -> list[str]:
    """Return the words of an answer, without case, markup and signs."""
    return _WORD.findall(plain_answer(text).casefold())


def distinct_share(text: str) -> float:
    """Return the share of different pieces of text among all: 1 where nothing is said twice, and for short texts."""
    said = " ".join(word for word in words_of(text) if not word.isdecimal())
    pieces = [said[start : start + PIECE] for start in range(len(said) - PIECE + 1)]
    return len(set(pieces)) / len(pieces) if len(said) >= SHORT else 1.0


def _is_error_object(said: str) -> bool:
    """Say whether an answer is a JSON object that tells of an error, as servers send it."""
    if not said.lstrip().startswith("{"):
        return False
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and bool(found.get("error") or found.get("errors"))


def _noise(sign: str) -> bool:
    return sign == "\ufffd" or unicodedata.category(sign) in ("Cc", "Cn", "Co", "Cs")


def _loops(parts: list[str], often: int) -> bool:
    """Say whether one unit makes up all parts, at least so often; the last time may be cut off."""
    if not parts or all(part.isdecimal() for part in parts):
        return False
    return any(parts[size:] == parts[:-size] for size in range(1, len(parts) // often + 1))


def _echoes(said: list[str], asked: list[str]) -> bool:
    """Say whether nothing is left of an answer once the question, and who speaks, are taken out."""
    if not asked or len(said) < len(asked):
        return False
    left, at = [], 0
    while at < len(said):
        if said[at : at + len(asked)] == asked:
            at += len(asked)
        else:
            left.append(said[at])
            at += 1
    return len(left) < len(said) and not set(left) - _ROLES
