"""TensorRT engines for ``benchmarks.speed guard``: built from the scratch bundle's files where that is possible.

They are for timing alone: unlike ``export.trt``'s they are not compared with ONNX Runtime first, since the labels of
random weights flip at the last bit. The speed record has their largest difference of a probability instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from export.guard.bundle import write_manifest
from export.tensorrt.builder import EngineOptions, EnginePrecision, build_engine
from export.tensorrt.engine import Device, tensors_of
from export.tensorrt.request import EngineRequest, find_device
from export.trt import default_timing_cache
from runtimes.guard.bundle import sha256_of
from safevlm.contract.manifest import EngineInfo, GuardFile, Manifest

__all__ = ["build"]


def build(request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Build an engine of every one of ``precisions`` into the bundle ``folder``, for 1 to ``max_batch`` images.

    Raises EngineUnavailableError where there is no TensorRT or GPU; SafeVLMError when TensorRT fails.
    """
    folder, device = Path(request["folder"]), find_device(EngineRequest(builder="tensorrt"))
    exported = {file.precision for file in Manifest.read(folder).files if file.kind == "onnx"}
    for precision in sorted(request["precisions"], key="int8".__eq__):  # last: TensorRT 8.6 refuses it
        if device.api.source_precision(precision) in exported:  # TensorRT 8.6 makes fp16 engines of the fp32 file
            entry = _engine(folder, device, precision, request["max_batch"])
            manifest = Manifest.read(folder)
            write_manifest(folder, manifest.model_copy(update={"files": (*manifest.files, entry)}))
            yield {"engine": entry.path}


def _engine(folder: Path, device: Device, precision: EnginePrecision, max_batch: int) -> GuardFile:
    options = EngineOptions(precision=precision, max_batch=max_batch, opt_batch=max_batch)
    wanted = device.api.source_precision(precision)
    source = next(file for file in Manifest.read(folder).files if file.kind == "onnx" and file.precision == wanted)
    path, plan = folder / source.path, folder / f"guard.{precision}.plan"
    cache = default_timing_cache(device)
    build_engine(device.trt, path, plan, tensors_of(path, source), options, timing_cache=cache)
    assert device.gpu is not None
    return GuardFile(
        path=plan.name,
        sha256=sha256_of(plan),
        bytes=plan.stat().st_size,
        kind="engine",
        precision=precision,
        engine=EngineInfo(
            tensorrt_version=device.version,
            gpu_name=device.gpu.name,
            compute_capability=device.gpu.compute_capability,
            min_batch=1,
            opt_batch=max_batch,
            max_batch=max_batch,
        ),
    )
