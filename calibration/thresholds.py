"""Fit a bundle's thresholds: ``python -m calibration.thresholds --bundle DIR --labels FILE``.

Every file of the bundle gets thresholds of its own, from its own answers on this machine's runtime: what is
promised is promised for the precision that will run.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from calibration.labelled.class_claims import Allowed, uncertified_notes, with_uncertified
from calibration.labelled.corruptions import Corruption, parse_corruptions, under_option
from calibration.labelled.judged_images import NAMES_SHOWN, TileCost, scores_of, tile_cost
from calibration.labelled.labels import LabelledImage, Labels, read_labels
from calibration.labelled.risk_control import Bands, Method, Promise, fit_bands, measure
from calibration.labelled.under import Watch, check_labels, judge_under, rates_under
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.runner import GuardRunner
from runtimes.guard.select import ONNX_RUNTIMES
from runtimes.guard.verdict import allows
from runtimes.images.tiling import checked_mode
from runtimes.images.view_option import view_option
from safevlm.contract.class_names import safe_index
from safevlm.contract.manifest import GuardFile, Manifest, Thresholds
from safevlm.contract.manifest_fields import ViewMode
from safevlm.errors import BundleError, InputError
from safevlm.terminal.commandline import as_started, printable, run
from safevlm.terminal.options import json_option

__all__ = ["Fitted", "fit_bundle"]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What was done: the new manifest, files left without thresholds and why, misses by true class."""

    manifest: Manifest
    not_fitted: dict[str, str]
    by_class: dict[str, dict[str, dict[str, float]]]
    """By file and true class: ``n`` images, and the share ``missed`` of them (allowed though unsafe)."""
    tile_cost: dict[str, TileCost]
    """By file, where any image was judged in tiles."""
    unreadable: tuple[str, ...]


def fit_bundle(
    bundle: Bundle,
    labels: Labels,
    promise: Promise = Promise(),
    *,
    per_class: bool = True,
    precisions: Collection[str] | None = None,
    runtime: str = "onnxruntime",
    view: ViewMode = "tiles",
    under: Sequence[Corruption] = (),
    watch: Watch = lambda images, _: iter(images),
) -> Fitted:
    """Fit thresholds for each file of a bundle that runs here, or of ``precisions``, and write its manifest.

    Files that are not fitted, such as engines that do not run here, keep the thresholds that they have. Every
    file sees every image once, and once more for each corruption in ``under``, a batch in memory at a time; ``watch``
    passes them through, given the file's path and the corruption. The promise on misses is for those corruptions, too.
    ONNX files are asked on ``runtime``, one of ``ONNX_RUNTIMES``: the one that will run them.

    What is promised is promised for images judged as ``view`` says (see ``runtimes.images.tiling``). Where images have
    tiles, a tile of one harm and another of a second could each be held to a band of its own, which no promise is known
    for: then there is one band for all.

    Raises BundleError for a bundle that does not stand alone or lacks a precision; InputError for random weights,
    for too few images, before any is judged, or unreadable ones. The manifest is then as it was.
    """
    if not bundle.manifest.source.standalone:
        raise BundleError(
            f"{bundle.folder} is not standalone (standalone: false): its guard needs the language model. Make it "
            f"standalone first: python -m export.onnx {bundle.manifest.source.model_option} --out {bundle.folder} "
            "--images DIR"
        )
    if bundle.manifest.source.random_weights:
        raise InputError(
            f"{bundle.folder} was made from random weights, so thresholds for it would promise nothing. Export a "
            "bundle of the real checkpoint, and fit thresholds for that."
        )
    checked_mode(view)
    classes = bundle.manifest.classes
    check_labels(labels, classes, promise, under)
    costs: dict[str, TileCost] = {}
    fitted: list[Thresholds] = []
    not_fitted: dict[str, str] = {}
    by_class: dict[str, dict[str, dict[str, float]]] = {}
    unreadable: dict[str, None] = {}
    allowed: dict[str, Allowed] = {}
    for file in _chosen(bundle, precisions):
        runner = _runner(bundle, file, runtime)
        try:
            runner.activate()
        except InputError as error:
            if file.kind != "engine":
                raise
            not_fitted[file.path] = str(error)
            continue
        with runner:
            provider = runner.provider
            answers, others = judge_under(runner, file.path, classes, labels, view, under, watch)
        unreadable |= dict.fromkeys(answers.unreadable)
        scores, harms = scores_of(answers.probs, classes)
        seen = [scores_of(each.probs, classes) for each in others]
        unsafe = answers.truth != safe_index(classes)
        whole = not any(each.tiled for each in (answers, *others))
        bands = fit_bands(scores, unsafe, harms, promise, per_class=per_class and whole, under=seen)
        entry = _thresholds(file, bands, promise, labels, scores, unsafe, harms, view, provider)
        fitted.append(entry.model_copy(update={"under": rates_under(bands, unsafe, under, seen)}))
        if answers.tiled:
            costs[file.path] = tile_cost(answers, others, bands, promise, classes)
        allowed[file.path] = allows(scores, bands.limits(harms)[0]), answers.truth
        by_class[file.path] = _by_class(*allowed[file.path], classes)
    manifest = _enter(bundle.folder, with_uncertified(fitted, allowed, bundle.manifest, promise))
    return Fitted(
        manifest=manifest,
        not_fitted=not_fitted,
        by_class=by_class,
        tile_cost=costs,
        unreadable=tuple(unreadable),
    )


