"""What NVIDIA's driver says of the GPUs that this process may use; no library but the driver's own is needed."""

from __future__ import annotations

import ctypes
from typing import Any

from safevlm.errors import InputError

__all__ = ["gpu_names"]

DRIVER = "libcuda.so.1"
NO_GPU = (34, 100)
"""cuda.h: CUDA_ERROR_STUB_LIBRARY (a library to link with, and no driver), CUDA_ERROR_NO_DEVICE."""
NAME_BYTES = 256


def gpu_names() -> tuple[str, ...]:
    """Return the names of the GPUs in the driver's order; empty without a driver or a GPU, or where all are hidden.

    Raises InputError where there is a driver that does not work: whether there is a GPU is then unknown.
    """
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return ()
    code = driver.cuInit(0)
    if code in NO_GPU:
        return ()
    _check(code, "cuInit")
    count = ctypes.c_int()
    _check(driver.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    return tuple(_name(driver, number) for number in range(count.value))


def _name(driver: Any, number: int) -> str:
    device, text = ctypes.c_int(), ctypes.create_string_buffer(NAME_BYTES)
    _check(driver.cuDeviceGet(ctypes.byref(device), number), "cuDeviceGet")
    _check(driver.cuDeviceGetName(text, NAME_BYTES, device), "cuDeviceGetName")
    return text.value.decode(errors="replace")


def _check(code: int, call: str) -> None:
    if code:
        raise InputError(
            f"NVIDIA's driver does not work: {call} gives error {code}. Run nvidia-smi, repair the driver or restart "
            "the machine; with CUDA_VISIBLE_DEVICES set to nothing the CPU is used."
        )
