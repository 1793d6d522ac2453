"""An engine in a guard bundle: whether it is there already, how it compares with ONNX Runtime, its entry.

Shapes: n pictures, H × W pixels, C classes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.guard.bundle import write_manifest
from export.guard.latency import latency_of
from export.guard.parity import TOLERANCES, Tolerance, check_embeddings, check_parity
from export.tensorrt.builder import EngineOptions, Report, build_engine, builder_api
from runtimes.guard.bundle import Bundle, sha256_of
from runtimes.guard.cuda import Gpu
from runtimes.guard.runner import GuardOutput, GuardRunner
from runtimes.guard.tensorrt_runner import HARDWARE_COMPATIBLE, VERSION_COMPATIBLE
from safevlm.contract.manifest import EngineInfo, GuardFile, Latency, Manifest, Parity, TensorSpec
from safevlm.errors import BundleError, EngineUnavailableError
from safevlm.files.draft import draft_of
from safevlm.files.storage import shown_bytes, storing
from safevlm.machine import times_ms

__all__ = ["ENGINE_TOLERANCES", "Device", "add_engine", "current_engine", "judge_of", "require_precisions"]

Bytes = NDArray[np.uint8]
MakeRunner = Callable[[Bundle, GuardFile], GuardRunner]

ENGINE_TOLERANCES: Mapping[str, Tolerance] = {
    # Another machine sums in another order; the export itself, on one machine, is held to 1e-5.
    "fp32": Tolerance(probability=1e-4, labels_may_change=False, embedding=1e-3),
    "fp16": TOLERANCES["fp16"],
    # Compared with the INT8 file, which was judged when it was made: a last bit moves a value to the next step.
    "int8": Tolerance(probability=5e-2, labels_may_change=True, embedding=5e-2),
}
ACTIVATION_BYTES = 32
WARM_UP, MOST_RUNS, MOST_SECONDS = 10, 200, 5.0


@dataclass(frozen=True)
class Device:
    """What an engine is built for: the ``tensorrt`` module and the GPU, as they are here.

    ``free_bytes`` of the GPU's memory are free; None where that is not known.
    """

    trt: Any
    gpu: Gpu
    free_bytes: int | None = None

    @property
    def version(self) -> str:
        """TensorRT's version."""
        return str(self.trt.__version__)


def require_precisions(bundle: Bundle, precisions: set[str]) -> None:
    """Raise BundleError, with the command that helps, unless the bundle has ONNX files of these precisions."""
    there = {file.precision for file in bundle.files("onnx")}
    missing = sorted(precisions - there)
    if missing:
        raise BundleError(
            f"{bundle.folder} has no ONNX file of precision {' and '.join(missing)} (there is: "
            f"{', '.join(sorted(there)) or 'none'}), which this engine is built from or compared with. Export it "
            f"again: python -m export.onnx {bundle.manifest.source.model_option} --out {bundle.folder} "
            f"--precision fp32,fp16{',int8' if 'int8' in precisions else ''}"
        )


def check_room(bundle: Bundle, source: GuardFile, options: EngineOptions, free_bytes: int | None) -> None:
    """Refuse what cannot fit before the long work begins.

    The disk must hold the engine, which is about as large as its weights. The GPU must hold the weights twice, as
    built and as tried, and :data:`ACTIVATION_BYTES` for each grey level of ``max_batch`` pictures, which is less than
    a build takes: what is refused would fail. Raises EngineUnavailableError with the numbers and a way out.
    """
    stored = source.bytes + sum(file.bytes for file in bundle.files("onnx_data") if file.path == f"{source.path}.data")
    weights = stored // 2 if options.precision == "fp16" and source.precision == "fp32" else stored
    disk = shutil.disk_usage(bundle.folder).free
    if disk < weights:
        raise EngineUnavailableError(
            f"{bundle.folder}: an engine of about {shown_bytes(weights)} does not fit on this disk, which has "
            f"{shown_bytes(disk)} free. Make room, or copy the bundle to another disk."
        )
    size = bundle.manifest.preprocessing
    needed = 2 * weights + options.max_batch * size.height * size.width * 3 * ACTIVATION_BYTES
    if free_bytes is not None and free_bytes < needed:
        raise EngineUnavailableError(
            f"the build needs {shown_bytes(needed)} of GPU memory or more at --max-batch {options.max_batch}, and "
            f"{shown_bytes(free_bytes)} are free. Close what else uses the GPU, or try a smaller --max-batch."
        )


