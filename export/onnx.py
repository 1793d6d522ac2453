"""Split a guard off its checkpoint: ``python -m export.onnx --model tiny-safegem --out DIR``.

A guard bundle with one ONNX file a precision: uint8 pixels in, probabilities and logits out. Exact for a
guard that taps the projector; one behind the language model is refused (see ``calibration.distill``).
"""

from __future__ import annotations

import datetime
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from export.bundle import bundle_draft, check_destination, write_manifest
from export.graph import PRECISIONS, GuardGraph, Precision, build_graph
from export.images import parity_images
from export.options import PARITY_IMAGES, checkpoint_options, print_manifest
from export.parity import TOLERANCES, check_parity
from models.checkpoint import Checkpoint, open_checkpoint
from models.commandline import grid_option, run
from models.errors import InputError
from models.family import TapSource
from models.machine import machine_name
from models.manifest import GuardFile, Head, Latency, Manifest, Source, Tap, TensorSpec
from models.reference import GuardModel, build_reference_guard
from models.version import VERSION
from runtimes.bundle import sha256_of

__all__ = ["ExportOptions", "export_guard"]

OPSET = 20
INSIDE = 2**30
"""Weights up to this many bytes stay inside the ONNX file; larger ones go into one ``.data`` file beside it."""
REFERENCE = "transformers' own forward pass in float32"
_BATCH = 8

Bytes = NDArray[np.uint8]
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a guard bundle is made with.

    ``grid`` is the input's height and width in pixels where the family takes many sizes (Qwen2.5-VL);
    ``images`` a folder of pictures for the parity check, else drawn ones; ``parity_images`` how many.
    """

    precisions: tuple[Precision, ...] = ("fp32",)
    grid: tuple[int, int] | None = None
    images: Path | None = None
    parity_images: int = PARITY_IMAGES

    def __post_init__(self) -> None:
        unknown = [precision for precision in self.precisions if precision not in PRECISIONS]
        if unknown or not self.precisions or len(set(self.precisions)) != len(self.precisions):
            asked = ", ".join(self.precisions) or "none"
            raise InputError(f"precision {asked}: one or several of {', '.join(PRECISIONS)}, each once, are allowed.")
        if self.parity_images < 1:
            raise InputError(f"{self.parity_images} parity images: at least 1 is needed.")


def export_guard(
    checkpoint: Checkpoint, out: Path, options: ExportOptions = ExportOptions(), *, report: Report = lambda _: None
) -> Manifest:
    """Write the guard of ``checkpoint`` as a bundle at ``out`` and return its manifest.

    ``report`` is told each stage as it begins. An existing bundle at ``out`` is replaced once the new one
    is complete.

    Errors: GuardHeadError for a guard that taps the language model; CheckpointError; ParityError.
    """
    check_destination(out)
    report("reading the vision tower, projector and head")
    guard = build_reference_guard(checkpoint, grid=options.grid)
    images = parity_images(guard.preprocessing, options.parity_images, options.images)
    report(f"running the torch path on {len(images)} images")
    reference = _reference_probs(guard, images)
    with bundle_draft(out) as draft:
        files: list[GuardFile] = []
        for precision in sorted(options.precisions, key=PRECISIONS.index):
            files += _export_file(guard, precision, draft, images, reference, report)
        manifest = _manifest(checkpoint, guard, files)
        write_manifest(draft, manifest)
    return manifest


def _reference_probs(guard: GuardModel, images: Bytes) -> NDArray[np.float32]:
    with torch.inference_mode():
        parts = [guard(torch.from_numpy(part))[0].numpy() for part in _batches(images)]
    return np.concatenate(parts)


def _batches(images: Bytes) -> Iterator[Bytes]:
    for start in range(0, len(images), _BATCH):
        yield images[start : start + _BATCH]


def _export_file(
    guard: GuardModel,
    precision: Precision,
    folder: Path,
    images: Bytes,
    reference: NDArray[np.float32],
    report: Report,
) -> list[GuardFile]:
    """Write one precision's ONNX file, check it, time it; return its entries in the manifest."""
    report(f"{precision}: exporting to ONNX")
    path = folder / f"guard.{precision}.onnx"
    write_onnx(build_graph(guard, precision), images[:2], path)
    report(f"{precision}: checking parity and timing")
    found, latency = _run(path, images)
    parity = check_parity(reference, found, TOLERANCES[precision], what=path.name, reference=REFERENCE)
    height, width, classes = *images.shape[1:3], len(guard.classes)
    outputs = tuple(TensorSpec(name=name, shape=("N", classes), dtype="float32") for name in ("probs", "logits"))
    main_file = GuardFile(
        path=path.name,
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        kind="onnx",
        precision=precision,
        inputs=(TensorSpec(name="rgb", shape=("N", height, width, 3), dtype="uint8"),),
        outputs=outputs,
        parity=parity,
        latency=latency,
    )
    data = path.with_name(path.name + ".data")
    if not data.exists():
        return [main_file]
    beside = GuardFile(
        path=data.name, sha256=sha256_of(data), bytes=data.stat().st_size, kind="onnx_data", precision=precision
    )
    return [main_file, beside]


