"""Findings as words and figures, the same in every format; text of strangers is made harmless here.

Shares become percent and their differences points (hundredths), with a true minus sign.
"""

from __future__ import annotations

import datetime
import re
from typing import Any, Literal

from benchmarks.comparison.findings import Bound, Findings, Interval, Line, Verdict

__all__ = [
    "GLOSSES",
    "MEANINGS",
    "SYMBOLS",
    "bounds_of",
    "change_of",
    "count",
    "gloss_of",
    "interval_of",
    "level_of",
    "margin_of",
    "missing_of",
    "moment",
    "p_value",
    "plain",
    "sentence_of",
    "title_of",
    "unbroken",
    "value_of",
    "visible",
    "whole",
]

Unit = Literal["share", "number"]

SYMBOLS: dict[Verdict, str] = {"PASS": "✓", "REGRESSION": "✕", "INCONCLUSIVE": "?", "ANOMALOUS": "!"}
MEANINGS: dict[Verdict, str] = {
    "PASS": "Every declared margin is proven: no measure got worse by more than was declared acceptable.",
    "REGRESSION": "Harm is shown: a measure got worse by more than chance and is not shown to be within its margin.",
    "INCONCLUSIVE": "No harm is shown, but the data cannot rule out a worsening beyond a margin. This is not a pass.",
    "ANOMALOUS": "The two runs cannot be compared as they are. The figures below decide nothing until then.",
}
GLOSSES = {
    "masr": "unsafe pairs that were answered, mean of the four types",
    "asr/SSU": "safe image, safe question, unsafe together: answered",
    "asr/USU": "unsafe image, safe question: answered",
    "asr/UUU": "unsafe image, unsafe question: answered",
    "asr/SUU": "safe image, unsafe question: answered",
    "rr": "harmless pairs that were refused",
    "guard/recall": "unsafe images that the guard blocks",
    "guard/fpr": "safe images that the guard blocks",
    "guard/accuracy": "images given their right class",
    "guard/auroc": "how well p(unsafe) ranks unsafe images above safe ones",
    "guard/ece": "how far p(unsafe) is from the true share of unsafe images",
}
"""What a measure counts, by the key of its line."""

FLIPS = {
    "masr": ("newly answered", "newly refused"),
    "asr": ("newly answered", "newly refused"),
    "category": ("newly answered", "newly refused"),
    "rr": ("newly refused", "newly answered"),
    "guard/recall": ("newly missed", "newly blocked"),
    "guard/fpr": ("newly blocked", "no longer blocked"),
    "utility": ("newly wrong", "newly right"),
}
"""What a sample became that got worse or better, by the start of its line's key."""

UNITS = re.compile(r"(?<=\d) (?=%|(?:points?|samples?|images?|pairs?|questions?|bits?|[kMG]?B)\b)")
"""The space between a figure and its unit."""

BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Signs that turn the direction of the text around them: what is shown would not be what is there."""
MINUS = "\u2212"


def visible(text: str) -> str:
    r"""Return text that every format can hold: control, bidi and surrogate characters as escapes (``\x1b``).

    Line breaks are newlines; they and tabs are kept.
    """
    unbroken = text.replace("\r\n", "\n").replace("\r", "\n")
    if unbroken.isprintable():  # nearly all; what is not printable may still be meant, such as joined emoji
        return unbroken
    return "".join(_escaped(sign) if _hidden(sign) else sign for sign in unbroken)


def plain(value: Any) -> str:
    """Return any value of a record as one harmless text; nothing is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}".replace("-", MINUS)
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(each) for each in value) or "–"
    return visible(str(value)) or "–"


def title_of(line: Line) -> str:
    """Return the line's title without its judge, which has its own place."""
    return visible(line.title.removesuffix(f" ({line.judge})") if line.judge else line.title)


def gloss_of(line: Line) -> str:
    """Return what the line counts, empty where its title says it."""
    return GLOSSES.get(line.key.partition("@")[0], "")


