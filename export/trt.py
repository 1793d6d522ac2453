"""Add a TensorRT engine to a guard: ``python -m export.trt --model M`` or, on a device, ``--bundle DIR``.

With ``--model`` everything ``export.onnx`` does comes first, in fp32 and fp16. An engine runs only with the
TensorRT version and on the GPU it was built with, so it is built where it will run: ``--bundle`` needs neither
torch nor transformers. Where no engine can be built the bundle is complete and the exit code 6.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click
import numpy as np
from numpy.typing import NDArray

from export.guard.batches import batch_size
from export.guard.heads import HeadRequest
from export.guard.images import parity_images
from export.guard.options import PARITY_IMAGES, checkpoint_options, model_options, print_manifest, source_options
from export.tensorrt.builder import EngineOptions, EnginePrecision, Report, builder_api
from export.tensorrt.engine import Device, MakeRunner, add_engine, current_engine, judge_of, require_precisions
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.cuda import current_gpu, free_memory, load_cuda
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.runner import GuardOutput
from runtimes.guard.tensorrt_runner import TensorRTRunner, import_tensorrt
from safevlm.contract.manifest import Manifest
from safevlm.errors import EngineUnavailableError, InputError, MissingExtraError, PrecisionError
from safevlm.files.user_cache import user_cache
from safevlm.terminal.commandline import printable, run
from safevlm.terminal.options import parse_grid

if TYPE_CHECKING:
    from safevlm.checkpoint.checkpoint import Checkpoint
    from safevlm.checkpoint.family import TapSource

__all__ = ["EngineRequest", "build_into", "default_timing_cache", "device_command", "find_device"]

PURPOSE = "building a TensorRT engine"
STAGES = 5


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """An engine to build: with what options, and how it is checked.

    ``rebuild`` builds even what is there already; ``timing_cache`` is a file, by default one a TensorRT version
    and GPU in the user's cache folder; ``images`` a folder of pictures for the parity check, else drawn ones.
    """

    options: EngineOptions = field(default_factory=EngineOptions)
    rebuild: bool = False
    timing_cache: Path | None = None
    images: Path | None = None
    parity_images: int = PARITY_IMAGES


def find_device() -> Device:
    """Return TensorRT and the GPU here; EngineUnavailableError names everything that is missing."""
    missing, trt, gpu, free = [], None, None, None
    try:
        trt = import_tensorrt()
        builder_api(str(trt.__version__))
    except MissingExtraError:
        missing.append("the package 'tensorrt' is not installed (pip install 'safevlm-edge[trt]'; JetPack brings it)")
    except EngineUnavailableError as error:
        missing.append(str(error).rstrip("."))
    try:
        cuda = load_cuda(PURPOSE)
        gpu, free = current_gpu(cuda), free_memory(cuda)
    except MissingExtraError:
        missing.append("the package 'cuda-python' is not installed (pip install 'safevlm-edge[trt]')")
    except InputError as error:
        missing.append(f"there is no usable NVIDIA GPU ({_reason(error)})")
    if missing or gpu is None:
        raise EngineUnavailableError(f"no engine was built here: {'; '.join(missing)}.")
    return Device(trt, gpu, free)


def build_into(
    bundle: Bundle,
    request: EngineRequest,
    device: Device,
    *,
    make_runner: MakeRunner = TensorRTRunner,
    report: Report = lambda _: None,
) -> tuple[Manifest, bool]:
    """Give ``bundle`` an engine for ``device``; return its manifest and whether one was built.

    Raises BundleError for a bundle without the ONNX files it takes, MissingExtraError without ONNX Runtime,
    and those of :func:`export.tensorrt.engine.add_engine`.
    """
    options = request.options
    source = builder_api(device.version).source_precision(options.precision)
    require_precisions(bundle, {judge_of(options.precision), source})
    if not request.rebuild and current_engine(bundle, options, device) is not None:
        return bundle.manifest, False
    images = parity_images(bundle.manifest.preprocessing, request.parity_images, request.images)
    report(f"running ONNX Runtime on {len(images)} pictures")
    manifest = add_engine(
        bundle,
        options,
        device,
        images,
        _reference(bundle, images, judge_of(options.precision)),
        make_runner,
        timing_cache=request.timing_cache or default_timing_cache(device),
        report=report,
    )
    return manifest, True


def default_timing_cache(device: Device) -> Path:
    """Return the file in the user's cache folder that belongs to this TensorRT and this model of GPU."""
    capability = device.gpu.compute_capability.replace(".", "")
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.gpu.name).strip("-")
    return user_cache() / f"tensorrt-{device.version}-sm{capability}-{name}.timing"


