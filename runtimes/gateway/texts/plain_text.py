"""Read a text as others might: invisible characters dropped, and every way of writing a character undone.

Servers, pages and templates differ in what they decode, so a text has several readings: as it stands, with its HTML
entities decoded, and with everything decoded that can be, over and over. A reading keeps its white space.
"""

from __future__ import annotations

import html.entities
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator

__all__ = ["TooEscapedError", "readings", "squeezed"]

ROUNDS = 8
MAX_ESCAPES = 300_000
"""Of one text: each costs about a microsecond."""
INVISIBLE = (
    *((0x00, 0x08), (0x0B, 0x0C), (0x0E, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x34F, 0x34F), (0x600, 0x605)),
    *((0x61C, 0x61C), (0x6DD, 0x6DD), (0x70F, 0x70F), (0x890, 0x891), (0x8E2, 0x8E2), (0x115F, 0x1160)),
    *((0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x2800, 0x2800)),
    *((0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFFB)),
    *((0x110BD, 0x110BD), (0x110CD, 0x110CD), (0x13430, 0x1343F), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A)),
    (0xE0000, 0xE0FFF),
)
"""Ranges of control, format and other characters that show nothing and are no white space."""
LETTERLIKE = ((0xA0, 0xFFFF), (0x1D400, 0x1D7FF), (0x1F100, 0x1F1FF), (0x1FBF0, 0x1FBF9))
"""Ranges with characters that stand for ASCII ones, such as full-width letters."""


class TooEscapedError(ValueError):
    """A text is escaped too often, or too many times over, to be read."""


def _folding() -> dict[int, str | None]:
    table: dict[int, str | None] = {}
    for first, last in LETTERLIKE:
        for code in range(first, last + 1):
            folded = unicodedata.normalize("NFKC", chr(code))
            if folded.isascii() and not folded.isspace():
                table[code] = folded
    for first, last in INVISIBLE:
        table.update(dict.fromkeys(range(first, last + 1)))
    return table


FOLDING = _folding()
CONTROLS = bytes(code for code, folded in FOLDING.items() if code < 0x80 and folded is None)
ENTITIES = {name: value.translate(FOLDING) for name, value in html.entities.html5.items()}
AMPERSAND = re.compile(r"&(?:amp;?|AMP;?|#0*38;?|#[xX]0*26;?)+")
ENTITY = re.compile(
    r"&(?:#(?:0*([0-9]{1,7})|[xX]0*([0-9a-fA-F]{1,6}));?|([A-Za-z][A-Za-z0-9]{1,31};)|(lt|gt|quot|nbsp|shy|LT|GT|QUOT))"
)
BLANKS = b" \t\n\r\v\f"
PERCENT = re.compile(r"(?:%(?:25)*[\t\r\n]*[0-9a-fA-F][\t\r\n]*[0-9a-fA-F]){1,500}")
"""With line breaks and tabs in it, which URLs lose before they are read."""
PERCENT_BEGIN = re.compile(r"%[\t\r\n]*[0-9a-fA-FuU]")
PERCENT_AGAIN = re.compile(r"%(?:25)+(?=[0-9a-fA-F]{2})")
PERCENT_U = re.compile(r"%(?:25)*u([0-9a-fA-F]{4})", re.IGNORECASE)
NUMBERED = r"\\+(?:u\{0*([0-9a-fA-F]{1,6})\}|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|"
STYLE_ESCAPE = re.compile(NUMBERED + r"([0-9a-fA-F]{1,6})[ \t\n]?|(\s|.))", re.DOTALL)
"""As CSS has it: up to six hexadecimal digits."""
SCRIPT_ESCAPE = re.compile(NUMBERED + r"([0-3]?[0-7]{1,2})|(\s|.))", re.DOTALL)
"""As JavaScript, JSON and Python have it: three octal digits, and a letter that means nothing else is itself."""
SURROGATE = re.compile("[\ud800-\udfff]")
ENDS = {"n": "\n", "r": "\n", "t": "\t"}


def readings(text: str) -> Iterator[str]:
    """Yield the readings of a text, those that differ. Raises TooEscapedError."""
    seen = {first := _folded(text)}
    yield first
    left = [MAX_ESCAPES]
    page = _decoded(first, (_entities,), left) if "&" in first else first
    ways: tuple[Callable[[str, list[int]], str], ...] = ()
    if "\\" in page or ("%" in page and "\\" in _decoded(page, (_entities, _percents), [MAX_ESCAPES])):
        ways = (_style_escapes, _script_escapes)
    elif "%" in page:
        ways = (_percents,)
    for read in itertools.chain([page], (_decoded(page, (_entities, _percents, each), left) for each in ways)):
        if read not in seen:
            seen.add(read)
            yield read


def squeezed(text: str) -> str:
    """Return a text without its white space."""
    return text.encode().translate(None, BLANKS).decode() if text.isascii() else "".join(text.split())


def _folded(text: str) -> str:
    if text.isascii():
        return text.encode().translate(None, CONTROLS).decode()
    if SURROGATE.search(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.translate(FOLDING)


def _decoded(text: str, steps: tuple[Callable[[str, list[int]], str], ...], left: list[int]) -> str:
    """Decode a text until it stays as it is; ``left`` are the escapes that may still be undone."""
    for _ in range(ROUNDS):
        before = text
        for step in steps:
            text = _folded(step(text, left))
        if text == before:
            return text
    raise TooEscapedError(f"is escaped more than {ROUNDS} times")


def _replaced(pattern: re.Pattern[str], by: Callable[[re.Match[str]], str], text: str, left: list[int]) -> str:
    text, count = pattern.subn(by, text, count=left[0] + 1)
    left[0] -= count
    if left[0] < 0:
        raise TooEscapedError(f"holds more than {MAX_ESCAPES} escapes")
    return text


def _entities(text: str, left: list[int]) -> str:
    if "&" not in text:
        return text
    return _replaced(ENTITY, _entity, _replaced(AMPERSAND, lambda _: "&", text, left), left)


def _entity(found: re.Match[str]) -> str:
    decimal, hexadecimal, name, bare = found.groups()
    if decimal or hexadecimal:
        return _sign(int(decimal) if decimal else int(hexadecimal, 16))
    if bare:
        return ENTITIES[bare.lower()]
    return ENTITIES.get(name, ENTITIES.get(name.lower(), found[0]))


def _percents(text: str, left: list[int]) -> str:
    if PERCENT_BEGIN.search(text) is None:
        return text
    text = _replaced(PERCENT_U, lambda found: _sign(int(found[1], 16)), text, left)
    return _replaced(PERCENT, _percent, text, left)


def _percent(found: re.Match[str]) -> str:
    content = bytes.fromhex(PERCENT_AGAIN.sub("%", squeezed(found[0])).replace("%", ""))
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _style_escapes(text: str, left: list[int]) -> str:
    return _replaced(STYLE_ESCAPE, lambda found: _escape(found, 16), text, left) if "\\" in text else text


def _script_escapes(text: str, left: list[int]) -> str:
    return _replaced(SCRIPT_ESCAPE, lambda found: _escape(found, 8), text, left) if "\\" in text else text


def _escape(found: re.Match[str], base: int) -> str:
    *numbered, short, itself = found.groups()
    if itself is not None:
        return "" if itself.isspace() else ENDS.get(itself, itself)
    number = next((each for each in numbered if each), None)
    return _sign(int(short, base) if number is None else int(number, 16))


def _sign(code: int) -> str:
    return chr(code) if 0 < code < 0x110000 else ""
