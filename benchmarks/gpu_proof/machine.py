"""What a machine has that a proof needs: its GPU, and packages. Imports no package that may be missing."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safevlm.machine import machine_name

__all__ = ["look"]

REQUIRED = ("click", "numpy", "onnx", "onnxscript", "PIL", "pydantic", "rich", "safetensors", "torch", "transformers")
"""Modules that every step needs."""
TOLD = re.compile(r"torch|transformers|onnxruntime(?:-gpu)?|tensorrt(?:-rtx-.*)?|cuda-bindings")
"""Packages whose versions each line states."""


def look(_: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Answer once: processor, GPU (``None`` without one that torch can use), driver, versions.

    Then the modules that are missing, and the folders of CUDA's libraries.
    """
    missing = [name for name in REQUIRED if find_spec(name) is None]
    found = {each.name: each.version for each in importlib.metadata.distributions()}
    yield {
        "machine": machine_name(),
        "gpu": None if "torch" in missing else _gpu(),
        "driver": _driver(),
        "versions": {
            "python": platform.python_version(),
            **{name: found[name] for name in sorted(found) if name is not None and TOLD.fullmatch(name)},
        },
        "missing": missing,
        "libraries": _libraries(),
    }


def _libraries() -> list[str]:
    """Return the folders of CUDA's libraries that came with torch.

    ONNX Runtime looks for them beside itself, and a wheel that is installed for the steps alone stands elsewhere.
    """
    packages = find_spec("nvidia")
    places = [] if packages is None else list(packages.submodule_search_locations or ())
    return [str(folder) for place in places for folder in sorted(Path(place).glob("*/lib")) if folder.is_dir()]


def _gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    seen = torch.cuda.get_device_properties(0)
    return f"{seen.name}, {seen.total_memory / 2**30:.0f} GiB, compute capability {seen.major}.{seen.minor}"


def _driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip().partition("\n")[0] or None if done.returncode == 0 else None
