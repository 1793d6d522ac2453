"""Fit a standalone guard head: ``python -m calibration.distill --model SafeLLaVA-7B --images DIR --out FILE``.

A guard behind the language model cannot be split off exactly. Its verdicts on images, without labels, teach a
new head on the projector's output, which an engine runs before the language model. How faithful it is, is
measured on images that neither trained nor chose it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from calibration.distilling.fidelity import fidelity
from calibration.distilling.student import Fit, Split, fit_head, split_by_content
from calibration.distilling.teacher import Lesson, check_tap, teach
from calibration.labelled.labels import content_of, read_labels
from calibration.sets.pictures import BuiltIn, Pictures, PictureSource, load_pictures, picture_source, shown
from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.checkpoint.hub import TINY_CHECKPOINTS
from safevlm.contract.class_names import safe_index
from safevlm.errors import CheckpointError, InputError
from safevlm.files.storage import check_writable
from safevlm.network.device import torch_device
from safevlm.network.distilled_head import DistilledHead
from safevlm.network.pooling import POOLINGS, Pooling
from safevlm.network.reference import guard_sha256
from safevlm.terminal.commandline import as_started, printable, run
from safevlm.terminal.options import device_option, grid_option, json_option, model_option, parse_grid, revision_option

__all__ = ["DistillOptions", "distill", "pictures_for"]

FEWEST = 200
"""Pictures below which no part of a split is large enough to say anything."""
SEEN_RARELY = 10
"""Training images of a class below which its verdicts are likely not learned."""
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """How a head is distilled.

    ``grid`` is the input's height and width in pixels where the family takes many sizes (Qwen2.5-VL);
    ``pooling`` ``None`` tries all and keeps the best on the validation part; ``max_memory`` bounds the hidden
    states in memory, in bytes; ``dtype`` is what the teacher's language model runs in.
    """

    grid: tuple[int, int] | None = None
    min_agreement: float = 0.97
    pooling: Pooling | None = None
    seed: int = 0
    batch: int = 16
    max_memory: int | None = 4 * 2**30
    labels: Path | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        torch_device(self.device)
        if not 0 <= self.min_agreement <= 1:
            raise InputError(f"--min-agreement {self.min_agreement} is not a share. Give a number from 0 to 1.")
        if self.pooling not in (None, *POOLINGS):
            raise InputError(f"pooling {self.pooling!r} is unknown. Allowed: {', '.join(POOLINGS)}.")


def pictures_for(spec: str | Path | None, checkpoint: Checkpoint) -> PictureSource:
    """Return the images a head is distilled from; tiny checkpoints have their own.

    Raises InputError where none are named and none are built in.
    """
    if spec is not None:
        return picture_source(spec)
    if checkpoint.name in TINY_CHECKPOINTS:
        return BuiltIn()
    raise InputError(
        f"{checkpoint.name}: --images is missing. Give a folder or hub:NAME with a few thousand images like those "
        "that the guard will see, harmful ones included. Labels are not needed."
    )


def distill(
    checkpoint: Checkpoint,
    pictures: PictureSource,
    options: DistillOptions = DistillOptions(),
    *,
    report: Report = lambda _: None,
) -> DistilledHead:
    """Fit a head to the exact guard's verdicts and measure it; nothing is written.

    Raises InputError for too few or unreadable images, for a head below ``min_agreement`` (with the likeliest
    reasons), for a guard that taps the projector; CheckpointError.
    """
    check_tap(checkpoint)
    preprocessing = read_processor(checkpoint.processor, family=checkpoint.family.key, grid=options.grid)
    report(f"reading {pictures}")
    read = load_pictures(pictures, preprocessing)
    labels = None if options.labels is None else _labels(read, options.labels, checkpoint)
    split = split_by_content(read.sha256)
    if len(read) < FEWEST or not min(len(split.train), len(split.validation), len(split.test)):
        raise InputError(
            f"{pictures}: {len(read)} distinct images ({read.duplicates} were copies). At least {FEWEST} are needed, "
            "and a few thousand for a faithful head."
        )
    report(f"running the exact guard on {len(read)} images")
    batches = [torch.from_numpy(read.rgb[i : i + options.batch]) for i in range(0, len(read), options.batch)]
    lesson = teach(
        checkpoint,
        batches,
        grid=options.grid,
        dtype=options.dtype,
        device=options.device,
        max_bytes=options.max_memory,
        report=report,
    )
    _check_lesson(lesson, read, checkpoint, options)
    report("fitting heads")
    fits = fit_head(
        lesson.pooled,
        lesson.probs,
        split,
        hidden=checkpoint.head.widths[1],
        pooling=options.pooling,
        seed=options.seed,
    )
    report("measuring on held-out images")
    found = _measure(fits, lesson, split, read, checkpoint, labels, options.seed)
    _check(found, lesson, split, checkpoint, options.min_agreement)
    return DistilledHead(
        head=fits[0].head,
        pooling=fits[0].pooling,
        classes=checkpoint.classes,
        checkpoint=checkpoint.name,
        source_sha256=guard_sha256(checkpoint),
        size=(preprocessing.height, preprocessing.width),
        fidelity=found | {"pictures": str(pictures)},
    )


def _check_lesson(lesson: Lesson, read: Pictures, checkpoint: Checkpoint, options: DistillOptions) -> None:
    """Raise CheckpointError, with an image's name, where the exact guard's answers are no numbers."""
    seen = torch.stack([torch.isfinite(values).all(dim=1) for values in lesson.pooled.values()]).all(dim=0)
    answered = seen & torch.isfinite(lesson.probs).all(dim=1)
    if bool(answered.all()):
        return
    wrong = torch.nonzero(~answered).flatten().tolist()
    part = "language model" if bool(seen[wrong[0]]) else "vision tower"
    advice = "Check the checkpoint." if options.dtype == torch.float32 else "Try --dtype float32."
    raise CheckpointError(
        f"{checkpoint.name}: the {part} gives NaN or infinity for {len(wrong)} of {len(read)} images, such as "
        f"{read.names[wrong[0]]}, so the head cannot learn its verdicts. {advice}"
    )


def _measure(
    fits: list[Fit],
    lesson: Lesson,
    split: Split,
    read: Pictures,
    checkpoint: Checkpoint,
    labels: NDArray[np.int64] | None,
    seed: int,
) -> dict[str, Any]:
    best = fits[0]
    with torch.no_grad():
        student = torch.softmax(best.head(lesson.pooled[best.pooling][split.test]), dim=-1).numpy()
    safe = safe_index(checkpoint.classes)
    test = fidelity(
        lesson.probs[split.test].numpy(),
        student,
        checkpoint.classes,
        safe=safe,
        labels=None if labels is None else labels[split.test],
        seed=seed,
    )
    return {
        "teacher": "the exact guard, behind the language model",
        "pooling": best.pooling,
        "poolings_tried": {
            fit.pooling: {"validation_kl": fit.validation_kl, "validation_agreement": fit.validation_agreement}
            for fit in fits
        },
        "n_train": len(split.train),
        "n_validation": len(split.validation),
        "n_test": len(split.test),
        "copies_left_out": read.duplicates,
        "unreadable": list(read.unreadable),
        "test": test,
    }


def _check(found: dict[str, Any], lesson: Lesson, split: Split, checkpoint: Checkpoint, min_agreement: float) -> None:
    agreement = found["test"]["agreement"]
    if agreement["value"] >= min_agreement:
        return
    counts = torch.bincount(lesson.probs[split.train].argmax(dim=1), minlength=len(checkpoint.classes)).tolist()
    never = [name for name, n in zip(checkpoint.classes, counts, strict=True) if n == 0]
    rarely = [f"{name} ({n})" for name, n in zip(checkpoint.classes, counts, strict=True) if 0 < n < SEEN_RARELY]
    reasons = [f"too few images ({len(split.train)} to train on)"]
    if never:
        reasons.append(f"classes that the exact guard never found in them: {', '.join(never)}")
    if rarely:
        reasons.append(f"classes that it rarely found: {', '.join(rarely)}")
    raise InputError(
        f"{checkpoint.name}: the distilled guard names the exact guard's class on {agreement['value']:.1%} of "
        f"{found['n_test']} held-out images (95 % interval {agreement['low']:.1%} to {agreement['high']:.1%}); "
        f"--min-agreement asks for {min_agreement:.1%}. Likely reasons: {'; '.join(reasons)}. Give more images of "
        "every class that matters."
    )


def _labels(read: Pictures, path: Path, checkpoint: Checkpoint) -> NDArray[np.int64]:
    """Return the true class of each image, -1 where the labels file has none."""
    known = {content_of(image.path): image.label for image in read_labels(path, checkpoint.classes).images}
    files = (Path(name) for name in read.names)
    found = np.array([known.get(content_of(file), -1) if file.is_file() else -1 for file in files], dtype=np.int64)
    if not (found >= 0).any():
        raise InputError(f"{path} has no label for any of the {len(read)} images. Its paths must name the same images.")
    return found


# -- the command ----------------------------------------------------------------------------------------


def describe(head: DistilledHead) -> list[str]:
    """Return what is to be said of a head's fidelity, line by line."""
    test = head.fidelity["test"]

    def stated(key: str) -> str:
        figure = test[key]
        if figure["value"] is None:
            return f"{key} unknown (no safe or no unsafe images)"
        return f"{key} {figure['value']:.4f} ({figure['low']:.4f} to {figure['high']:.4f})"

    absent = [name for name, row in test["per_class"].items() if not row["n"]]
    lines = [
        f"fidelity to the exact guard on {test['n']} held-out images, with 95 % intervals ({head.pooling} pooling, "
        f"{head.fidelity['n_train']} training images):",
        "  " + ", ".join(stated(key) for key in ("agreement", "kl", "auroc")),
        "  " + ", ".join(stated(key) for key in ("recall_at_1_fpr", "recall_at_5_fpr")),
    ]
    if absent:
        lines.append(f"  classes missing from the test part, so nothing is known about them: {', '.join(absent)}")
    return lines


