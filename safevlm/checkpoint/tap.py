"""Where a guard's features come from, and how that was learned.

Projector output and last hidden state have the same width, so no shape can tell the tap: it is an explicit,
recorded property of every checkpoint and bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safevlm.checkpoint.family import HEAD_PREFIX, Family, TapSource
from safevlm.checkpoint.tap_source import find_head_calls
from safevlm.errors import GuardHeadError, InputError
from safevlm.files.regular_file import read_regular

__all__ = ["CONFIG_KEY", "MAX_SOURCE_BYTES", "MAX_SOURCE_FILES", "Tap", "find_tap"]

CONFIG_KEY = "safety_tap"
SOURCES: tuple[TapSource, ...] = get_args(TapSource)
POOLINGS = ("mean",)
TOKENS = ("image",)
MAX_SOURCE_BYTES = 500_000
"""Twice the largest modelling file of transformers; parsing hostile text of that size ends in seconds."""
MAX_SOURCE_FILES = 32


@dataclass(frozen=True, kw_only=True)
class Tap:
    """The guard head's input: which activations, which tokens of them, pooled how, and how this is known.

    Only the mean over the image tokens is known of any Safe-VLM checkpoint; anything else is refused.
    """

    source: TapSource
    pooling: str = "mean"
    tokens: str = "image"
    learned: Literal["declared", "detected", "verified", "default"]
    evidence: str = ""
    """One sentence for people: the config key, the file and line, or the family's default."""

    def __post_init__(self) -> None:
        for what, value, allowed in (
            ("source", self.source, SOURCES),
            ("pooling", self.pooling, POOLINGS),
            ("tokens", self.tokens, TOKENS),
        ):
            if value not in allowed:
                raise GuardHeadError(
                    f"the guard's tap has the unknown {what} {value!r}. Allowed: {', '.join(allowed)}. Correct "
                    f"'{CONFIG_KEY}' in config.json, or leave it out."
                )


def find_tap(family: Family, config: Mapping[str, Any], folder: Path, declared: TapSource | None = None) -> Tap:
    """Return the tap that the caller, the config, the checkpoint's own code or the family says, in that order.

    Code is read as text, never imported; code that contradicts itself or cannot be followed decides nothing.
    Raises InputError for a source that does not exist; GuardHeadError for a config entry that is not a tap.
    """
    if declared is not None:
        if declared not in SOURCES:
            raise InputError(f"tap {declared!r} does not exist; allowed: {', '.join(SOURCES)}.")
        return Tap(source=declared, learned="declared", evidence="declared by the caller")
    if config.get(CONFIG_KEY) is not None:
        return _declared_in_config(config[CONFIG_KEY])
    detected, why = _detect(folder)
    if detected is not None:
        return Tap(source=detected, learned="detected", evidence=why)
    return Tap(
        source=family.default_tap,
        learned="default",
        evidence=f"the default of {family.title}: config.json has no '{CONFIG_KEY}', and {why}",
    )


def _declared_in_config(value: Any) -> Tap:
    """Read ``"projector"`` or ``{"source": "projector", "pooling": "mean", "tokens": "image"}``."""
    given = {"source": value} if isinstance(value, str) else value
    known = {"source", "pooling", "tokens"}
    if not isinstance(given, dict) or "source" not in given or not given.keys() <= known:
        raise GuardHeadError(
            f"config.json: '{CONFIG_KEY}' is {value!r}. Allowed: one of {', '.join(SOURCES)}, or an object with "
            "'source' and, optionally, 'pooling' and 'tokens'. Correct it, or leave it out."
        )
    return Tap(**given, learned="declared", evidence=f"'{CONFIG_KEY}' in config.json")


def _detect(folder: Path) -> tuple[TapSource | None, str]:
    """Return the source that every call of the head in the folder's Python files agrees on, and a sentence."""
    clear: dict[TapSource, str] = {}
    unclear: list[str] = []
    sources = [*sorted(folder.glob("*.py")), *sorted(folder.glob("*/*.py"))]
    for path in sources[:MAX_SOURCE_FILES]:
        where = path.relative_to(folder).as_posix()
        text = _text(path)
        if HEAD_PREFIX.rstrip(".") not in text:
            continue
        try:
            calls = find_head_calls(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            unclear.append(f"{where} cannot be followed")
            continue
        for call in calls:
            at = f"{where}:{call.line}"
            matched = next((source for source in SOURCES if source == call.source), None)
            if matched is None:
                unclear.append(f"it is unclear what {at} feeds to the guard head")
            else:
                clear.setdefault(matched, at)
    if len(clear) == 1 and not unclear:
        ((source, at),) = clear.items()
        return source, f"{at} feeds the guard head from the {source.replace('_', ' ')}"
    if len(clear) > 1:
        told = " and ".join(f"{at} from the {source.replace('_', ' ')}" for source, at in clear.items())
        return None, f"the checkpoint's own code contradicts itself ({told})"
    return None, unclear[0] if unclear else "no Python file of the checkpoint calls its guard head"


def _text(path: Path) -> str:
    """Return a file as text, or nothing when it is too large to be a model's code or cannot be read."""
    try:
        return read_regular(path, MAX_SOURCE_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