def sentence_of(line: Line) -> str:
    """Return what happened to a line in one plain sentence, without a full stop: its own, or one from its figures."""
    if line.sentence:
        return visible(line.sentence).rstrip(".")
    size = f"{abs(100 * line.change):.2f}" if line.unit == "share" else f"{abs(line.change):.4f}"
    unit = f" {_points(line.change)}" if line.unit == "share" else ""
    moved = f"{'rose' if line.change > 0 else 'fell'} {size}{unit}" if size.strip("0.") else "did not change"
    limit = "" if line.margin is None else f" (limit {margin_of(line.margin, line.unit).partition(' ')[0]})"
    told = f"{visible(line.title)} {moved}{limit}"
    if line.worse is not None and line.better is not None:
        key = line.key.partition("@")[0]
        became = FLIPS.get(key) or FLIPS.get(key.partition("/")[0], ("worse", "better"))
        told += f": {line.worse:,} {became[0]}, {line.better:,} {became[1]}"
    missing = missing_of(line)
    return f"{told}; {missing}" if missing else told


def missing_of(line: Line) -> str:
    """Return ``0 unscored before, 20 after``; empty where every sample has its scores."""
    if not line.missing_before and not line.missing_after:
        return ""
    return f"{line.missing_before:,} unscored before, {line.missing_after:,} after"


def bounds_of(bounds: tuple[Bound, ...], unit: Unit) -> str:
    """Return every bound that must lie below the margin, ``samples +1.20, images +1.31``."""
    return ", ".join(f"{visible(bound.name)} {_signed(bound.upper, unit)}" for bound in bounds)


def level_of(findings: Findings) -> str:
    """Return at what level the verdict holds, and the seed of what was drawn."""
    return (
        f"PASS by one-sided {100 * findings.confidence:g} % bounds, REGRESSION from p < {findings.harm_level:g} "
        f"after Holm’s correction, seed {findings.seed}"
    )


def unbroken(words: str) -> str:
    """Return text in which no figure is parted from its unit at the end of a line."""
    return UNITS.sub("\u00a0", words)


def value_of(value: float, unit: Unit) -> str:
    """Return ``16.57 %``, or a number with four decimals."""
    return f"{100 * value:.2f} %" if unit == "share" else f"{value:.4f}".replace("-", MINUS)


def change_of(change: float, unit: Unit) -> str:
    """Return ``+1.80 points``, or a signed number."""
    return f"{_signed(change, unit)} {_points(change)}" if unit == "share" else _signed(change, unit)


def interval_of(interval: Interval | None, unit: Unit) -> str:
    """Return ``−0.21 to +3.81``, a dash where there is none."""
    return "–" if interval is None else f"{_signed(interval[0], unit)} to {_signed(interval[1], unit)}"


def whole(interval: Interval | None, unit: Unit) -> str:
    """Return the interval of a value, ``14.0 to 19.5 %``; empty where there is none."""
    if interval is None:
        return ""
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f} %" if unit == "share" else f"{low:.4f} to {high:.4f}"


def margin_of(size: float | None, unit: Unit) -> str:
    """Return ``2 points``, a dash where there is none."""
    if size is None:
        return "–"
    points = round(100 * size, 2)
    return f"{points:g} {'point' if points == 1 else 'points'}" if unit == "share" else f"{size:.4g}"


def moment(when: str) -> str:
    """Return ``2026-11-25 03:24 UTC`` of an ISO date; any other text stays what it is."""
    try:
        date = datetime.datetime.fromisoformat(when.replace("Z", "+00:00"))
    except ValueError:
        return visible(when) or "–"
    return f"{date:%Y-%m-%d %H:%M} {date.tzname() or ''}".rstrip()


def p_value(p: float | None) -> str:
    """Return ``0.032``, ``< 0.0001``, a dash where there is none."""
    if p is None:
        return "–"
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def count(number: int | None, one: str = "", many: str = "") -> str:
    """Return ``4,031``, or ``1 sample`` and ``2 samples``; a dash where there is none."""
    if number is None:
        return "–"
    word = (one if number == 1 else many or f"{one}s") if one else ""
    return f"{number:,} {word}".rstrip()


def _signed(value: float, unit: Unit) -> str:
    text = f"{100 * value:+.2f}" if unit == "share" else f"{value:+.4f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")  # no sign where nothing is left of the change
    return text.replace("-", MINUS)


def _points(change: float) -> str:
    return "point" if f"{abs(100 * change):.2f}" == "1.00" else "points"


def _hidden(sign: str) -> bool:
    code = ord(sign)
    control = (code < 0x20 and sign not in "\n\t") or 0x7F <= code < 0xA0
    return control or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE or sign in BIDI


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape", "backslashreplace").decode("ascii")
