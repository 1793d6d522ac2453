"""An engine in a guard bundle: whether it is there already, how it compares with ONNX Runtime, its entry.

A guard that stands alone is one engine; the exact parts of one behind the language model are two, of roles ``vision``
and ``head``. Shapes: n images, H × W pixels, T image tokens, D width of the language model, C classes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.guard.bundle import write_manifest
from export.guard.latency import latency_of
from export.rewrites.int8_on_half import quantize_half
from export.tensorrt.builder import (
    BuilderApi,
    EngineOptions,
    Report,
    Tensors,
    build_engine,
    builder_api,
)
from export.tensorrt.messages import module_of, title_of
from export.tensorrt.room import check_room, default_batch, scratch_bytes, stored_bytes
from runtimes.guard.bundle import Bundle, sha256_of, specs
from runtimes.guard.cuda import Gpu
from runtimes.guard.engines.library import HARDWARE_COMPATIBLE, VERSION_COMPATIBLE, EngineModule
from runtimes.guard.onnx_file import read_onnx
from runtimes.guard.runner import FileRunner
from safevlm.contract.graph_fit import Role
from safevlm.contract.manifest import EngineInfo, GuardFile, Latency, Manifest, Parity
from safevlm.contract.parity import ENGINE_TOLERANCES, check_embeddings, check_parity, judge_of
from safevlm.errors import BundleError
from safevlm.files.draft import draft_of
from safevlm.files.storage import storing
from safevlm.machine import times_ms

__all__ = [
    "Answers",
    "Device",
    "EnginePart",
    "add_engine",
    "current_engine",
    "parts_of",
    "require_precisions",
    "tensors_of",
]

Inputs = NDArray[Any]
Answers = Mapping[str, NDArray[np.float32]]
"""All outputs of a file by name."""
MakeRunner = Callable[[Bundle, GuardFile], FileRunner]

PARITY_SEED = 0
"""Draws the images that a reader compares an engine on that was built ahead of time."""
WARM_UP, MOST_RUNS, MOST_SECONDS = 10, 200, 5.0


@dataclass(frozen=True)
class Device:
    """What engines are built with and for: a TensorRT module, and the GPU here or the targets to compile for.

    ``free_bytes`` of the GPU's memory are free; None where that is not known.
    """

    trt: Any
    gpu: Gpu | None = None
    free_bytes: int | None = None
    targets: tuple[str, ...] = ()

    @property
    def module(self) -> EngineModule:
        """Which TensorRT it is."""
        return module_of(self.trt)

    @property
    def version(self) -> str:
        """TensorRT's version."""
        return str(self.trt.__version__)

    @property
    def api(self) -> BuilderApi:
        """How its builder is driven. Raises EngineUnavailableError for a TensorRT that is too old."""
        return builder_api(self.version, self.module)


@dataclass(frozen=True)
class EnginePart:
    """One engine of a bundle: of which of its files, and with what options."""

    role: Role
    options: EngineOptions

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"{self.options.precision} engine" + (f" of the {self.role}" if self.role != "guard" else "")

    def source(self, bundle: Bundle, device: Device) -> GuardFile:
        """Return the ONNX file that it is built from."""
        return self._file(bundle, device.api.source_precision(self.options.precision))

    def half(self, bundle: Bundle) -> GuardFile | None:
        """Return the float16 file that an int8 engine computes with between its products, if the bundle has one."""
        if self.options.precision != "int8":
            return None
        return next((file for file in bundle.files("onnx", self.role) if file.precision == "fp16"), None)

    def judge(self, bundle: Bundle) -> GuardFile:
        """Return the ONNX file that it is compared with."""
        return self._file(bundle, judge_of(self.options.precision))

    def _file(self, bundle: Bundle, precision: str) -> GuardFile:
        return next(file for file in bundle.files("onnx", self.role) if file.precision == precision)


def parts_of(bundle: Bundle, options: EngineOptions, device: Device) -> tuple[EnginePart, ...]:
    """Return the engines that a bundle gets; a head is float32, whatever the vision path is.

    Raises BundleError for a bundle without the ONNX files that these are built from and compared with.
    """
    if bundle.manifest.source.standalone:
        parts: tuple[EnginePart, ...] = (EnginePart("guard", options),)
    else:
        parts = (EnginePart("vision", options), EnginePart("head", replace(options, precision="fp32")))
    for part in parts:
        wanted = part.options.precision
        require_precisions(bundle, {judge_of(wanted), device.api.source_precision(wanted)}, part.role)
    return tuple(_with_batch(bundle, part, device) for part in parts) if options.max_batch is None else parts