def device_command(bundle: Path, request: EngineRequest, *, as_json: bool = False) -> str:
    """Return the command line that builds the requested engine on a device."""
    plain, options = EngineOptions(), request.options
    words: list[object] = ["python", "-m", "export.trt", "--bundle", bundle, "--precision", options.precision]
    words += ["--max-batch", options.max_batch]
    words += ["--opt-batch", options.opt_batch] if options.opt_batch != plain.opt_batch else []
    words += ["--workspace-mib", options.workspace_mib] if options.workspace_mib is not None else []
    words += ["--hardware-compatible"] if options.hardware_compatible else []
    words += ["--version-compatible"] if options.version_compatible else []
    words += ["--timing-cache", request.timing_cache] if request.timing_cache is not None else []
    words += ["--rebuild"] if request.rebuild else []
    words += ["--images", request.images] if request.images is not None else []
    words += ["--parity-images", request.parity_images] if request.parity_images != PARITY_IMAGES else []
    words += ["--json"] if as_json else []
    return shlex.join(str(word) for word in words)


def _reference(bundle: Bundle, images: NDArray[np.uint8], precision: str) -> GuardOutput:
    """Return all that the file of a precision gives, on the CPU: a GPU might use TensorFloat-32."""
    file, size = bundle.file(precision), batch_size(*images.shape[1:3])
    with OnnxRuntimeRunner(bundle, file, providers=["CPUExecutionProvider"]) as runner:
        shared = runner.gives_embeddings
        parts = [runner.infer(images[start : start + size], embeddings=shared) for start in range(0, len(images), size)]
    return GuardOutput(
        probs=np.concatenate([part.probs for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
        embeddings=np.concatenate([part.embeddings for part in parts if part.embeddings is not None])
        if shared
        else None,
    )


def _reason(error: InputError) -> str:
    """Return what CUDA said, without the advice that follows it."""
    return str(error.__cause__ or error).rstrip(".")


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
@click.option("--max-batch", type=int, default=EngineOptions.max_batch, show_default=True, help="Maximum batch size.")
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
    max_batch: int,
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
    """Build a TensorRT engine of a guard for the GPU here: of MODEL, or of the bundle in a folder.

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

        checkpoint = open_checkpoint(model, tap=tap, revision=revision)
        opened = _export(checkpoint, out, request, head, embeddings=embeddings)
    else:
        raise InputError("nothing to build from: give --model M, or --bundle DIR with a bundle's folder.")
    again = () if model is None else source_options(model, revision=revision, tap=tap, grid=grid)
    _build_and_print(opened, request, again, as_json=as_json)


def _refuse_with_bundle(**given: object) -> None:
    """Raise InputError for options that say how a checkpoint is exported."""
    wrong = [f"--{name}" for name, value in given.items() if value is not None]
    if wrong:
        raise InputError(f"{', '.join(wrong)} cannot be combined with --bundle: a bundle is exported already.")


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


def _build_and_print(bundle: Bundle, request: EngineRequest, again: Sequence[object], *, as_json: bool) -> None:
    """Build, and print the manifest whether an engine could be built or not; ``again`` as print_manifest takes it."""
    again = again or bundle.manifest.source.model_option.split()
    if not bundle.manifest.source.standalone:
        print_manifest(bundle.manifest, bundle.folder, again, as_json=as_json)
        raise EngineUnavailableError(
            f"no engine was built: the bundle in {bundle.folder} is complete, but holds the guard's exact parts, which "
            "run around the language model; engines are built of guards that stand alone (--images DIR makes one)."
        )
    require_precisions(bundle, {"fp32"})
    try:
        with _progress() as report:
            manifest, built = build_into(bundle, request, _device(bundle, request, as_json), report=report)
    except EngineUnavailableError:
        print_manifest(bundle.manifest, bundle.folder, again, as_json=as_json)
        raise
    print_manifest(manifest, bundle.folder, again, as_json=as_json)
    if not built:
        click.echo("the engine is up to date and was not built again; --rebuild builds it", err=True)


def _device(bundle: Bundle, request: EngineRequest, as_json: bool) -> Device:
    """Return the device, or say how to go on where there is none."""
    try:
        return find_device()
    except EngineUnavailableError as error:
        require_precisions(bundle, {judge_of(request.options.precision), request.options.precision})
        raise EngineUnavailableError(
            f"{error} The bundle in {bundle.folder} is complete: copy it to the device and run there, with the "
            f"folder's name there,\n  {device_command(bundle.folder, request, as_json=as_json)}"
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
