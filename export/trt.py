"""Add a TensorRT engine to a guard: ``python -m export.trt --model M`` or, on a device, ``--bundle DIR``.

With ``--model`` everything ``export.onnx`` does comes first, in fp32 and fp16. TensorRT builds for the GPU it runs on.
TensorRT-RTX needs none: it compiles for ``--targets``, and the device itself compares the engine with ONNX Runtime
before it judges with it. ``--bundle`` needs neither torch nor transformers. Where no engine can be built the bundle is
complete and the exit code 6.
"""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import click
import numpy as np
from numpy.typing import NDArray

from export.guard.batches import BATCH, batch_size
from export.guard.heads import HeadRequest
from export.guard.images import parity_images
from export.guard.options import PARITY_IMAGES, checkpoint_options, model_options, print_manifest, source_options
from export.tensorrt.builder import EngineOptions, EnginePrecision, Report
from export.tensorrt.engine import (
    Answers,
    Device,
    EnginePart,
    MakeRunner,
    add_engine,
    current_engine,
    parts_of,
    require_precisions,
)
from export.tensorrt.messages import title_of
from export.tensorrt.request import Builder, EngineRequest, check_options, find_device
from export.tensorrt.targets import DEFAULT_TARGETS, parse_targets, shown_targets
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.tensorrt_runner import TensorRTRunner
from safevlm.contract.graph_fit import Role
from safevlm.contract.manifest import Manifest
from safevlm.contract.parity import judge_of
from safevlm.errors import EngineUnavailableError, InputError, PrecisionError
from safevlm.files.user_cache import user_cache
from safevlm.terminal.commandline import printable, run
from safevlm.terminal.options import parse_grid

if TYPE_CHECKING:
    from safevlm.checkpoint.checkpoint import Checkpoint
    from safevlm.checkpoint.family import TapSource

__all__ = ["build_into", "default_timing_cache", "device_command"]

Comparison: TypeAlias = "tuple[NDArray[Any], Answers]"
"""Inputs, and what ONNX Runtime answers."""
COMMAND = "export.trt"
STAGES = 5


def build_into(
    bundle: Bundle,
    request: EngineRequest,
    device: Device,
    *,
    make_runner: MakeRunner = TensorRTRunner,
    report: Report = lambda _: None,
) -> tuple[Manifest, bool]:
    """Give ``bundle`` its engines for ``device``; return its manifest and whether any was built.

    Raises BundleError for a bundle without the ONNX files it takes, MissingExtraError without ONNX Runtime,
    and those of :func:`export.tensorrt.engine.add_engine`.
    """
    check_options(request.options, device)
    parts = parts_of(bundle, request.options, device)
    old = [part for part in parts if request.rebuild or current_engine(bundle, part, device) is None]
    if not old:
        return bundle.manifest, False
    manifest, timing_cache = bundle.manifest, None
    comparisons: dict[EnginePart, Comparison] = dict.fromkeys(old, (np.empty(0), {}))
    if device.gpu is not None:
        timing_cache = request.timing_cache or default_timing_cache(device)
        images = parity_images(bundle.manifest.preprocessing, request.parity_images, request.images)
        report(f"running ONNX Runtime on {len(images)} images")
        comparisons = _comparisons(bundle, parts, images)
    for part in old:
        manifest = add_engine(
            bundle, part, device, *comparisons[part], make_runner, timing_cache=timing_cache, report=report
        )
    return manifest, True


def default_timing_cache(device: Device) -> Path:
    """Return the file in the user's cache folder that belongs to this TensorRT and this model of GPU."""
    assert device.gpu is not None
    capability = device.gpu.compute_capability.replace(".", "")
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.gpu.name).strip("-")
    return user_cache() / f"tensorrt-{device.version}-sm{capability}-{name}.timing"


def device_command(bundle: Path, request: EngineRequest, *, as_json: bool = False) -> str:
    """Return the command line that builds the requested engine on a device."""
    words: list[object] = ["python", "-m", "export.trt", "--bundle", bundle, *_engine_options(request)]
    words += ["--images", request.images] if request.images is not None else []
    words += ["--parity-images", request.parity_images] if request.parity_images != PARITY_IMAGES else []
    words += ["--json"] if as_json else []
    return shlex.join(str(word) for word in words)


def _engine_options(request: EngineRequest) -> list[object]:
    """Return the options, other than by default, that ask for the same engine."""
    plain, options = EngineOptions(), request.options
    words: list[object] = ["--precision", options.precision] if options.precision != plain.precision else []
    words += ["--max-batch", options.max_batch] if options.max_batch != plain.max_batch else []
    words += ["--opt-batch", options.opt_batch] if options.opt_batch != plain.opt_batch else []
    words += ["--workspace-mib", options.workspace_mib] if options.workspace_mib is not None else []
    words += ["--hardware-compatible"] if options.hardware_compatible else []
    words += ["--version-compatible"] if options.version_compatible else []
    words += ["--timing-cache", request.timing_cache] if request.timing_cache is not None else []
    words += ["--builder", request.builder] if request.builder != "auto" else []
    words += ["--targets", ",".join(request.targets)] if request.targets is not None else []
    words += ["--rebuild"] if request.rebuild else []
    return words


