"""Split a guard off its checkpoint: ``python -m export.onnx --model tiny-safegem --out DIR``.

A guard bundle with one ONNX file a precision: uint8 pixels in, probabilities and logits out. Exact for a guard
that taps the projector. One behind the language model gets a distilled head; without one, the bundle holds the
exact parts, which gate after the image prefill.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from export.guard.bundle import bundle_draft, check_destination, origin_of, remove_file, write_manifest
from export.guard.graph import PRECISIONS, Precision, build_graph, build_head_graph, build_vision_graph
from export.guard.half_precision import check_reference, fitting, half_fault, watched
from export.guard.heads import HeadRequest, find_head
from export.guard.images import FEWEST_HELD_OUT, MOST_HELD_OUT, parity_images
from export.guard.images import int8_images as pictures_for_int8
from export.guard.int8 import FLAVOURS, Int8Limits, add_int8, default_file
from export.guard.left_out import LeftOut
from export.guard.options import PARITY_IMAGES, checkpoint_options, model_options, print_manifest, source_options
from export.guard.parts import Part, batches, describe_part, write_part
from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.checkpoint.family import TapSource
from safevlm.contract.manifest import GuardFile, Head, Manifest
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import InputError, ParityError, PrecisionError
from safevlm.machine import now, return_freed_memory
from safevlm.network.distilled_head import DistilledHead
from safevlm.network.head import build_head
from safevlm.network.reference import GuardModel, VisionPath, build_reference_guard, build_vision
from safevlm.terminal.commandline import run
from safevlm.terminal.options import parse_grid
from safevlm.version import VERSION

__all__ = ["ExportOptions", "export_guard"]

INT8_CALIBRATION = 64
"""Pictures that set the scales of static INT8."""
INT8 = "int8"

Bytes = NDArray[np.uint8]
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a guard bundle is made with.

    ``grid`` is the input's height and width in pixels where the family takes many sizes (Qwen2.5-VL);
    ``images`` a folder of pictures for the parity check, else drawn ones; ``parity_images`` how many;
    ``distilled`` the head of a guard behind the language model; ``embeddings`` adds the image embeddings.
    """

    precisions: tuple[Precision, ...] = ("fp32",)
    grid: tuple[int, int] | None = None
    images: Path | None = None
    parity_images: int = PARITY_IMAGES
    distilled: DistilledHead | None = None
    embeddings: bool = False
    int8: bool = False
    """Write INT8 files of the float32 one, too: one for accelerators, one for CPUs."""
    int8_limits: Int8Limits = field(default_factory=Int8Limits)
    int8_images: int = MOST_HELD_OUT  # held-out images that judge INT8, at most

    def __post_init__(self) -> None:
        unknown = [precision for precision in self.precisions if precision not in PRECISIONS]
        if unknown or not self.precisions or len(set(self.precisions)) != len(self.precisions):
            asked = ", ".join(self.precisions) or "none"
            raise InputError(
                f"--precision {asked}: give one or more of {', '.join(PRECISIONS)}, each once; int8 needs fp32 as well."
            )
        if self.int8 and "fp32" not in self.precisions:
            raise InputError("--precision int8 is made from fp32 and compared with it. Give fp32,int8.")
        if self.parity_images < 1 or self.int8_images < 1:
            fewest = min(self.parity_images, self.int8_images)
            raise InputError(f"--parity-images and --int8-images must be at least 1, not {fewest}.")


def export_guard(
    checkpoint: Checkpoint,
    out: Path,
    options: ExportOptions = ExportOptions(),
    *,
    distil: Callable[[], DistilledHead | None] | None = None,
    report: Report = lambda _: None,
) -> Manifest:
    """Write the guard of ``checkpoint`` as a bundle at ``out`` and return its manifest.

    A guard behind the language model without a distilled head becomes its two exact parts, and the bundle says
    ``standalone: false``. ``distil`` gives a head where ``options`` have none; it may take hours, so it is called once
    all else is checked. ``report`` is told each stage as it begins. An existing bundle at ``out`` is replaced once the
    new one is complete. A precision that the checkpoint's numbers do not fit is left out; that is raised at the end.

    Raises GuardHeadError for a distilled head of another checkpoint; CheckpointError; ParityError; PrecisionError,
    with ``left_out``, when the bundle at ``out`` lacks a precision, and without when none of those asked for is left.
    """
    check_destination(out)
    _check_judges(checkpoint, options)
    if distil is not None:
        options = replace(options, distilled=distil())
    report("reading the vision tower, projector and head")
    standalone = options.distilled is not None or checkpoint.tap.source == "projector"
    if options.int8 and not standalone:
        raise InputError(
            f"--precision int8 needs a standalone guard, which {checkpoint.name} does not have. Give --images or "
            "--guard for one, or leave int8 out."
        )
    left_out = LeftOut(options.precisions)
    with bundle_draft(out) as draft:
        write = _write_guard if standalone else _write_exact_parts
        preprocessing, parts = write(checkpoint, options, draft, report, left_out)
        gc.collect()  # torch's weights, which exported programs hold in circles, go before ONNX Runtime's come
        files: list[GuardFile] = []
        for part in parts:
            files += _describe(checkpoint, options, part, draft, report, left_out)
        if options.int8:
            files += _int8_files(checkpoint, preprocessing, files[0], draft, options, report, left_out)
        manifest = _manifest(checkpoint, preprocessing, files, options.distilled)
        write_manifest(draft, manifest)
    left_out.report(out, [file.path for file in files if file.kind == "onnx"])
    return manifest


