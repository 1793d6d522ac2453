"""The device that torch runs on: found by its name, computing in true float32, with a name and a memory of its own."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import torch

from safevlm.errors import InputError
from safevlm.machine import cpu_flags, free_on_gpu

__all__ = ["GpuUse", "gpu_room", "gpu_use", "multiplies_bfloat16", "reset_gpu_peak", "torch_device"]

KNOWN = re.compile(r"cpu|cuda(?::(\d{1,9}))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class GpuUse:
    """The GPU that torch ran on, and the most bytes of it that tensors held at once."""

    name: str
    peak_bytes: int


def torch_device(name: str | torch.device) -> torch.device:
    """Return the device of this name: ``cpu``, ``cuda`` or ``cuda:N``; on a GPU, float32 is float32 from then on.

    Raises InputError for another name, and for a GPU that is not there or that this build of torch cannot use.
    """
    known = KNOWN.fullmatch(str(name))
    if known is None:  # torch takes cuda:300, too: it keeps the number's last byte
        raise InputError(f"--device {name}: use cpu, cuda or cuda:N.")
    if str(name) == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings(record=True) as told:  # why a driver that is there gives no GPU
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        why = f" ({str(told[0].message).partition(chr(10))[0]})" if told else ""
        raise InputError(f"--device {name}: torch {torch.__version__} finds no CUDA GPU here{why}. Use --device cpu.")
    index = int(known[1] or 0)
    if index >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise InputError(f"--device {name}: there is no such GPU here. Use {there}, or cpu.")
    device = torch.device("cuda", index)
    _use_true_float32()
    _try(device, str(name))
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether a device has instructions that multiply bfloat16 and add up in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device) >= (8, 0))
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def _use_true_float32() -> None:
    """Turn TF32 off, which keeps ten bits of a factor: by default cuDNN's convolutions compute in it."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _try(device: torch.device, name: str) -> None:
    """Compute once: a card may be taken, or too old or too new for this build of torch."""
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"--device {name}: the GPU cannot be used by torch {torch.__version__}: {reason}. Free it, install a torch "
            "for it, or use --device cpu."
        ) from error


def gpu_room(device: torch.device) -> int | None:
    """Return the bytes of a GPU that this process's tensors take or could take; None for a CPU."""
    if device.type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    integrated = bool(torch.cuda.get_device_properties(device).is_integrated)
    return min(total, free_on_gpu(free, total, integrated=integrated) + torch.cuda.memory_reserved(device))


def reset_gpu_peak(device: torch.device) -> None:
    """Let :func:`gpu_use` count from now on."""
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)


def gpu_use(device: torch.device) -> GpuUse | None:
    """Return the GPU's name and how much of it was in use at once; None for a CPU."""
    if device.type == "cpu":
        return None
    name = torch.cuda.get_device_name(device)
    return GpuUse(name=name, peak_bytes=torch.cuda.max_memory_allocated(device))
