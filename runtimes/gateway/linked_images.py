"""Images that a text names by an address: in Markdown, HTML, CSS and some other markup.

An address that others can fetch has a scheme or a host; ``cat.png`` has none, and is no image to a server.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["has_linked_image"]

MAX_LINKS = 2_000
"""Addresses of one text that are looked at; a text with more is taken for one with an image."""
NEAR = 2_000
"""Characters in which a link's or a tag's beginning is looked for."""


def _loose(word: str) -> str:
    return r"\s*".join(word)


SCHEME = "|".join(map(_loose, ("https", "http", "ftps", "ftp")))
ADDRESS = (
    rf"(?:(?:{SCHEME})\s*:[\s/\\]*[\w\[%]|{_loose('file')}\s*:\s*[/\\]|{_loose('filesystem')}\s*:\s*http|"
    rf"{_loose('blob')}\s*:\s*(?:http|null|[0-9a-f-]{{8}})|[/\\][/\\]\s*[\w\[%])"
)
"""A scheme or two slashes, and the beginning of a host; browsers take backslashes and line breaks, too."""
INLINE = re.compile(rf"\]\s*\(\s*(?:<\s*)?{ADDRESS}", re.IGNORECASE)
"""No two runs of white space may stand beside each other: that takes n² steps, in which nothing else runs."""
DEFINED = re.compile(rf"\[([^\[\]\n]{{1,999}})\]:\s*(?:<\s*)?{ADDRESS}", re.IGNORECASE)
REFERRING = re.compile(r"\]\s?\[([^\[\]]{1,999})\]")
SHORT_REFERRING = re.compile(r"!\[([^\[\]]{0,999})\]")
ATTRIBUTE = re.compile(
    rf"(?:src|poster|background|data|href|code|lowsrc|dynsrc|data-src|icon)\s*=\s*(?:[\"']\s*)?{ADDRESS}", re.IGNORECASE
)
SET = re.compile(r"srcset\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^>]*)", re.IGNORECASE)
TAG = re.compile(
    r"<(?:\w+:)?(?:img|image|picture|source|input|video|object|embed|iframe|frame|use|feimage|link|body|table|t[dhr]|applet|"
    r"amp-img|portal|base)\b(?:=\s*(?:\"[^\"]*\"|'[^']*')|[^>])*",
    re.IGNORECASE,
)
"""With all that stands in it, however long: to the ``>`` that stands in no quoted value."""
STYLE = re.compile(
    rf"(?<![\w-])(?:url|image|(?:-webkit-)?image-set|src)\s*\(\s*(?:[\"']\s*)?(?={ADDRESS})([^\s\"')]*)", re.IGNORECASE
)
NO_IMAGE = (".css", ".woff", ".woff2", ".ttf", ".otf", ".eot")
OTHER_MARKUP = {
    "![[": re.compile(rf"!\[\[\s*{ADDRESS}", re.IGNORECASE),
    "[[": re.compile(rf"\[\[(?:file|image):\s*{ADDRESS}", re.IGNORECASE),
    "[img": re.compile(rf"\[img[^\[\]]{{0,200}}\]\s*{ADDRESS}", re.IGNORECASE),
    "image:": re.compile(rf"image::?\s*{ADDRESS}", re.IGNORECASE),
    "figure:": re.compile(rf"figure::?\s*{ADDRESS}", re.IGNORECASE),
    "includegraphics": re.compile(rf"includegraphics[^{{]{{0,200}}{{\s*{ADDRESS}", re.IGNORECASE),
}
"""Wikis, BBCode, reStructuredText, AsciiDoc and LaTeX, by a word that each has."""
AN_ADDRESS = re.compile(ADDRESS, re.IGNORECASE)


def has_linked_image(text: str) -> bool:
    """Say whether a text shows an image that is to be fetched from elsewhere."""
    if ":" not in text and "//" not in text and "\\\\" not in text:
        return False
    return any(
        found for look in (_inline, _by_reference, _in_tags, _in_sets, _in_styles, _otherwise) for found in look(text)
    )


def _looked_at(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str] | None]:
    """Yield the places of a pattern, and None in the end where there are too many."""
    for number, found in enumerate(pattern.finditer(text)):
        if number == MAX_LINKS:
            yield None
            return
        yield found


def _inline(text: str) -> Iterator[bool]:
    """``![what](address)``: of the brackets before the address, the one that fits says whether it is an image."""
    if "![" not in text:
        return
    for found in _looked_at(INLINE, text):
        if found is None:
            yield True
            return
        before = text[max(0, found.start() - NEAR) : found.start()]
        yield _opened_by_image(before)


def _opened_by_image(before: str) -> bool:
    depth = 0
    for place in range(len(before) - 1, -1, -1):
        if before[place] == "]":
            depth += 1
        elif before[place] == "[":
            if depth == 0:
                return before[place - 1 : place] == "!"
            depth -= 1
    return "![" in before or len(before) == NEAR


def _by_reference(text: str) -> Iterator[bool]:
    """``![what][label]``, and ``[label]: address`` elsewhere."""
    if "![" not in text:
        return
    labels = set()
    for found in _looked_at(DEFINED, text):
        if found is None:
            yield True
            return
        labels.add(_label(found[1]))
    if labels:
        for image in SHORT_REFERRING.finditer(text):
            yield _label(image[1]) in labels
        for found in _looked_at(REFERRING, text):
            if found is None:
                yield True
            elif _label(found[1]) in labels:
                yield _opened_by_image(text[max(0, found.start() - NEAR) : found.start()])


def _label(words: str) -> str:
    return " ".join(words.split()).casefold()


def _in_tags(text: str) -> Iterator[bool]:
    """``<img src="address">`` and other elements that show one."""
    for tag in TAG.finditer(text):
        yield ATTRIBUTE.search(tag[0]) is not None


def _in_sets(text: str) -> Iterator[bool]:
    """``srcset="a.png 1x, address 2x"``, in a tag of any name."""
    for found in SET.finditer(text):
        yield AN_ADDRESS.search(found[0]) is not None


def _otherwise(text: str) -> Iterator[bool]:
    lower = text.lower()
    for word, pattern in OTHER_MARKUP.items():
        yield word in lower and pattern.search(text) is not None


def _in_styles(text: str) -> Iterator[bool]:
    lower = text.lower()
    if "(" not in text or not any(word in lower for word in ("url", "image", "src")):
        return
    for found in _looked_at(STYLE, text):
        yield found is None or not found[1].partition("?")[0].partition("#")[0].lower().endswith(NO_IMAGE)
