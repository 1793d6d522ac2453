"""What takes long goes to a thread; what is short is done at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["json_thread", "off_loop"]

SHORT = 64 * 1024
"""Bytes that are read in less than a millisecond."""
_threads = ThreadPoolExecutor(2, "gateway json")
"""Threads of their own, and few: reading JSON holds the interpreter's lock, which the event loop needs, too."""
T = TypeVar("T")


async def json_thread(work: Callable[[], T]) -> T:
    """Read or write JSON in a thread, after what others read and write."""
    return await asyncio.get_running_loop().run_in_executor(_threads, work)


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Do work on ``size`` bytes of JSON: at once where they are few, otherwise in a thread."""
    return work() if size <= SHORT else await json_thread(work)
