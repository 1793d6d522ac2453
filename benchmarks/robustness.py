"""Recall against strength of corruption: ``python -m benchmarks.robustness --bundle DIR --labels FILE``.

Every ONNX file of a bundle judges the same labelled images as they are and under corruptions of growing strength,
within the limits that the bundle has for it. The page lies in the bundle; the manifest does not list it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from benchmarks.report.robustness_page import Point, Robustness, write_robustness
from benchmarks.statistics.proportions import wilson_interval
from benchmarks.statistics.tango import tango_interval
from calibration.labelled.corruptions import KINDS, Corruption, corruption_of, under_option
from calibration.labelled.judged_images import JudgedImages, scores_of
from calibration.labelled.labels import LabelledImage, Labels, read_labels
from calibration.labelled.risk_control import Bands
from calibration.labelled.under import Watch, judge_under
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.select import ONNX_RUNTIMES
from runtimes.guard.verdict import allows, blocks
from runtimes.images.view_option import view_option
from safevlm.contract.class_names import safe_index
from safevlm.contract.manifest import Band, GuardFile, Thresholds
from safevlm.contract.manifest_fields import ViewMode
from safevlm.errors import BundleError, InputError
from safevlm.machine import machine_name, now
from safevlm.terminal.commandline import as_started, printable, run
from safevlm.terminal.options import json_option

__all__ = ["measure_robustness", "steps_of"]

AT_HALF = Band(block=0.5, allow=0.5, n_unsafe=1)
"""The limits of a file without thresholds."""
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class _Verdicts:
    """What a file does to n images: which it allows, which it blocks."""

    allowed: Flags
    blocked: Flags
    unsafe: Flags


def steps_of(text: str) -> tuple[Corruption, ...]:
    """Return the corruptions to measure: of a kind without a strength all its steps, of ``all`` those of every kind.

    Raises InputError as ``parse_corruptions`` does.
    """
    found: list[Corruption] = []
    for part in (",".join(KINDS) if text.strip() == "all" else text).split(","):
        one = corruption_of(part.strip())
        found += [one] if ":" in part else [Corruption(one.kind, float(each)) for each in KINDS[one.kind].steps]
    return tuple(dict.fromkeys(found))


def measure_robustness(
    bundle: Bundle,
    labels: Labels,
    corruptions: Sequence[Corruption],
    *,
    precisions: Sequence[str] | None = None,
    runtime: str = "onnxruntime",
    view: ViewMode = "tiles",
    watch: Watch = lambda images, _: iter(images),
) -> Robustness:
    """Judge the images by each ONNX file, or those of ``precisions``, as they are and under each corruption.

    The first file is what the others are paired with: the float32 one where there is one.

    Raises BundleError for a bundle without such a file; InputError for labels of one kind alone, unreadable images.
    """
    classes = bundle.manifest.classes
    unsafe = sum(image.label != safe_index(classes) for image in labels.images)
    if not 0 < unsafe < len(labels.images):
        raise InputError(
            f"{unsafe} of {len(labels.images)} labelled images are unsafe. Give both safe and unsafe ones."
        )
    files = _files(bundle, precisions)
    found: dict[str, list[_Verdicts]] = {}
    for file in files:
        with ONNX_RUNTIMES[runtime](bundle, file, None) as runner:
            plain, others = judge_under(runner, file.path, classes, labels, view, corruptions, watch)
        found[file.path] = [_verdicts(bundle, file, answers) for answers in (plain, *others)]
    points = [
        _point(file.path, one, found[file.path][at], found[files[0].path][at])
        for at, one in enumerate((None, *corruptions))
        for file in files
    ]
    fitted = [bundle.manifest.thresholds_of(file.path) for file in files]
    return Robustness(
        created=now(),
        bundle=bundle.folder.name,
        manifest_sha256=bundle.digest,
        machine=machine_name(),
        view=view,
        runtime=runtime,
        labels_sha256=labels.sha256,
        seen_in_fitting=any(each is not None and each.labels_sha256 == labels.sha256 for each in fitted),
        random_weights=bundle.manifest.source.random_weights,
        promises={each.file: _promised(each, view) for each in fitted if each},
        points=tuple(points),
    )


def _files(bundle: Bundle, precisions: Sequence[str] | None) -> list[GuardFile]:
    files = list(bundle.files("onnx", "guard"))
    there = {file.precision for file in files}
    if not files:
        raise BundleError(
            f"{bundle.folder} has no standalone guard as an ONNX file. Export one: python -m export.onnx."
        )
    if precisions is not None and (not precisions or not set(precisions) <= there):
        raise BundleError(
            f"--precision {','.join(precisions)}: {bundle.folder} has {', '.join(sorted(there))}. Give one or more of "
            "these, separated by commas, or all."
        )
    chosen = [file for file in files if precisions is None or file.precision in precisions]
    return sorted(chosen, key=lambda file: file.precision != "fp32")


def _verdicts(bundle: Bundle, file: GuardFile, answers: JudgedImages) -> _Verdicts:
    classes, fitted = bundle.manifest.classes, bundle.manifest.thresholds_of(file.path)
    bands = Bands(pooled=AT_HALF, per_class={})
    if fitted is not None:
        bands = Bands(pooled=fitted.pooled, per_class=fitted.per_class)
    scores, harms = scores_of(answers.probs, classes)
    allow, block = bands.limits(harms)
    return _Verdicts(
        allowed=allows(scores, allow), blocked=blocks(scores, block), unsafe=answers.truth != safe_index(classes)
    )


def _point(file: str, corruption: Corruption | None, own: _Verdicts, first: _Verdicts) -> Point:
    """Count what a file does under a corruption, and where it differs from the first file."""
    if len(own.unsafe) != len(first.unsafe):
        raise InputError("images changed while they were judged. Run the command again, and change no file meanwhile.")
    unsafe, safe = own.unsafe, ~own.unsafe
    caught, stopped = int((~own.allowed)[unsafe].sum()), int((~own.allowed)[safe].sum())
    worse = int((own.allowed & ~first.allowed)[unsafe].sum())
    better = int((first.allowed & ~own.allowed)[unsafe].sum())
    n = int(unsafe.sum())
    low, high = tango_interval(worse, better, n)
    return Point(
        file=file,
        corruption="none" if corruption is None else corruption.kind,
        strength=None if corruption is None else corruption.strength,
        unsafe=n,
        caught=caught,
        recall=caught / n,
        recall_interval=wilson_interval(caught, n),
        blocked=int(own.blocked[unsafe].sum()),
        safe=int(safe.sum()),
        stopped=stopped,
        fpr=stopped / int(safe.sum()),
        fpr_interval=wilson_interval(stopped, int(safe.sum())),
        lost=worse,
        gained=better,
        change=(better - worse) / n,
        change_interval=(-high, -low),
    )


def _promised(fitted: Thresholds, view: ViewMode) -> str:
    """Say what thresholds promise, and that it is not for this ``view`` where they were fitted in another."""
    sure = (
        "on average" if fitted.method == "conformal_risk_control" else f"with probability {1 - (fitted.delta or 0):g}"
    )
    under = ", ".join(each.corruption for each in fitted.under)
    where = f", also under {under}" if under else " as they are; nothing is promised under corruptions"
    other = "" if fitted.view == view else f"; promised for --view {fitted.view}, so not for these figures"
    return f"{sure} at most {fitted.alpha:.2%} of unsafe images allowed{where}{other}"


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), required=True, help="Folder of the guard bundle.")
@click.option(
    "--labels",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Labelled images, as for calibration.thresholds; not those that its thresholds were fitted on.",
)
@click.option(
    "--images", type=click.Path(path_type=Path, file_okay=False), help="Folder that image paths in --labels start from."
)
@under_option("Corruptions to measure, all of them or, without a strength, all steps of a kind", default="all")
@click.option("--precision", default="all", show_default=True, help="Precisions to measure, separated by commas.")
@click.option(
    "--runtime",
    type=click.Choice(list(ONNX_RUNTIMES)),
    default="onnxruntime",
    show_default=True,
    help="Runtime that runs the ONNX files.",
)
@view_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the page.  [default: the bundle]")
@json_option("the figures")
def main(
    bundle: Path,
    labels: Path,
    images: Path | None,
    under: str,
    precision: str,
    runtime: str,
    view: ViewMode,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure recall against strength of corruption for every file of BUNDLE, and write a page."""
    from rich.console import Console
    from rich.progress import track

    corruptions = steps_of(under)
    opened = open_bundle(bundle)
    read = read_labels(labels, opened.manifest.classes, images)
    console = Console(stderr=True)

    def watch(shown: Sequence[LabelledImage], name: str) -> Iterator[LabelledImage]:
        yield from track(shown, printable(name), console=console, transient=True, disable=not console.is_terminal)

    precisions = None if precision == "all" else precision.split(",")
    found = measure_robustness(
        opened, read, corruptions, precisions=precisions, runtime=runtime, view=view, watch=watch
    )
    place = write_robustness(found, bundle if out is None else out)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    click.echo(printable("\n".join(_table(found.points))))
    click.echo(printable(as_started(f"page: {place}")))


def _table(points: Sequence[Point]) -> list[str]:
    """Return a line for each corruption, with recall by file."""
    files = list(dict.fromkeys(point.file for point in points))
    by_name: dict[str, Mapping[str, Point]] = {}
    for point in points:
        by_name[point.name] = {**by_name.get(point.name, {}), point.file: point}
    lines = [f"{'recall under':14}" + "".join(f"{file:>28}" for file in files)]
    return lines + [
        f"{name:14}" + "".join(f"{_recall(own[file]):>28}" for file in files) for name, own in by_name.items()
    ]


def _recall(point: Point) -> str:
    low, high = (100 * end for end in point.recall_interval)
    return f"{100 * point.recall:.2f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    run(main)
