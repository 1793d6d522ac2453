"""Which of the libraries that a task needs are installed, in which version, without importing them."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from types import MappingProxyType
from typing import Literal

__all__ = ["CORE", "EXTRAS", "JUDGING", "Extra", "Library", "clashes", "core_libraries", "library"]

State = Literal["ok", "missing", "unfit", "broken"]


@dataclass(frozen=True, kw_only=True)
class Extra:
    """An extra of this package: what it is for, and the libraries with the versions that will do.

    What the ``system`` brings cannot be installed by the extra; ``hint`` says how to get at it.
    """

    purpose: str
    needs: Mapping[str, str]
    system: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Library:
    """What was found of a library; ``version`` is None where it is not known."""

    name: str
    needs: str
    state: State
    version: str | None = None
    problem: str | None = None


CORE: Mapping[str, str] = MappingProxyType(
    {"click": ">=8.1", "numpy": ">=1.26", "pillow": ">=11", "pydantic": ">=2.10"}
)
ZSTANDARD: Mapping[str, str] = {} if sys.version_info >= (3, 14) else {"backports-zstd": ">=1.0"}
"""What reads zstandard before Python does itself."""
EXTRAS: Mapping[str, Extra] = MappingProxyType(
    {
        "cpu": Extra(purpose="judge with ONNX Runtime on a CPU", needs={"onnxruntime": ">=1.22"}),
        "gpu": Extra(purpose="judge with ONNX Runtime on a GPU", needs={"onnxruntime-gpu": ">=1.22"}),
        "openvino": Extra(purpose="judge with OpenVINO", needs={"openvino": ">=2025.0"}),
        "trt-cu12": Extra(
            purpose="build and run TensorRT engines (CUDA 12)",
            needs={"cuda-python": ">=12,<13", "onnx": ">=1.19", "onnxruntime": ">=1.22", "tensorrt-cu12": ">=10.0"},
        ),
        "trt-cu13": Extra(
            purpose="build and run TensorRT engines (CUDA 13)",
            needs={"cuda-python": ">=13,<14", "onnx": ">=1.19", "onnxruntime": ">=1.22", "tensorrt-cu13": ">=10.13"},
        ),
        "jetson": Extra(
            purpose="build and run TensorRT engines (Jetson)",
            needs={"cuda-python": ">=12,<13", "onnx": ">=1.19", "onnxruntime": ">=1.22"},
            system={"tensorrt": ">=8.6"},
            hint="JetPack brings tensorrt; make the environment with python3 -m venv --system-site-packages",
        ),
        "rtx": Extra(
            purpose="build TensorRT-RTX engines, without a GPU",
            needs={
                "cuda-python": ">=12,<13",
                "onnx": ">=1.19",
                "onnxruntime": ">=1.22",
                "tensorrt-rtx-cu12-bindings": ">=1.7",
                "tensorrt-rtx-cu12-libs": ">=1.7",
            },
        ),
        "torch": Extra(
            purpose="open checkpoints, export, quantize, calibrate",
            needs={
                "huggingface_hub": ">=1.33",
                "onnx": ">=1.19",
                "onnx-ir": ">=0.1.12",
                "onnxscript": ">=0.5.6",
                "protobuf": ">=5",
                "rich": ">=13",
                "safetensors": ">=0.6",
                "sentencepiece": ">=0.2",
                "tokenizers": ">=0.22",
                "torch": ">=2.8",
                "transformers": ">=5.14",
            },
        ),
        "vllm": Extra(purpose="serve with vLLM and the exact guard", needs={"vllm": ">=0.32,<0.33"}),
        "gguf": Extra(purpose="write and run GGUF files", needs={"gguf": ">=0.19", "llama-cpp-python": ">=0.3.36"}),
        "gateway": Extra(
            purpose="serve the gateway",
            needs={"fastapi": ">=0.115", "httpx": ">=0.27", "prometheus-client": ">=0.21", "uvicorn": ">=0.54,<0.55"},
        ),
        "report": Extra(
            purpose="compare runs and write reports",
            needs={
                "httpx": ">=0.27",
                "jinja2": ">=3.1",
                "matplotlib": ">=3.9",
                "pyyaml": ">=6",
                "scikit-learn": ">=1.5",
                "scipy": ">=1.13",
                "statsmodels": ">=0.14",
            },
        ),
        "logs": Extra(
            purpose="read logs of inspect_ai and Excel files, write Parquet",
            needs={**ZSTANDARD, "openpyxl": ">=3.1", "pyarrow": ">=18"},
        ),
        "datasets": Extra(purpose="read images from hub data sets", needs={"datasets": ">=3"}),
    }
)
"""As in pyproject.toml, here so that folders copied to a device know it, too."""
JUDGING = ("cpu", "gpu", "openvino", "trt-cu12", "trt-cu13", "jetson", "torch")
"""One of these extras is needed to judge images."""
_MODULES = {
    "backports-zstd": "backports.zstd",
    "cuda-python": "cuda",
    "llama-cpp-python": "llama_cpp",
    "onnx-ir": "onnx_ir",
    "onnxruntime-gpu": "onnxruntime",
    "pillow": "PIL",
    "prometheus-client": "prometheus_client",
    "protobuf": "google.protobuf",
    "scikit-learn": "sklearn",
    "tensorrt-cu12": "tensorrt",
    "tensorrt-cu13": "tensorrt",
    "tensorrt-rtx-cu12-bindings": "tensorrt_rtx_bindings",
    "tensorrt-rtx-cu12-libs": "tensorrt_rtx_libs",
}
"""What is imported, where it has another name than the distribution."""
_SAME_MODULE = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that write the same files: the one that is installed later overwrites the other."""
_NAMED = (_SAME_MODULE[1], "tensorrt-cu12", "tensorrt-cu13")
"""Distributions whose module another one has, too: without its metadata a module says nothing of them."""


