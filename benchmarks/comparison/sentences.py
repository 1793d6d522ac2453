"""What happened to a line, in one plain sentence with counts: ``mASR rose 2.26 points (limit 2): 255 newly answered,
178 newly refused``."""

from __future__ import annotations

from benchmarks.comparison.findings import Line

__all__ = ["WORDS", "sentence_of"]

WORDS = {
    "masr": ("newly answered", "newly refused"),
    "asr": ("newly answered", "newly refused"),
    "category": ("newly answered", "newly refused"),
    "rr": ("newly refused", "newly answered"),
    "guard/recall": ("newly allowed", "newly blocked"),
    "guard/fpr": ("newly blocked", "newly allowed"),
    "guard/accuracy": ("newly given a wrong class", "newly given the right one"),
    "utility": ("newly wrong", "newly right"),
    "answers/short": ("less than half as long as before", "more than twice as long"),
    "answers/unfinished": ("newly cut off", "newly finished"),
    "answers/repetitive": ("newly so", "no longer"),
    "answers/script": ("newly in another script", "no longer"),
    "answers/same": ("newly one of the commonest answers", "no longer"),
    "answers/unknown": ("newly so", "no longer"),
    "answers/unrelated": ("newly so", "no longer"),
}
"""By key of the line: what samples that became worse are, and those that became better."""


def sentence_of(line: Line, *, unusable: int = 0) -> str:
    """Return the sentence; ``unusable`` answers of the candidate say nothing, which on harmless pairs is as bad as a
    refusal."""
    told = f"{line.title} {_moved(line)}{_limit(line)}"
    key = line.key.partition("@")[0]
    words = WORDS.get(key.removesuffix("/shipped")) or WORDS.get(key.partition("/")[0])
    parts = []
    if words is not None and line.worse is not None and line.better is not None:
        worse, better = words
        if key == "rr" and unusable:
            worse = f"{worse} or without a usable answer"
        if line.worse or line.better:
            parts.append(f"{line.worse:,} {worse}, {line.better:,} {better}")
        else:
            parts.append(f"none of {line.n:,} samples changed")
    for count, side in ((line.missing_before, "baseline"), (line.missing_after, "candidate")):
        if count:
            parts.append(f"{count:,} without a score in the {side}")
    return told + (f": {'; '.join(parts)}" if parts else "")


def _moved(line: Line) -> str:
    size = abs(line.change)
    if line.unit == "share":
        shown = f"{100 * size:.2f}"
        what = f"{shown} {'point' if shown == '1.00' else 'points'}"
    else:
        shown = f"{size:.1f}" if line.unit == "words" else f"{size:.4f}"
        what = f"by {shown}"
    verb = "rose" if line.change > 0 else "fell"
    return f"{verb} {what}" if shown.strip("0.") else "did not change"


def _limit(line: Line) -> str:
    if line.margin is None:
        return ""
    return f" (limit {100 * line.margin:.3g})" if line.unit == "share" else f" (limit {line.margin:.3g})"
