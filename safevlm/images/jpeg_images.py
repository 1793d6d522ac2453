"""The images behind the first one of a JPEG file: an MPO's, a phone's gain map or preview, or one that was appended.

Found by their bytes and not by the file's index (CIPA DC-007), which may leave some out or be damaged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["has_more_scans", "images_behind"]

START = b"\xff\xd8\xff"
END = b"\xff\xd9"
PADDING = 1 << 16
"""Zero bytes that may lie between two images."""
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""Any but those within a scan: a stuffed zero, a restart."""
WITHOUT_LENGTH = re.compile(rb"\xff[\x01\xd0-\xd8]")


def images_behind(content: bytes, *, indexed: bool) -> Iterator[bytes]:
    """Yield the bytes from each further image on, in order.

    Behind the first image's scans, an image begins wherever its marker follows the end of another; in a file with an
    index, wherever its marker is. What is yielded need be no image then.
    """
    at = content.find(START, _scans(content))
    while at >= 0:
        before = content[max(0, at - PADDING) : at].rstrip(b"\0")
        if indexed or before.endswith(END):
            yield content[at:]
        at = content.find(START, at + 2)


def has_more_scans(content: bytes, most: int) -> bool:
    """Say whether the first image of a JPEG has more scans than that, by the markers that a decoder would follow."""
    at = scans = 0
    while scans <= most and (found := MARKER.search(content, at)) is not None:
        marker, at = found[0], found.end()
        if marker == END:
            return False
        scans += marker == b"\xff\xda"
        if not WITHOUT_LENGTH.match(marker):
            at += int.from_bytes(content[at : at + 2], "big")
    return scans > most


def _scans(content: bytes) -> int:
    """Return where the first image's header ends; thumbnails lie before it, in segments of their own."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        if content[at + 1] == 0xDA:
            return at
        if content[at + 1] == 0xFF:  # fill bytes
            at += 1
        elif WITHOUT_LENGTH.match(content, at):
            at += 2
        else:
            at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return len(content)