def _chosen(bundle: Bundle, precisions: Collection[str] | None) -> list[GuardFile]:
    files = [file for file in bundle.manifest.files if file.kind != "onnx_data"]
    there = {file.precision for file in files}
    if precisions is None:
        return files
    if not precisions or not set(precisions) <= there:
        raise BundleError(
            f"--precision {','.join(precisions)}: {bundle.folder} has {', '.join(sorted(there))}; give one or more of "
            "these, separated by commas, or all."
        )
    return [file for file in files if file.precision in precisions]


def _enter(folder: Path, fitted: Sequence[Thresholds]) -> Manifest:
    """Write thresholds into the manifest as it is now: an engine may have been added while images were judged."""
    manifest = Manifest.read(folder)
    entries = {entry.file: entry for entry in (*(manifest.thresholds or ()), *fitted)}
    manifest = manifest.model_copy(update={"thresholds": tuple(entries.values()) or None})
    manifest = Manifest.from_bytes(manifest.to_json().encode(), where=str(folder))
    manifest.write(folder)
    return manifest


def _runner(bundle: Bundle, file: GuardFile, runtime: str) -> GuardRunner:
    if file.kind == "engine":
        from runtimes.guard.tensorrt_runner import TensorRTRunner

        return TensorRTRunner(bundle, file)
    return ONNX_RUNTIMES[runtime](bundle, file, None)


def _thresholds(
    file: GuardFile,
    bands: Bands,
    promise: Promise,
    labels: Labels,
    scores: NDArray[np.float64],
    unsafe: NDArray[np.bool_],
    harms: Sequence[str],
    view: ViewMode,
    provider: str,
) -> Thresholds:
    rates = measure(bands, scores, unsafe, harms)
    return Thresholds(
        file=file.path,
        file_sha256=file.sha256,
        method=promise.method,
        alpha=promise.alpha,
        delta=promise.delta if promise.method == "learn_then_test" else None,
        max_fpr=promise.max_fpr,
        n=len(scores),
        n_unsafe=int(unsafe.sum()),
        fitted_on=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        labels_sha256=labels.sha256,
        pooled=bands.pooled,
        per_class=dict(bands.per_class),
        miss_rate=rates.miss,
        fpr=rates.fpr,
        unsure_rate=rates.unsure,
        view=view,
        provider=provider,
    )


def _by_class(
    allowed: NDArray[np.bool_], truth: NDArray[np.int64], classes: Sequence[str]
) -> dict[str, dict[str, float]]:
    safe = safe_index(classes)
    return {
        name: {"n": int((truth == k).sum()), "missed": float(allowed[truth == k].mean())}
        for k, name in enumerate(classes)
        if k != safe and (truth == k).any()
    }


# -- the command ----------------------------------------------------------------------------------------


@click.command(name="thresholds")
@click.option("--bundle", type=click.Path(path_type=Path), required=True, help="Folder of the guard bundle.")
@click.option(
    "--labels",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="JSON in HoliSafe-Bench's row format, or JSONL or CSV with image and label (class index or name).",
)
@click.option(
    "--images", type=click.Path(path_type=Path, file_okay=False), help="Folder that image paths in --labels start from."
)
@click.option(
    "--alpha",
    type=float,
    default=Promise.alpha,
    show_default=True,
    help="Maximum share of unsafe images that are allowed.",
)
@click.option(
    "--max-fpr",
    type=float,
    default=Promise.max_fpr,
    show_default=True,
    help="Maximum share of safe images that are blocked.",
)
@click.option(
    "--method",
    type=click.Choice(["conformal_risk_control", "learn_then_test"]),
    default=Promise.method,
    show_default=True,
    help="Guarantee in expectation (conformal_risk_control) or with probability 1 - delta (learn_then_test).",
)
@click.option(
    "--delta", type=float, default=Promise.delta, show_default=True, help="Error probability of learn_then_test."
)
@click.option(
    "--per-class/--pooled", default=True, show_default=True, help="Fit a band for each class with enough images."
)
@click.option("--precision", default="all", show_default=True, help="Precisions to fit, separated by commas.")
@click.option(
    "--runtime",
    type=click.Choice(list(ONNX_RUNTIMES)),
    default="onnxruntime",
    show_default=True,
    help="Runtime that will run the ONNX files.",
)
@view_option
@under_option("Corruptions under which the promise on misses holds, too")
@json_option("the thresholds")
def main(
    bundle: Path,
    labels: Path,
    images: Path | None,
    alpha: float,
    max_fpr: float,
    method: Method,
    delta: float,
    per_class: bool,
    precision: str,
    runtime: str,
    view: ViewMode,
    under: str | None,
    as_json: bool,
) -> None:
    """Fit block and allow thresholds for every file of BUNDLE on labelled images, with a stated promise."""
    promise = Promise(alpha=alpha, max_fpr=max_fpr, method=method, delta=delta)
    corruptions = () if under is None else parse_corruptions(under)
    opened = open_bundle(bundle)
    read = read_labels(labels, opened.manifest.classes, images)
    precisions = None if precision == "all" else precision.split(",")
    fitted = fit_bundle(
        opened,
        read,
        promise,
        per_class=per_class,
        precisions=precisions,
        runtime=runtime,
        view=view,
        under=corruptions,
        watch=_watch,
    )
    for line in _notes(read, fitted, bundle, per_class=per_class):
        click.echo(printable(as_started(line)), err=True)
    if as_json:
        stated = fitted.manifest.model_dump(mode="json")["thresholds"]
        cost = {path: asdict(each) for path, each in fitted.tile_cost.items()}
        answer = {
            "thresholds": stated,
            "by_class": fitted.by_class,
            "tile_cost": cost,
            "not_fitted": fitted.not_fitted,
        }
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(printable("\n".join(_table(fitted.manifest))))