def _with_batch(bundle: Bundle, part: EnginePart, device: Device) -> EnginePart:
    """Return a part with the batch that its scratch memory allows."""
    most = max(default_batch(_scratch(bundle, part, device)), part.options.opt_batch)
    return replace(part, options=replace(part.options, max_batch=most))


def _scratch(bundle: Bundle, part: EnginePart, device: Device) -> int:
    """Return the scratch memory an image that an engine needs."""
    half = part.half(bundle)
    path = bundle.path(half or part.source(bundle, device))
    return scratch_bytes(path, fused=half is not None or part.options.precision == "fp16")


def require_precisions(bundle: Bundle, precisions: set[str], role: Role) -> None:
    """Raise BundleError, with the command that helps, unless a role has ONNX files of these precisions."""
    there = {file.precision for file in bundle.files("onnx", role)}
    missing = sorted(precisions - there)
    if not missing:
        return
    if "int8" in missing and role != "guard":
        raise BundleError(
            f"{bundle.folder} holds a guard's exact parts, which have no INT8 file. Give --precision fp16 or fp32. "
            f"A standalone guard can have one: python -m export.trt {bundle.manifest.source.model_option} --out "
            f"{bundle.folder} --images DIR --precision int8"
        )
    raise BundleError(
        f"{bundle.folder} has no ONNX file of precision {' and '.join(missing)} (it has "
        f"{', '.join(sorted(there)) or 'none'}). The engine is built from it or compared with it. Export the bundle "
        f"again: python -m export.onnx {bundle.manifest.source.model_option} --out {bundle.folder} "
        f"--precision fp32,fp16{',int8' if 'int8' in precisions else ''}"
    )


def current_engine(bundle: Bundle, part: EnginePart, device: Device) -> GuardFile | None:
    """Return the engine that a build now would make again: same graph, options, TensorRT and GPU or targets."""
    wanted = _info(bundle, part, device)
    engines = (file for file in bundle.files("engine", part.role) if file.precision == part.options.precision)
    return next((file for file in engines if file.engine == wanted), None)


def add_engine(
    bundle: Bundle,
    part: EnginePart,
    device: Device,
    inputs: Inputs,
    reference: Answers,
    make_runner: MakeRunner,
    *,
    timing_cache: Path | None = None,
    report: Report = lambda _: None,
) -> Manifest:
    """Build an engine and enter it into the bundle; one for the GPU here is first compared and timed.

    ``inputs`` are images (n × H × W × 3) or, for a head, hidden states (n × T × D), and ``reference`` what ONNX Runtime
    answers with the part's :meth:`EnginePart.judge`. An engine built ahead of time cannot run here and is entered as
    not verified. The engine of the same role, precision, TensorRT and GPU or targets is replaced. Until the last step
    the bundle is as it was.

    Raises those of :func:`build_engine`; ParityError.
    """
    source, info = part.source(bundle, device), _info(bundle, part, device)
    halved = part.options.precision == "fp16" and source.precision == "fp32"
    scratch_size = _scratch(bundle, part, device)
    weights = stored_bytes(bundle, source, halved=halved)
    check_room(bundle, weights, scratch_size, part.options.largest_batch, device.free_bytes)
    with draft_of(bundle.folder / "engine") as scratch, storing(bundle.folder, advice="copy the bundle elsewhere"):
        path, plan = bundle.path(source), scratch / "guard.plan"
        tensors = tensors_of(path, source)
        if (half := part.half(bundle)) is not None:
            path = scratch / source.path
            quantize_half(bundle.path(source), bundle.path(half), path)
        report(f"{title_of(device.trt)}: reading {source.path}")
        build_engine(
            device.trt,
            path,
            plan,
            tensors,
            part.options,
            targets=device.targets,
            timing_cache=timing_cache,
            report=report,
        )
        entry = _entry(bundle, plan, part, info, tensors)
        if device.gpu is not None:
            report("comparing with ONNX Runtime and timing")
            with make_runner(bundle, entry) as runner:
                parity = _check(runner.run_file(inputs), reference, part)
                latency = _time(runner, inputs[:1], device, device.gpu)
            entry = entry.model_copy(update={"parity": parity, "latency": latency})
        return _enter(bundle.folder, entry, plan)