def write_onnx(graph: GuardGraph, example: Bytes, path: Path) -> None:
    """Export a graph with a free batch size, weights inside, or beside it when they exceed 1 GiB."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    weights = sum(p.numel() * p.element_size() for p in graph.parameters())
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            (torch.from_numpy(example),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["rgb"],
            output_names=["probs", "logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            verbose=False,
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)
    program.save(str(path), external_data=weights > INSIDE)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says about itself: torchvision is not needed, copyreg's use is its own."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)


def _run(path: Path, images: Bytes) -> tuple[NDArray[np.float32], Latency]:
    """Run a file in ONNX Runtime: probabilities of all images, latency of single ones."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    probs = np.concatenate([session.run(["probs"], {"rgb": part})[0] for part in _batches(images)])
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < 30 and time.perf_counter() - started < 5):
        begin = time.perf_counter()
        session.run(["probs"], {"rgb": images[:1]})
        times.append((time.perf_counter() - begin) * 1000)
    latency = Latency(
        median_ms=float(np.median(times)),
        p95_ms=float(np.percentile(times, 95)),
        batch=1,
        runtime=f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider",
        machine=machine_name(),
    )
    return probs, latency


def _manifest(checkpoint: Checkpoint, guard: GuardModel, files: Sequence[GuardFile]) -> Manifest:
    tap = checkpoint.tap
    used = [*checkpoint.vision_names(), *checkpoint.head_names()]
    return Manifest(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tool_version=VERSION,
        source=Source(
            checkpoint=checkpoint.name,
            revision=checkpoint.revision,
            sha256=checkpoint.tensors.sha256(used),
            family=checkpoint.family.key,
        ),
        tap=Tap(source=tap.source, pooling=tap.pooling, tokens=tap.tokens, learned=tap.learned, evidence=tap.evidence),
        head=Head(kind="exact", reads=tap.source, pooling=tap.pooling, widths=checkpoint.head.widths),
        classes=guard.classes,
        preprocessing=guard.preprocessing,
        files=tuple(files),
        default_file=files[0].path,
    )


# -- the command ----------------------------------------------------------------------------------------


def default_out(checkpoint: Checkpoint) -> Path:
    """Return where a bundle goes when ``--out`` is not given: ``bundles/NAME``."""
    return Path("bundles") / checkpoint.name.replace("/", "--")


def export_with_progress(checkpoint: Checkpoint, out: Path, options: ExportOptions) -> Manifest:
    """Export, with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    stages = 2 + 2 * len(options.precisions)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("opening", total=stages + 1)

        def report(stage: str) -> None:
            progress.update(task, advance=1, description=stage)

        return export_guard(checkpoint, out, options, report=report)


@click.command()
@click.option("--model", required=True, help="Folder, one of the six names, hub id[@revision], or tiny-safegem.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the bundle.  [default: bundles/NAME]")
@click.option("--precision", default="fp32", show_default=True, help="fp32, fp16 or both: fp32,fp16.")
@checkpoint_options
def main(
    model: str,
    out: Path | None,
    precision: str,
    revision: str | None,
    tap: TapSource | None,
    grid: str | None,
    images: Path | None,
    parity_images: int,
    as_json: bool,
) -> None:
    """Split the guard off MODEL into a standalone ONNX bundle, checked against the torch path."""
    options = ExportOptions(
        precisions=tuple(precision.split(",")),  # type: ignore[arg-type]  # checked by ExportOptions
        grid=grid_option(grid),
        images=images,
        parity_images=parity_images,
    )
    checkpoint = open_checkpoint(model, tap=tap, revision=revision)
    out = out or default_out(checkpoint)
    print_manifest(export_with_progress(checkpoint, out, options), out, as_json=as_json)


if __name__ == "__main__":
    run(main)