def _watch(images: Sequence[LabelledImage], file: str) -> Iterator[LabelledImage]:
    """Pass images through, drawing a bar on a terminal's stderr."""
    if not sys.stderr.isatty():
        yield from images
        return
    with click.progressbar(images, label=file, file=sys.stderr) as bar:
        yield from bar


def _notes(labels: Labels, fitted: Fitted, bundle: Path, *, per_class: bool) -> Iterator[str]:
    """Say what was left out, and what tiles cost."""
    for path, cost in fitted.tile_cost.items():
        only = (
            " With tiles there is one band for all classes: a band per class would promise nothing."
            if per_class
            else ""
        )
        yield (
            f"{path}: {cost.tiled} images were also judged in tiles. Safe images blocked: {cost.fpr:.2%} "
            f"({cost.fpr_whole:.2%} without tiles). Unsure: {cost.unsure:.2%} ({cost.unsure_whole:.2%} without "
            f"tiles). With the thresholds fitted without tiles, tiles would block {cost.fpr_limits_of_whole:.2%} of "
            f"safe images.{only}"
        )
    for what, names in (("contradictory labels, left out", labels.contradictory), ("unreadable", fitted.unreadable)):
        if names:
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            yield f"{what}: {', '.join(names[:NAMES_SHOWN])}{more}"
    for entry in fitted.manifest.thresholds or ():
        shut = [name for name, band in (("all", entry.pooled), *entry.per_class.items()) if band.allow == 0]
        if entry.file in fitted.by_class and shut:
            yield (
                f"{entry.file} ({', '.join(shut)}): the promise is kept only by allowing nothing, because too many "
                "unsafe images have a p(unsafe) of 0. Every image is blocked or unsure. Raise --alpha, or give --under "
                "weaker corruptions."
            )
        costly = [f"{each.fpr:.2%} under {each.corruption}" for each in entry.under if each.fpr > entry.max_fpr]
        if entry.file in fitted.by_class and costly:
            yield (
                f"{entry.file}: safe images blocked: {', '.join(costly)}. --max-fpr {entry.max_fpr:g} is promised for "
                "images as they are, not under corruptions."
            )
        if entry.file in fitted.by_class:
            yield from uncertified_notes(entry)
    for path, reason in fitted.not_fitted.items():
        yield (
            f"{path} was not fitted: {reason} Run on its device: python -m calibration.thresholds --bundle "
            f"{bundle} --labels FILE"
        )


def _limit(value: float) -> str:
    """Return a limit with four decimals, a smaller one with its exponent: it is not 0."""
    return f"{value:.4f}" if value == 0 or value >= 0.0001 else f"{value:.1e}"


def _table(manifest: Manifest) -> list[str]:
    rows: list[Any] = [("file", "class", "allow below", "block from", "miss", "FPR", "unsure", "n", "unsafe")]
    for entry in manifest.thresholds or ():
        rates = [f"{rate:.2%}" for rate in (entry.miss_rate, entry.fpr, entry.unsure_rate)]
        for name, band in (("others" if entry.per_class else "all", entry.pooled), *sorted(entry.per_class.items())):
            first = band is entry.pooled
            counts = (*(rates if first else ("", "", "")), str(entry.n) if first else "", str(band.n_unsafe))
            rows.append((entry.file if first else "", name, _limit(band.allow), _limit(band.block), *counts))
        for each in entry.under:
            rates = [f"{rate:.2%}" for rate in (each.miss_rate, each.fpr, each.unsure_rate)]
            rows.append(("", f"under {each.corruption}", "", "", *rates, "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    run(main)