def _comparisons(
    bundle: Bundle, parts: Sequence[EnginePart], images: NDArray[np.uint8]
) -> dict[EnginePart, Comparison]:
    """Return what each engine is fed with to be compared, and what ONNX Runtime answers: a head reads embeddings."""
    inputs: NDArray[Any] = images
    found: dict[EnginePart, Comparison] = {}
    for part in parts:
        answers = _reference(bundle, part, inputs)
        found[part] = inputs, answers
        inputs = answers.get("embeddings", inputs)
    return found


def _reference(bundle: Bundle, part: EnginePart, inputs: NDArray[Any]) -> Answers:
    """Return all that a part's file gives, on the CPU: a GPU might use TensorFloat-32."""
    size = BATCH if part.role == "head" else batch_size(*inputs.shape[1:3])
    with OnnxRuntimeRunner(bundle, part.judge(bundle), providers=["CPUExecutionProvider"]) as runner:
        runs = [runner.run_file(inputs[start : start + size]) for start in range(0, len(inputs), size)]
    return {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}


# -- the command ----------------------------------------------------------------------------------------


@click.command(name="trt")
@model_options(required=False)
@click.option("--bundle", type=click.Path(path_type=Path), help="Existing bundle, instead of --model.")
@click.option(
    "--precision",
    type=click.Choice(get_args(EnginePrecision)),
    default=EngineOptions.precision,
    show_default=True,
    help="Precision of the engine; int8 needs the bundle's int8 file and TensorRT 10 or newer.",
)
@click.option(
    "--builder",
    type=click.Choice(get_args(Builder)),
    default=EngineRequest.builder,
    show_default=True,
    help="TensorRT for the GPU here, or TensorRT-RTX for --targets; auto prefers TensorRT.",
)
@click.option(
    "--targets",
    help="GPUs that TensorRT-RTX compiles for, by compute capability, separated by commas.  [default: "
    f"{','.join(DEFAULT_TARGETS)}]",
)
@click.option("--max-batch", type=int, help="Maximum batch size.  [default: up to 8, as 4 GiB of scratch memory allow]")
@click.option(
    "--opt-batch", type=int, default=EngineOptions.opt_batch, show_default=True, help="Batch size to optimize for."
)
@click.option(
    "--workspace-mib", type=int, help="Maximum scratch memory of a layer in MiB.  [default: the GPU's memory]"
)
@click.option("--hardware-compatible", is_flag=True, help="Run on every GPU from compute capability 8.0 up; slower.")
@click.option("--version-compatible", is_flag=True, help="Run with newer releases of this major TensorRT; slower.")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Kernel timings, read and updated.  [default: in the user's cache folder]",
)
@click.option("--rebuild", is_flag=True, help="Rebuild an engine that is up to date.")
@checkpoint_options
def main(
    model: str | None,
    bundle: Path | None,
    out: Path | None,
    precision: EnginePrecision,
    builder: Builder,
    targets: str | None,
    max_batch: int | None,
    opt_batch: int,
    workspace_mib: int | None,
    hardware_compatible: bool,
    version_compatible: bool,
    timing_cache: Path | None,
    rebuild: bool,
    revision: str | None,
    tap: TapSource | None,
    grid: str | None,
    images: str | None,
    guard: Path | None,
    labels: Path | None,
    min_agreement: float,
    embeddings: bool,
    parity_images: int,
    as_json: bool,
) -> None:
    """Build a TensorRT engine for the guard of --model or --bundle.

    TensorRT builds for the GPU here. TensorRT-RTX builds for the GPUs in --targets and needs no GPU.

    Exits with 6 where no engine can be built; the bundle is complete then, and the message gives the command
    for the device.
    """
    head = HeadRequest(guard=guard, images=images, labels=labels, min_agreement=min_agreement, grid=parse_grid(grid))
    request = EngineRequest(
        options=EngineOptions(
            precision=precision,
            max_batch=max_batch,
            opt_batch=opt_batch,
            workspace_mib=workspace_mib,
            hardware_compatible=hardware_compatible,
            version_compatible=version_compatible,
        ),
        builder=builder,
        targets=None if targets is None else parse_targets(targets),
        rebuild=rebuild,
        timing_cache=timing_cache,
        images=head.folder,
        parity_images=parity_images,
    )
    if bundle is not None:
        given = {"model": model, "out": out, "revision": revision, "tap": tap, "grid": grid}
        _refuse_with_bundle(**given, guard=guard, labels=labels, embeddings=embeddings or None)
        opened = open_bundle(bundle)
    elif model is not None:
        from safevlm.checkpoint.checkpoint import open_checkpoint

        _check_request(request)
        checkpoint = open_checkpoint(model, tap=tap, revision=revision)
        opened = _export(checkpoint, out, request, head, embeddings=embeddings)
    else:
        raise InputError("--model or --bundle is missing. Give one of them.")
    again = () if model is None else source_options(model, revision=revision, tap=tap, grid=grid)
    _build_and_print(opened, request, again, as_json=as_json)


