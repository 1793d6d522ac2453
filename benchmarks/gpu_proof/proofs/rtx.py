"""Step 7: an engine that TensorRT-RTX built ahead of time: whether this GPU takes it, and answers as the ONNX file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_proof.finding import Finding, Task, attempt, checked, failed, proved, unproved
from benchmarks.gpu_proof.proofs.commands import need, ran
from safevlm.errors import MissingExtraError

__all__ = ["prove"]

MODULES = ("tensorrt_rtx", "tensorrt_rtx_bindings")
"""The metapackage's, and what it installs."""
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities that TensorRT-RTX 1.7 compiles for (and no other)."""


def prove(request: Mapping[str, Any]) -> Iterator[Finding]:
    """Build tiny-safegem's engine, ask the library about it, and let the reader verify it."""
    task = Task.of(request)
    yield from attempt("TensorRT-RTX builds an engine and this GPU takes it", _engine, task)


def _engine(task: Task) -> Iterator[Finding]:
    library = _library()
    out = task.work / "rtx"
    shutil.rmtree(out, ignore_errors=True)
    need("export.trt", "--model", "tiny-safegem", "--builder", "rtx", "--out", out, "--parity-images", 4)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    engines = [file for file in manifest["files"] if file["kind"] == "engine"]
    told = ", ".join(f"{file['precision']} for {' '.join(file['engine']['targets'])}" for file in engines)
    yield checked(
        "TensorRT-RTX builds an engine without asking the GPU", bool(engines), f"{library.__version__}: {told}"
    )
    if not torch.cuda.is_available():
        yield unproved("the engine is loaded and answers", "no GPU: TensorRT-RTX deserializes nothing without one")
        return
    supported = torch.cuda.get_device_capability(0) in CAPABILITIES
    for file in engines:
        claim = f"{file['path']}: what the library says of it on this GPU"
        yield from attempt(claim, _validity, library, out / file["path"], supported)
    yield from attempt("the engine answers as its ONNX file", _verified, out, supported)


def _library() -> Any:
    for name in MODULES:
        try:
            return import_module(name)
        except ImportError as error:  # noqa: PERF203
            missing = error
    raise MissingExtraError("tensorrt-rtx", "rtx", "building engines without a GPU") from missing


def _validity(library: Any, plan: Path, supported: bool) -> Iterator[Finding]:
    runtime = library.Runtime(library.Logger(library.Logger.ERROR))
    content = plan.read_bytes()
    validity, reasons = runtime.get_engine_validity(content)
    told = f"{validity}, {reasons}"
    loaded = validity != library.EngineValidity.INVALID and runtime.deserialize_cuda_engine(content) is not None
    if supported:
        yield checked(f"{plan.name}: this GPU takes it", loaded, told)
    else:
        yield checked(f"{plan.name}: this GPU, which it was not built for, is named as unfit", not loaded, told)


def _verified(bundle: Path, supported: bool) -> Iterator[Finding]:
    done = ran("runtimes.check", bundle, "--verify")
    told = " ".join((done.output + done.said).split())[-600:]
    if supported:
        claim = "runtimes.check --verify: the engine answers as its ONNX file"
        yield proved(claim, told) if done.code == 0 else failed(claim, f"it ended with {done.code}", told)
    else:
        claim = "runtimes.check --verify refuses the engine in plain words"
        yield checked(claim, done.code == 2 and "Traceback" not in told, told)
        major, minor = torch.cuda.get_device_capability(0)
        yield unproved(
            "the engine answers as its ONNX file",
            f"TensorRT-RTX compiles nothing for compute capability {major}.{minor}",
        )
