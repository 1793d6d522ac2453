"""Memory that ran out, of a GPU or of the machine, in words; light: no library is loaded for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from safevlm.errors import InputError, SafeVLMError

__all__ = ["memory_advice", "memory_problem"]

ON_GPU = re.compile(
    r"CUDA out of memory|CUDA (error|driver error|failure \d+): out of memory|cudaErrorMemoryAllocation|"
    r"CUDA_ERROR_OUT_OF_MEMORY|(CUBLAS|CUSOLVER|CUDNN)_STATUS_ALLOC_FAILED|Failed to allocate memory for requested "
    r"buffer",
    re.IGNORECASE,
)
ON_CPU = re.compile(r"DefaultCPUAllocator: (can't|not enough|cannot)|bad_alloc|Cannot allocate memory", re.IGNORECASE)
WANTED = re.compile(r"tried to allocate ([\d.]+ [KMGT]?i?B)", re.IGNORECASE)


def memory_problem(error: BaseException) -> str | None:
    """Return what an exception says of memory that ran out, in one sentence; None where it says something else.

    torch's ``OutOfMemoryError`` is a RuntimeError, and what its libraries or the CPU's allocator raise is nothing more.
    """
    text = str(error)
    if isinstance(error, MemoryError) or ON_CPU.search(text):
        return "There is not enough memory for this."
    if type(error).__name__ == "OutOfMemoryError" or ON_GPU.search(text):
        wanted = WANTED.search(text)
        return f"The GPU's memory is full{f': {wanted[1]} more were needed' if wanted else ''}."
    return None


@contextmanager
def memory_advice(advice: str, kind: type[SafeVLMError] = InputError) -> Iterator[None]:
    """Turn memory that ran out into an error of ours that ends with ``advice``; nothing else is caught."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        problem = memory_problem(error)
        if problem is None:
            raise
        raise kind(f"{problem} {advice}") from error
