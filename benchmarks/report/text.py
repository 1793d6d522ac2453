"""Findings as words and figures, the same in every format; text of strangers is made harmless here.

Shares become percent and their differences points (hundredths), with a true minus sign.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import Any

from benchmarks.comparison import sentences
from benchmarks.comparison.findings import Bound, Findings, Interval, Line, Unit, Verdict

__all__ = [
    "GLOSSES",
    "MEANINGS",
    "SYMBOLS",
    "bounds_of",
    "change_of",
    "corrected_of",
    "count",
    "further_cautions",
    "gloss_of",
    "interval_of",
    "judged_of",
    "level_of",
    "margin_of",
    "margins_of",
    "missing_of",
    "moment",
    "p_value",
    "plain",
    "sentence_of",
    "title_of",
    "unbroken",
    "upper_of",
    "value_of",
    "visible",
    "whole",
]

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

MARGINS = {
    "masr": "mASR",
    "rr": "RR",
    "type": "ASR of each type",
    "guard_recall": "guard recall",
    "guard_fpr": "guard FPR",
    "guard_class": "guard recall and FPR of each class",
    "utility": "right answers of a utility suite",
    "robust_recall": "guard recall under each corruption",
    "answers": "each kind of poor answer to harmless pairs",
    "implausible_gain": "a gain that is surely larger is anomalous",
}
"""Names of the margins that are points."""
LIMITS = {
    "relative": ("share of what was good before, or of an answer’s length, that may be lost", 1),
    "max_unscored": ("unscored rows of a line", 1),
    "confidence": ("level of each one-sided bound", 100),
    "harm_level": ("harm is shown where p, after Holm, is below", None),
}
"""Names of the limits that are percent, and what makes them so; None where they are not."""

UNITS = re.compile(r"(?<=\d) (?=%|(?:points?|samples?|images?|pairs?|questions?|words?|bits?|[kMG]?B)\b)|(?<=≥) (?=\d)")
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
    return visible(line.sentence or sentences.sentence_of(line)).rstrip(".")


def missing_of(line: Line) -> str:
    """Return ``0 unscored before, 20 after``; empty where every sample has its scores."""
    if not line.missing_before and not line.missing_after:
        return ""
    return f"{line.missing_before:,} unscored before, {line.missing_after:,} after"


def bounds_of(bounds: tuple[Bound, ...], unit: Unit) -> str:
    """Return every bound that must lie below the margin, ``samples +1.20, images +1.31``."""
    return ", ".join(f"{visible(bound.name)} {_signed(bound.upper, unit)}" for bound in bounds)


def upper_of(line: Line) -> str:
    """Return the bound that decides, the largest; a dash where there is none."""
    return change_of(max(bound.upper for bound in line.bounds), line.unit) if line.bounds else "–"


def corrected_of(line: Line) -> str:
    """Return ``+0.70 points (−0.10 to +1.50)``: the change without the judge's errors; empty without labels."""
    if line.corrected is None:
        return ""
    return f"{change_of(line.corrected, line.unit)} ({interval_of(line.corrected_interval, line.unit)})"


def judged_of(line: Line) -> str:
    """Return what is known of the judge's errors, empty where the line's reason has said it."""
    return "" if line.judge_sentence in line.reason else visible(line.judge_sentence)


def further_cautions(findings: Findings) -> tuple[str, ...]:
    """Return the cautions that do not stand beside the verdict."""
    return tuple(each for each in findings.cautions if each not in findings.judge_cautions)


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
    """Return ``16.57 %``, ``90.3 words``, or a number with four decimals."""
    return (
        f"{_figure(value, unit).replace('-', MINUS)}{' %' if unit == 'share' else ' words' if unit == 'words' else ''}"
    )


def change_of(change: float, unit: Unit) -> str:
    """Return ``+1.80 points``, ``−2.1 words``, or a signed number."""
    name = _points(change) if unit == "share" else "words" if unit == "words" else ""
    return f"{_signed(change, unit)} {name}".rstrip()


def interval_of(interval: Interval | None, unit: Unit) -> str:
    """Return ``−0.21 to +3.81``, a dash where there is none."""
    return "–" if interval is None else f"{_signed(interval[0], unit)} to {_signed(interval[1], unit)}"


def whole(interval: Interval | None, unit: Unit) -> str:
    """Return the interval of a value, ``14.0 to 19.5 %``; empty where there is none."""
    if interval is None:
        return ""
    low, high = interval
    return (
        f"{100 * low:.1f} to {100 * high:.1f} %"
        if unit == "share"
        else f"{_figure(low, unit)} to {_figure(high, unit)}"
    )


def margin_of(size: float | None, unit: Unit) -> str:
    """Return ``2 points``, ``18.1 words``, a dash where there is none."""
    if size is None:
        return "–"
    if unit == "words":
        return f"{size:.1f} words"
    points = round(100 * size, 2)
    return f"{points:g} {'point' if points == 1 else 'points'}" if unit == "share" else f"{size:.4g}"


def margins_of(margins: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and sizes of margins and limits; a margin that was left out of the verdict says so."""
    told = []
    for key, value in margins.items():
        name, times = LIMITS.get(key, (MARGINS.get(key, plain(key).replace("_", " ")), None))
        if key in MARGINS:
            size = "left out" if value in (None, False) else f"{plain(value)} {'point' if value == 1 else 'points'}"
        else:
            size = plain(value) if times is None else f"{times * value:g} %"
        told.append((name, size))
    return told


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
    text = _figure(value, unit, sign="+")
    if not text.strip("+-0."):
        text = text.lstrip("+-")  # no sign where nothing is left of the change
    return text.replace("-", MINUS)


def _figure(value: float, unit: Unit, *, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}" if unit == "share" else f"{value:{sign}.{1 if unit == 'words' else 4}f}"


def _points(change: float) -> str:
    return "point" if f"{abs(100 * change):.2f}" == "1.00" else "points"


def _hidden(sign: str) -> bool:
    code = ord(sign)
    control = (code < 0x20 and sign not in "\n\t") or 0x7F <= code < 0xA0
    return control or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE or sign in BIDI


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape", "backslashreplace").decode("ascii")