def judge_of(precision: str) -> str:
    """Return the precision of the ONNX file that an engine is compared with."""
    return precision if precision == "int8" else "fp32"


def current_engine(bundle: Bundle, options: EngineOptions, device: Device) -> GuardFile | None:
    """Return the engine that a build now would make again: same graph, options, TensorRT and GPU."""
    wanted = _info(bundle, options, device)
    engines = (file for file in bundle.files("engine") if file.precision == options.precision)
    return next((file for file in engines if file.engine == wanted), None)


def add_engine(
    bundle: Bundle,
    options: EngineOptions,
    device: Device,
    images: Bytes,
    reference: GuardOutput,
    make_runner: MakeRunner,
    *,
    timing_cache: Path | None = None,
    report: Report = lambda _: None,
) -> Manifest:
    """Build an engine, compare it with ``reference``, time it and enter it into the bundle.

    ``images`` (n × H × W × 3) and ``reference`` are pictures and what ONNX Runtime says of them with the file of the
    precision :func:`judge_of`, with image embeddings where the bundle's guard gives them. The engine of the same
    precision, GPU and TensorRT is replaced. Until the last step the bundle is as it was.

    Raises those of :func:`build_engine`; ParityError.
    """
    info = _info(bundle, options, device)
    size = bundle.manifest.preprocessing
    check_room(bundle, _source(bundle, options, device), options, device.free_bytes)
    with draft_of(bundle.folder / "engine") as scratch, storing(bundle.folder, advice="copy the bundle elsewhere"):
        plan = scratch / "guard.plan"
        source = bundle.path(_source(bundle, options, device))
        report(f"TensorRT {device.version}: reading {source.name}")
        build_engine(
            device.trt,
            source,
            plan,
            (size.height, size.width),
            options,
            timing_cache=timing_cache,
            report=report,
        )
        report("comparing with ONNX Runtime and timing")
        candidate = _entry(bundle, plan, options.precision, info, _source(bundle, options, device))
        with make_runner(bundle, candidate) as runner:
            parity = _check(runner, images, reference, options.precision)
            latency = _time(runner, images[:1], device)
        entry = candidate.model_copy(update={"parity": parity, "latency": latency})
        return _enter(bundle.folder, entry, plan)


def _check(runner: GuardRunner, images: Bytes, reference: GuardOutput, precision: str) -> Parity:
    """Compare an engine's answers with ``reference``; ParityError when they differ too much."""
    shared, tolerance, what = reference.embeddings is not None, ENGINE_TOLERANCES[precision], f"the {precision} engine"
    found = runner.infer(images, embeddings=shared)
    parity = check_parity(
        reference.probs,
        found.probs,
        tolerance,
        what=what,
        reference=f"ONNX Runtime on the CPU with this bundle's {judge_of(precision)} file",
        advice="Try --precision fp32, and please report this with the TensorRT version and the GPU.",
    )
    if reference.embeddings is None or found.embeddings is None:
        return parity
    delta = check_embeddings(reference.embeddings, found.embeddings, tolerance, what=what)
    return parity.model_copy(update={"max_rel_embedding_delta": delta})


def _source(bundle: Bundle, options: EngineOptions, device: Device) -> GuardFile:
    return bundle.file(builder_api(device.version).source_precision(options.precision))


def _info(bundle: Bundle, options: EngineOptions, device: Device) -> EngineInfo:
    """Return what an engine built now would say of itself."""
    api, source = builder_api(device.version), _source(bundle, options, device)
    weights = [file.sha256 for file in bundle.files("onnx_data") if file.path == f"{source.path}.data"]
    stated: dict[str, str | int | float | bool | None] = {
        "onnx": source.path,
        "onnx_sha256": source.sha256,
        "onnx_data_sha256": weights[0] if weights else None,
        "strongly_typed": api.strongly_typed,
        "builder_flags": " ".join(api.fp16_flags) if options.precision == "fp16" else "",
        "tf32": False,
        "workspace_mib": options.workspace_mib,
        HARDWARE_COMPATIBLE: options.hardware_compatible,
        VERSION_COMPATIBLE: options.version_compatible,
    }
    return EngineInfo(
        tensorrt_version=device.version,
        gpu_name=device.gpu.name,
        compute_capability=device.gpu.compute_capability,
        min_batch=1,
        opt_batch=options.opt_batch,
        max_batch=options.max_batch,
        options=stated,
    )


