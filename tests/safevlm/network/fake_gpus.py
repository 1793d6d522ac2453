"""GPUs as torch describes them, where there are none: what is told of them, not what they compute."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from safevlm.network import device

GPU = "NVIDIA Imagined 80GB"


def install(monkeypatch: pytest.MonkeyPatch, count: int, *, free: int = 10 * 2**30, integrated: bool = False) -> None:
    """Let torch count so many GPUs, each with ``free`` bytes of which none are in use."""
    properties = SimpleNamespace(is_integrated=int(integrated))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU)
    monkeypatch.setattr(device, "_try", lambda *_: None)