def _describe(
    checkpoint: Checkpoint, options: ExportOptions, part: Part, draft: Path, report: Report, left_out: LeftOut
) -> list[GuardFile]:
    """Check and time a part; return its entries, or none where float16 cannot hold the checkpoint's numbers.

    What float16 fails at is looked for in weights that are read again: those that were exported are halved.
    """
    report(f"{part.name}: checking parity and timing")
    try:
        return describe_part(part, draft)
    except ParityError:
        if part.precision != "fp16":
            raise
        report(f"{part.name}: looking for what float16 cannot hold")
        model: GuardModel | VisionPath
        if part.role == "guard":
            model = build_reference_guard(checkpoint, grid=options.grid, distilled=options.distilled)
        else:
            model = build_vision(checkpoint, options.grid)
        reason = half_fault(checkpoint, model, part.inputs, embeddings=options.embeddings)
        if reason is None:
            raise
    left_out.add("fp16", reason)
    remove_file(draft / part.name)
    return []


def _check_judges(checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Raise InputError when too few pictures would judge INT8."""
    if options.int8 and options.int8_images < FEWEST_HELD_OUT and not checkpoint.random_weights:
        raise InputError(
            f"--int8-images {options.int8_images} is too small to show a change of one label in a thousand. Give at "
            f"least {FEWEST_HELD_OUT}; only random weights may be judged on fewer."
        )


def _write_guard(
    checkpoint: Checkpoint, options: ExportOptions, draft: Path, report: Report, left_out: LeftOut
) -> tuple[Preprocessing, list[Part]]:
    """Write the guard's file of each precision; return the contract and the files, to be checked."""
    guard = build_reference_guard(checkpoint, grid=options.grid, distilled=options.distilled)
    images = parity_images(guard.preprocessing, options.parity_images, options.images)
    report(f"running the torch path on {len(images)} images")
    with watched(guard.vision.core.named_modules()) as seen:
        reference = {"probs": _answers(lambda rgb: guard(rgb)[0], images)}
    if options.embeddings:
        reference["embeddings"] = _answers(guard.features, images)
    check_reference(checkpoint, seen, reference, len(images))
    precisions = fitting(checkpoint, guard, seen, options.precisions, left_out, embeddings=options.embeddings)
    parts = []
    for precision in precisions:
        graph = build_graph(guard, precision, embeddings=options.embeddings)
        part = Part(
            role="guard",
            precision=precision,
            outputs=graph.outputs,
            input_name="rgb",
            inputs=images,
            reference=reference,
        )
        report(f"{part.name}: exporting to ONNX")
        write_part(part, graph, draft)
        parts.append(part)
    return guard.preprocessing, parts


def _write_exact_parts(
    checkpoint: Checkpoint, options: ExportOptions, draft: Path, report: Report, left_out: LeftOut
) -> tuple[Preprocessing, list[Part]]:
    """Write the checkpoint's own head and the vision path of each precision.

    The head is checked on image embeddings: they have the shape of the hidden states that it will read.
    """
    vision, head = build_vision(checkpoint, options.grid), build_head(checkpoint)
    images = parity_images(vision.preprocessing, options.parity_images, options.images)
    report(f"running the torch path on {len(images)} images")
    with watched(vision.core.named_modules()) as seen:
        embeddings = _answers(vision, images)
    probs = _answers(lambda hidden: torch.softmax(head(hidden.mean(dim=1)), dim=-1), embeddings)
    check_reference(checkpoint, seen, {"embeddings": embeddings, "probs": probs}, len(images))
    precisions = fitting(checkpoint, vision, seen, options.precisions, left_out, embeddings=True)
    judge = build_head_graph(head)
    parts = [
        Part(
            role="head",
            precision="fp32",
            outputs=judge.outputs,
            input_name="hidden",
            inputs=embeddings,
            reference={"probs": probs},
        )
    ]
    report(f"{parts[0].name}: exporting to ONNX")
    write_part(parts[0], judge, draft)
    for precision in precisions:
        graph = build_vision_graph(vision, checkpoint.family.key, precision)
        part = Part(
            role="vision",
            precision=precision,
            outputs=graph.outputs,
            input_name="rgb",
            inputs=images,
            reference={"embeddings": embeddings},
        )
        report(f"{part.name}: exporting to ONNX")
        write_part(part, graph, draft)
        parts.append(part)
    return vision.preprocessing, parts


def _int8_files(
    checkpoint: Checkpoint,
    preprocessing: Preprocessing,
    source: GuardFile,
    draft: Path,
    options: ExportOptions,
    report: Report,
    left_out: LeftOut,
) -> list[GuardFile]:
    """Write both INT8 flavours of the float32 file. Random weights have no verdicts to lose: nothing is put back.

    A flavour that cannot be had is put into ``left_out``.
    """
    limits = Int8Limits(flips=1, auroc=1) if checkpoint.random_weights else options.int8_limits
    scales_from = min(INT8_CALIBRATION, options.int8_images)
    images = pictures_for_int8(preprocessing, scales_from, options.images, held_out=options.int8_images)
    widths = checkpoint.head.widths if options.distilled is None else options.distilled.widths
    add = partial(add_int8, classes=checkpoint.classes, head_layers=len(widths) - 1, report=report)
    files = []
    for flavour in FLAVOURS:
        try:
            files += add(draft, source, flavour, images, limits)
        except PrecisionError as error:  # noqa: PERF203
            left_out.add(flavour, str(error))
            remove_file(draft / f"guard.{flavour}.onnx")
    return files


def _answers(path: Callable[[torch.Tensor], torch.Tensor], inputs: NDArray[np.generic]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return np.concatenate([path(torch.from_numpy(piece)).float().numpy() for piece in batches(inputs)])


def _manifest(
    checkpoint: Checkpoint, preprocessing: Preprocessing, files: Sequence[GuardFile], distilled: DistilledHead | None
) -> Manifest:
    tap = checkpoint.tap
    head = Head(kind="exact", reads=tap.source, pooling=tap.pooling, widths=checkpoint.head.widths)
    if distilled is not None:
        head = Head(
            kind="distilled",
            reads="projector",
            pooling=distilled.pooling,
            widths=distilled.widths,
            sha256=distilled.sha256 or None,
        )
    source, stated_tap = origin_of(checkpoint, standalone=head.reads == "projector")
    return Manifest(
        created=now(),
        tool_version=VERSION,
        source=source,
        tap=stated_tap,
        head=head,
        classes=checkpoint.classes,
        preprocessing=preprocessing,
        files=tuple(files),
        default_file=default_file(files),
        fidelity=None if distilled is None else distilled.fidelity,
    )


# -- the command ----------------------------------------------------------------------------------------


def default_out(checkpoint: Checkpoint) -> Path:
    """Return where a bundle goes when ``--out`` is not given: ``bundles/NAME``."""
    return Path("bundles") / checkpoint.name.replace("/", "--")


def export_with_progress(
    checkpoint: Checkpoint,
    out: Path,
    request: HeadRequest,
    *,
    precisions: tuple[Precision, ...],
    parity_images: int,
    embeddings: bool = False,
    int8: bool = False,
    int8_images: int = MOST_HELD_OUT,
) -> Manifest:
    """Find or distil the head that is asked for, and export, with a line of progress on standard error."""
    from rich.console import Console
    from rich.markup import escape

    options = ExportOptions(
        precisions=precisions,
        grid=request.grid,
        images=request.folder,
        parity_images=parity_images,
        embeddings=embeddings,
        int8=int8,
        int8_images=int8_images,
    )
    return_freed_memory()
    with Console(stderr=True).status("opening") as status:
        report: Report = lambda stage: status.update(escape(stage))  # noqa: E731
        head = partial(find_head, checkpoint, request, report=report)
        return export_guard(checkpoint, out, options, distil=head, report=report)


@click.command()
@model_options(required=True)
@click.option(
    "--precision", default="fp32", show_default=True, help="Precisions to write, separated by commas: fp32, fp16, int8."
)
@checkpoint_options
@click.option(
    "--int8-images",
    type=click.IntRange(1),
    default=MOST_HELD_OUT,
    show_default=True,
    help="Maximum number of held-out images that int8 is judged on; at least 200, except for random weights.",
)
def main(
    model: str,
    out: Path | None,
    precision: str,
    revision: str | None,
    tap: TapSource | None,
    grid: str | None,
    images: str | None,
    guard: Path | None,
    labels: Path | None,
    min_agreement: float,
    embeddings: bool,
    parity_images: int,
    int8_images: int,
    as_json: bool,
) -> None:
    """Split the guard off MODEL into a standalone ONNX bundle, checked against the torch path."""
    request = HeadRequest(guard=guard, images=images, labels=labels, min_agreement=min_agreement, grid=parse_grid(grid))
    checkpoint = open_checkpoint(model, tap=tap, revision=revision)
    out = out or default_out(checkpoint)
    asked = precision.split(",")
    again = source_options(model, revision=revision, tap=tap, grid=grid)
    try:
        manifest = export_with_progress(
            checkpoint,
            out,
            request,
            precisions=tuple(each for each in asked if each != INT8),  # type: ignore[misc]  # checked by ExportOptions
            parity_images=parity_images,
            embeddings=embeddings,
            int8=INT8 in asked,
            int8_images=int8_images,
        )
    except PrecisionError as error:
        if error.left_out:
            print_manifest(Manifest.read(out), out, again, as_json=as_json)
        raise
    print_manifest(manifest, out, again, as_json=as_json)


if __name__ == "__main__":
    run(main)