@click.command(name="distill")
@model_option()
@click.option("--images", help="Folder of images, or hub:NAME.  [default for tiny checkpoints: built in]")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File to write the guard head to."
)
@click.option(
    "--labels", type=click.Path(path_type=Path, dir_okay=False), help="Labels of --images, for accuracy in the report."
)
@revision_option
@grid_option
@click.option(
    "--min-agreement",
    type=float,
    default=DistillOptions.min_agreement,
    show_default=True,
    help="Minimum agreement with the exact guard, as a share.",
)
@click.option(
    "--pooling",
    type=click.Choice(["auto", *POOLINGS]),
    default="auto",
    show_default=True,
    help="Pooling of the image features.",
)
@click.option(
    "--max-memory", type=float, default=4.0, show_default=True, help="Maximum memory for hidden states in GiB."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Data type of the model's weights on torch.",
)
@device_option
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed.")
@json_option("the fidelity")
def main(
    model: str,
    images: str | None,
    out: Path,
    labels: Path | None,
    revision: str | None,
    grid: str | None,
    min_agreement: float,
    pooling: str,
    max_memory: float,
    dtype: str,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Fit a guard head on the projector's output of MODEL to its exact guard's verdicts on images."""
    from rich.console import Console
    from rich.markup import escape

    check_writable(out)
    checkpoint = open_checkpoint(model, revision=revision)
    options = DistillOptions(
        grid=parse_grid(grid),
        min_agreement=min_agreement,
        pooling=next((kind for kind in POOLINGS if kind == pooling), None),
        seed=seed,
        max_memory=int(max_memory * 2**30),
        labels=labels,
        dtype=getattr(torch, dtype),
        device=device,
    )
    source = pictures_for(images, checkpoint)
    with Console(stderr=True).status("opening") as status:
        head = distill(checkpoint, source, options, report=lambda stage: status.update(escape(stage))).write(out)
    if head.fidelity["unreadable"]:
        click.echo(printable(f"skipped, unreadable: {shown(head.fidelity['unreadable'])}"), err=True)
    if as_json:
        click.echo(json.dumps({"guard": str(out), "sha256": head.sha256, "fidelity": head.fidelity}, indent=2))
        return
    click.echo(printable("\n".join([f"{out}: guard head of {checkpoint.name}", *describe(head)])))
    click.echo(printable(as_started(f"next: python -m export.onnx --model {model} --guard {out} --out DIR")))


if __name__ == "__main__":
    run(main)