def _refuse_with_bundle(**given: object) -> None:
    """Raise InputError for options that say how a checkpoint is exported."""
    wrong = [f"--{name}" for name, value in given.items() if value is not None]
    if wrong:
        raise InputError(
            f"{', '.join(wrong)} cannot be combined with --bundle, because the bundle is already exported."
        )


def _export(
    checkpoint: Checkpoint, out: Path | None, request: EngineRequest, head: HeadRequest, *, embeddings: bool
) -> Bundle:
    """Write the bundle of a checkpoint with the ONNX files that any TensorRT may ask for."""
    from export.onnx import default_out, export_with_progress

    out = out or default_out(checkpoint)
    try:
        export_with_progress(
            checkpoint,
            out,
            head,
            precisions=("fp32", "fp16"),
            parity_images=request.parity_images,
            embeddings=embeddings,
            int8=request.options.precision == "int8",
        )
    except PrecisionError as error:
        if not error.left_out or request.options.precision in error.left_out:
            raise
        click.echo(f"note: {printable(str(error))}", err=True)  # this engine does not need it
    return open_bundle(out, verify=False)


def _check_request(request: EngineRequest) -> None:
    """Refuse targets and options before the export, which can take hours. Raises InputError."""
    try:
        device = find_device(request)
    except EngineUnavailableError:  # told once the bundle is complete
        return
    check_options(request.options, device)


def _build_and_print(bundle: Bundle, request: EngineRequest, again: Sequence[object], *, as_json: bool) -> None:
    """Build, and print the manifest whether an engine could be built or not; ``again`` as print_manifest takes it."""
    again = (*(again or bundle.manifest.source.model_option.split()), *_engine_options(request))
    try:
        device = _device(bundle, request, as_json)
        with _progress() as report:
            manifest, built = build_into(bundle, request, device, report=report)
    except EngineUnavailableError:
        there = Manifest.read(bundle.folder)  # of two engines one may be there
        print_manifest(there, bundle.folder, again, as_json=as_json, command=COMMAND)
        raise
    notes = _engine_notes(replace(bundle, manifest=manifest), request.options, device)
    print_manifest(manifest, bundle.folder, again, as_json=as_json, command=COMMAND, notes=notes)
    if not built:
        click.echo("the engine is up to date; give --rebuild to build it again", err=True)


def _engine_notes(bundle: Bundle, options: EngineOptions, device: Device) -> list[str]:
    """Say which engines there are now, where they run, and whether they ever did."""
    engines = [current_engine(bundle, part, device) for part in parts_of(bundle, options, device)]
    paths = " and ".join(file.path for file in engines if file is not None)
    title = "engine" if len(engines) == 1 else "engines"
    here = f"{platform.system()} {platform.machine()}"
    if device.gpu is not None:
        return [f"{title}: {paths}", f"  for {device.gpu.name} with {title_of(device.trt)} on {here}"]
    return [
        f"{title}: {paths}",
        f"  for {shown_targets(device.targets)} with {title_of(device.trt)} on {here}",
        "  not run yet: each device compares it with ONNX Runtime before its first use",
    ]


def _device(bundle: Bundle, request: EngineRequest, as_json: bool) -> Device:
    """Return the device, or say how to go on where there is none."""
    try:
        return find_device(request)
    except EngineUnavailableError as error:
        role: Role = "guard" if bundle.manifest.source.standalone else "vision"
        require_precisions(bundle, {judge_of(request.options.precision), request.options.precision}, role)
        raise EngineUnavailableError(
            f"{error} The bundle in {bundle.folder} is complete. Copy it to the device and run this there, with "
            f"the folder's name on the device:\n  {device_command(bundle.folder, request, as_json=as_json)}"
        ) from error


@contextmanager
def _progress() -> Iterator[Report]:
    """Give a report that moves a bar on a terminal, or prints lines elsewhere, on standard error."""
    if not sys.stderr.isatty():
        yield lambda stage: click.echo(stage, err=True)
        return
    with click.progressbar(length=STAGES, file=sys.stderr, item_show_func=lambda stage: stage) as bar:
        yield lambda stage: bar.update(1, str(stage))


if __name__ == "__main__":
    run(main)