def _check(found: Answers, reference: Answers, part: EnginePart) -> Parity:
    """Compare an engine's answers with ``reference``; ParityError when they differ too much."""
    precision, what = part.options.precision, f"the {part.title}"
    tolerance = ENGINE_TOLERANCES[precision]
    against = f"ONNX Runtime on the CPU with this bundle's {judge_of(precision)} file"
    parity = Parity(images=len(next(iter(reference.values()))), reference=against)
    if "probs" in reference:
        parity = check_parity(
            reference["probs"],
            found["probs"],
            tolerance,
            what=what,
            reference=against,
            advice="Try --precision fp32, and please report this with the TensorRT version and the GPU.",
        )
    if "embeddings" in reference:
        delta = check_embeddings(reference["embeddings"], found["embeddings"], tolerance, what=what)
        parity = parity.model_copy(update={"max_rel_embedding_delta": delta})
    return parity


def _info(bundle: Bundle, part: EnginePart, device: Device) -> EngineInfo:
    """Return what an engine built now would say of itself."""
    api, options, source = device.api, part.options, part.source(bundle, device)
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
    if (half := part.half(bundle)) is not None:
        stated["onnx_fp16_sha256"] = half.sha256
    return EngineInfo(
        module=device.module,
        tensorrt_version=device.version,
        gpu_name=None if device.gpu is None else device.gpu.name,
        compute_capability=None if device.gpu is None else device.gpu.compute_capability,
        targets=device.targets,
        operating_system=platform.system().lower(),
        machine=platform.machine(),
        verified=device.gpu is not None,
        parity_seed=PARITY_SEED if device.gpu is None else None,
        min_batch=1,
        opt_batch=options.opt_batch,
        max_batch=options.largest_batch,
        options=stated,
    )


def tensors_of(path: Path, file: GuardFile) -> Tensors:
    """Return what the ONNX file at ``path`` takes and gives; a manifest need not state it of a guard."""
    if file.inputs and file.outputs:
        return Tensors(file.inputs, file.outputs)
    facts = read_onnx(path)
    return Tensors(specs(facts.inputs, str(path)), specs(facts.outputs, str(path)))


def _entry(bundle: Bundle, plan: Path, part: EnginePart, info: EngineInfo, tensors: Tensors) -> GuardFile:
    return GuardFile(
        path=plan.relative_to(bundle.folder).as_posix(),
        sha256=sha256_of(plan),
        bytes=plan.stat().st_size,
        kind="engine",
        role=part.role,
        precision=part.options.precision,
        inputs=tensors.inputs,
        outputs=tensors.outputs,
        engine=info,
    )


def _time(runner: FileRunner, one: Inputs, device: Device, gpu: Gpu) -> Latency:
    """Measure single images from host memory to host memory."""
    for _ in range(WARM_UP):
        runner.run_file(one)
    times = times_ms(lambda: runner.run_file(one), least=3, most=MOST_RUNS, seconds=MOST_SECONDS)
    return latency_of(times, f"tensorrt {device.version}", gpu.name, provider=runner.provider)


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
    return _identity(file) == _identity(entry)


def _identity(file: GuardFile) -> tuple[object, ...] | None:
    """Return what a bundle has one engine of."""
    info = file.engine
    if info is None:
        return None
    made = (info.module, info.tensorrt_version, info.operating_system, info.machine)
    return file.role, file.precision, *made, info.gpu_name, info.compute_capability, info.targets


def _plan_path(entry: GuardFile, taken: set[str]) -> str:
    """Return ``engines/fp16-sm87-trt8.6.2.plan``, numbered where an engine for another machine has the name."""
    info = entry.engine
    assert info is not None
    role = "" if entry.role == "guard" else f"{entry.role}."
    built = "-".join(info.targets) or f"sm{(info.compute_capability or '').replace('.', '')}"
    library = "rtx" if info.module == "tensorrt_rtx" else "trt"
    stem = f"engines/{role}{entry.precision}-{built}-{library}{info.tensorrt_version}"
    names = (f"{stem}{suffix}.plan" for suffix in ("", *(f"-{number}" for number in range(2, len(taken) + 3))))
    return next(name for name in names if name not in taken)
