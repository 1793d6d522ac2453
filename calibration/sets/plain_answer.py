"""What an answer says, without how it is dressed: the one text that every judge and every kind is read from.

A refusal stays one with a typographic apostrophe, in bold, behind a byte order mark or in a quoted block. Plain ASCII
prose is read as it always was.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["folded", "plain_answer"]

_APOSTROPHES = "\u2018\u2019\u201b\u02b9\u02bb\u02bc\u02bd\u02c8\u2032\u2035\u00b4\u055a\ua78c\uff07\u0092"
"""Quotation marks, modifier letters, primes and accents that stand for ', and what cp1252 has for it."""
_FOLDED = str.maketrans(dict.fromkeys(_APOSTROPHES, "'"))
_MOJIBAKE = re.compile("\u00e2\u20ac[\u2122\u02dc]")
"""An apostrophe's UTF-8 that was read as cp1252."""
_INVISIBLE = {"Cf", "Cs", "Co", "Cn"}
_EMPHASIS = re.compile(r"\*+|~~|(?<!\w)_+(?=\w)|(?<=[\w.,!?;:])_+(?!\w)|`+")
_TAG = re.compile(r"</?(?:p|b|i|em|strong|u|br|div|span|blockquote|h[1-6])\s*/?>", re.IGNORECASE)
_LEADING = re.compile(r"(?:[^\w\"\u201c\u201d\u201e\u00ab\u00bb']+|\d{1,2}[.)]\s)+")
_QUOTED = re.compile('["\u201c\u201d\u201e\u00ab\u00bb](.*)["\u201c\u201d\u00ab\u00bb]', re.DOTALL)
"""An answer that stands in quotation marks as a whole; one that only begins with a quotation is left alone."""


def folded(text: str) -> str:
    """Return text with ' for every kind of apostrophe, without invisible signs; ASCII text is not changed."""
    if text.isascii():
        return text
    text = _MOJIBAKE.sub("'", text).translate(_FOLDED)
    return "".join(sign for sign in text if unicodedata.category(sign) not in _INVISIBLE and sign != "\ufffd")


def plain_answer(text: str) -> str:
    """Return the answer without markup, invisible signs and typography; ASCII prose is only stripped.

    Compatible forms (full width, ligatures, no-break spaces) become plain, HTML's and Markdown's emphasis goes
    everywhere; headings, quotes, list marks and other signs go from the beginning, quotation marks around the whole.
    """
    text = unicodedata.normalize("NFKC", folded(text))
    text = _EMPHASIS.sub("", _TAG.sub("", text))
    begin = _LEADING.match(text)
    text = text[begin.end() if begin else 0 :].strip()
    quoted = _QUOTED.fullmatch(text)
    return quoted[1].strip() if quoted else text
