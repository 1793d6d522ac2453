"""The machine: its name, cores and memory, memory that ran out in words, and when and how long something ran."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safevlm.errors import InputError, SafeVLMError

__all__ = [
    "available_memory",
    "core_count",
    "cpu_flags",
    "free_on_gpu",
    "machine_name",
    "memory_advice",
    "memory_problem",
    "now",
    "peak_rss",
    "return_freed_memory",
    "times_ms",
    "trim_memory",
]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h."""
LARGE_BYTES = 4 * 2**20
ON_GPU = re.compile(
    r"CUDA out of memory|CUDA (error|driver error|failure \d+): out of memory|cudaErrorMemoryAllocation|"
    r"CUDA_ERROR_OUT_OF_MEMORY|(CUBLAS|CUSOLVER|CUDNN)_STATUS_ALLOC_FAILED|Failed to allocate memory for requested "
    r"buffer",
    re.IGNORECASE,
)
ON_CPU = re.compile(r"DefaultCPUAllocator: (can't|not enough|cannot)|bad_alloc|Cannot allocate memory", re.IGNORECASE)
WANTED = re.compile(r"tried to allocate ([\d.]+ [KMGT]?i?B)", re.IGNORECASE)


def core_count() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_name() -> str:
    """Return the processor's name and the cores that this process may use: ``AMD EPYC, 2 cores``."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {core_count()} cores"


def cpu_flags() -> frozenset[str]:
    """Return what the processor can do, as ``/proc/cpuinfo`` names it (``avx512_bf16``); elsewhere nothing is known."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def now() -> str:
    """Return this moment as records and manifests state it: UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def peak_rss() -> int:
    """Return the most memory, in bytes, that this process has held at once since its start or :func:`restart_peak`.

    Linux: ``VmHWM`` of ``/proc/self/status`` (proc(5)), because ``ru_maxrss`` of a new process begins at its
    parent's peak. It counts code, libraries, weights, activations and the mapped pages of files.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """Return the bytes that this machine, and this process's control group, could give now without swapping.

    Linux: ``MemAvailable`` of ``/proc/meminfo`` (proc(5)) and ``memory.max``; elsewhere all memory of the machine.
    """
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                found = int(line.split()[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text(encoding="utf-8").strip().isdigit():
        found = min(found, int(limit.read_text(encoding="utf-8")))
    return found


def free_on_gpu(free: int, total: int, *, integrated: bool) -> int:
    """Return how many bytes a GPU could give now, of which CUDA calls ``free``.

    An integrated GPU, a Jetson's, has the machine's memory: ``cudaMemGetInfo`` leaves out what the system keeps in it
    for files and would give back (CUDA for Tegra, "Memory Management").
    """
    return min(total, max(free, available_memory())) if integrated else free


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


def trim_memory() -> None:
    """Give the memory of small objects that were freed back to the system, where the C library can (malloc_trim(3))."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def times_ms(call: Callable[[], object], *, most: int, seconds: float, least: int = 1) -> list[float]:
    """Return how long each run took, in milliseconds: ``least`` to ``most`` runs, none begun after ``seconds``."""
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < least or (len(times) < most and time.perf_counter() - started < seconds):
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) * 1000)
    return times


def return_freed_memory() -> bool:
    """Let large blocks go back to the system as soon as they are freed, for the rest of this process (mallopt(3)).

    By itself glibc keeps freed blocks of up to 32 MiB in its heap, where tensors of many sizes leave holes: a fifth of
    the peak when a model of width 1024 is quantized. Returns whether the C library has such a switch.
    """
    switch = getattr(ctypes.CDLL(None), "mallopt", None)
    if switch is None:  # another C library, which has ways of its own
        return False
    return bool(switch(M_MMAP_THRESHOLD, LARGE_BYTES)) and bool(switch(M_TRIM_THRESHOLD, LARGE_BYTES))