def library(name: str, needs: str) -> Library:
    """Look a library up; its package is found, not imported."""
    version, problem = _version(name)
    if problem is not None:
        return Library(name=name, needs=needs, state="broken", problem=problem)
    if version is None and name in _NAMED:
        return Library(name=name, needs=needs, state="missing")
    found, problem = _is_found(_MODULES.get(name, name))
    if not found:
        if version is None and problem is None:
            return Library(name=name, needs=needs, state="missing")
        problem = problem or "its metadata is installed, but its code is missing"
        return Library(name=name, needs=needs, state="broken", version=version, problem=problem)
    fits = version is None or _fits(version, needs)
    return Library(name=name, needs=needs, state="ok" if fits else "unfit", version=version)


def core_libraries() -> list[Library]:
    """Look up what everything needs, and import it: these libraries are small."""
    found = []
    for name, needs in CORE.items():
        looked_up = library(name, needs)
        if looked_up.state == "ok":
            try:
                import_module(_MODULES.get(name, name))
            except Exception as error:  # a library that is broken raises what it likes
                problem = f"importing it fails: {_first_line(error)}"
                looked_up = Library(name=name, needs=needs, state="broken", version=looked_up.version, problem=problem)
        found.append(looked_up)
    return found


def clashes() -> list[str]:
    """Return a sentence for every pair of installed distributions that overwrite each other."""
    both = [name for name in _SAME_MODULE if _version(name)[0] is not None]
    if len(both) < 2:
        return []
    return [f"{' and '.join(both)} overwrite each other's files. Uninstall both and install one of them again."]


def _version(name: str) -> tuple[str | None, str | None]:
    """Return a distribution's version, None where there is none, and what is wrong with its metadata."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return None, None
    except Exception as error:  # metadata that is cut off or not text
        return None, f"its metadata cannot be read: {_first_line(error)}"
    if not isinstance(version, str):  # before Python 3.12 metadata without a version gives None
        return None, "its metadata states no version"
    return version, None


def _is_found(module: str) -> tuple[bool, str | None]:
    try:
        return find_spec(module) is not None, None
    except ModuleNotFoundError:
        return False, None
    except Exception as error:  # a finder of somebody else's, or a package whose parent fails
        return False, _first_line(error)


def _fits(version: str, needs: str) -> bool:
    """Compare the leading numbers of a version with ``>=2.8`` or ``>=0.54,<0.55``."""
    given = _numbers(version)
    return all(
        given < _numbers(bound[1:]) if bound.startswith("<") else given >= _numbers(bound.removeprefix(">="))
        for bound in needs.split(",")
    )


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, (2, 13) of 2.13.0+cpu: zeros at the end say nothing."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(each) for each in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        del numbers[-1]
    return tuple(numbers)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