def _entry(bundle: Bundle, plan: Path, precision: str, info: EngineInfo, source: GuardFile) -> GuardFile:
    size, classes = bundle.manifest.preprocessing, len(bundle.manifest.classes)
    return GuardFile(
        path=plan.relative_to(bundle.folder).as_posix(),
        sha256=sha256_of(plan),
        bytes=plan.stat().st_size,
        kind="engine",
        precision=precision,
        inputs=(TensorSpec(name="rgb", shape=("N", size.height, size.width, 3), dtype="uint8"),),
        outputs=(
            *(TensorSpec(name=name, shape=("N", classes), dtype="float32") for name in ("probs", "logits")),
            *(output for output in source.outputs if output.name == "embeddings"),
        ),
        engine=info,
    )


def _time(runner: GuardRunner, image: Bytes, device: Device) -> Latency:
    """Measure single pictures from host memory to host memory."""
    for _ in range(WARM_UP):
        runner.infer(image)
    times = times_ms(lambda: runner.infer(image), least=3, most=MOST_RUNS, seconds=MOST_SECONDS)
    return latency_of(times, f"tensorrt {device.version}", device.gpu.name, provider=runner.provider)


def _enter(folder: Path, entry: GuardFile, plan: Path) -> Manifest:
    """Put a plan in its place and its entry into the manifest, in an order that no kill can break.

    An entry whose file is about to be overwritten leaves the manifest first.
    """
    manifest = Manifest.read(folder)
    replaced = [file for file in manifest.files if _same_engine(file, entry)]
    kept = tuple(file for file in manifest.files if file not in replaced)
    path = _plan_path(entry, {file.path for file in kept})
    entry = entry.model_copy(update={"path": path})
    gone = {file.path for file in replaced}  # thresholds were fitted for these very files
    thresholds = tuple(fitted for fitted in manifest.thresholds or () if fitted.file not in gone) or None
    if replaced:
        onnx = next(file.path for file in kept if file.kind == "onnx")
        default = onnx if manifest.default_file not in {file.path for file in kept} else manifest.default_file
        write_manifest(folder, _with(manifest, files=kept, default_file=default, thresholds=thresholds))
    (folder / path).parent.mkdir(exist_ok=True)
    plan.replace(folder / path)
    default = _default(manifest, replaced, path)
    manifest = _with(manifest, files=(*kept, entry), default_file=default, thresholds=thresholds)
    write_manifest(folder, manifest)
    for file in replaced:
        if file.path != path:
            (folder / file.path).unlink(missing_ok=True)
    return manifest


def _with(manifest: Manifest, **changes: object) -> Manifest:
    """Return a changed manifest, checked as a new one is."""
    return Manifest.model_validate({**{name: getattr(manifest, name) for name in Manifest.model_fields}, **changes})


def _default(manifest: Manifest, replaced: list[GuardFile], path: str) -> str:
    return path if manifest.default_file in {file.path for file in replaced} else manifest.default_file


def _same_engine(file: GuardFile, entry: GuardFile) -> bool:
    return file.precision == entry.precision and _target(file) is not None and _target(file) == _target(entry)


def _target(file: GuardFile) -> tuple[str | None, ...] | None:
    info = file.engine
    return None if info is None else (info.tensorrt_version, info.gpu_name, info.compute_capability)


def _plan_path(entry: GuardFile, taken: set[str]) -> str:
    """Return ``engines/fp16-sm87-trt8.6.2.plan``, numbered where another GPU of that kind has the name."""
    assert entry.engine is not None and entry.engine.compute_capability is not None
    capability = entry.engine.compute_capability.replace(".", "")
    stem = f"engines/{entry.precision}-sm{capability}-trt{entry.engine.tensorrt_version}"
    names = (f"{stem}{suffix}.plan" for suffix in ("", *(f"-{number}" for number in range(2, len(taken) + 3))))
    return next(name for name in names if name not in taken)
