"""What the exporting commands share on their command line; light, so that a device can load it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from safevlm.contract.manifest import Manifest, Parity
from safevlm.terminal.commandline import as_started, printable
from safevlm.terminal.options import grid_option, json_option, model_option, revision_option, tap_option

__all__ = ["PARITY_IMAGES", "checkpoint_options", "model_options", "print_manifest", "source_options"]

PARITY_IMAGES = 24
"""Pictures that an export is checked on, unless told otherwise."""


def checkpoint_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which checkpoint is exported and how."""
    options = (
        revision_option,
        tap_option,
        grid_option,
        click.option(
            "--images",
            help="Folder of images, or hub:NAME, to distill a head on, for a guard behind the language model; a folder "
            "also serves the parity check.  [default: built in for tiny checkpoints]",
        ),
        click.option(
            "--guard",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Guard head that calibration.distill wrote, for a guard behind the language model.",
        ),
        click.option(
            "--labels",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Labels of --images, for accuracy in the report.",
        ),
        click.option(
            "--min-agreement",
            type=float,
            default=0.97,
            show_default=True,
            help="Minimum agreement with the exact guard, as a share.",
        ),
        click.option(
            "--embeddings", is_flag=True, help="Add the image embeddings as an output, for the language model."
        ),
        click.option(
            "--parity-images",
            type=click.IntRange(1),
            default=PARITY_IMAGES,
            show_default=True,
            help="Number of images for the parity check.",
        ),
        json_option("the manifest"),
    )
    for option in reversed(options):
        function = option(function)
    return function


def model_options(*, required: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add ``--model`` and ``--out``."""
    model = model_option(required=required)
    out = click.option(
        "--out", type=click.Path(path_type=Path), help="Folder to write the bundle to.  [default: bundles/NAME]"
    )
    return lambda function: model(out(function))


def print_manifest(
    manifest: Manifest,
    out: Path,
    again: Sequence[object],
    *,
    as_json: bool,
    command: str = "export.onnx",
    notes: Sequence[str] = (),
) -> None:
    """Say what was written by ``command``, and ``notes`` on it; ``again`` are its options for the same checkpoint."""
    if as_json:
        click.echo(json.dumps({"bundle": str(out), "manifest": manifest.model_dump(mode="json")}, indent=2))
        return
    tap = f"tap {manifest.tap.source} ({manifest.tap.learned})"
    click.echo(printable(f"{out}: guard of {manifest.source.checkpoint}, {tap}"))
    if manifest.source.random_weights:
        click.echo("  random weights: its verdicts mean nothing; sizes and times are valid")
    for file in manifest.files:
        line = f"  {file.path}  {file.bytes / 2**20:.1f} MiB"
        if file.parity is not None:
            line += f"  {_parity(file.parity)}"
        if file.latency is not None:
            line += f"  {file.latency.median_ms:.1f} ms an image ({file.latency.runtime})"
        if file.quantization is not None:
            kept = len(file.quantization["left_in_float32"])
            line += f"  {file.note}; {kept} of {file.quantization['products']} products left in float32"
        if file.path == manifest.default_file and len(manifest.files) > 1:
            line += "  (default)"
        click.echo(printable(line))
    for note in notes:
        click.echo(printable(note))
    if not manifest.source.standalone:
        click.echo(printable(as_started("\n".join(_split_note(command, again, out)))))
        return
    if manifest.fidelity is not None and "test" in manifest.fidelity:  # a head made elsewhere may state other things
        click.echo(_fidelity(manifest.fidelity["test"]))
    click.echo(printable(as_started(f"next: python -m runtimes.check {out} IMAGE...")))


def _parity(parity: Parity) -> str:
    parts = []
    if parity.max_abs_prob_delta is not None:
        parts.append(f"max |Δp| {parity.max_abs_prob_delta:.1e}, {parity.label_flips} label flips")
    if parity.max_rel_embedding_delta is not None:
        parts.append(f"embeddings within {parity.max_rel_embedding_delta:.1e}")
    return f"{', '.join(parts)} on {parity.images} images"


def _fidelity(test: Mapping[str, Any]) -> str:
    agreement, auroc = test["agreement"], test["auroc"]
    line = f"distilled head: same class as the exact guard on {agreement['value']:.1%} of {test['n']} held-out images"
    line += f" (95 % interval {agreement['low']:.1%} to {agreement['high']:.1%})"
    return line if auroc["value"] is None else f"{line}, AUROC {auroc['value']:.4f}"


def source_options(
    model: str, *, revision: str | None = None, tap: str | None = None, grid: str | None = None
) -> list[object]:
    """Return the options that name a checkpoint as the user did."""
    given = (("--model", model), ("--revision", revision), ("--tap", tap), ("--grid", grid))
    return [word for option, value in given if value is not None for word in (option, value)]


def _split_note(command: str, again: Sequence[object], out: Path) -> list[str]:
    """Say what a bundle of exact parts can do, and what would make it a gate before the language model."""
    return [
        "standalone: false. The guard reads the language model's last hidden state, so it judges after the image",
        "prefill and before the question: vision gives the embeddings, head the verdict on hidden states.",
        "For a guard that judges before the language model runs, add one flag:",
        f"  python -m {command} {shlex.join(map(str, (*again, '--out', out)))} --images DIR",
        "Give at least 2,000 images (no labels) like those that the device will see, with harmful ones of every class.",
    ]
