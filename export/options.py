"""What the exporting commands share on their command line; light, so that a device can load it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click

from models.manifest import Manifest

__all__ = ["PARITY_IMAGES", "checkpoint_options", "print_manifest"]

PARITY_IMAGES = 24
"""Pictures that an export is checked on, unless told otherwise."""


def checkpoint_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which checkpoint is exported and how."""
    options = (
        click.option("--revision", help="Hub revision: a branch, tag or commit."),
        click.option("--tap", type=click.Choice(["projector", "language_model"]), help="Where the guard taps."),
        click.option("--grid", help="Input size in pixels, HEIGHTxWIDTH, for Qwen2.5-VL.  [default: 448x448]"),
        click.option(
            "--images",
            type=click.Path(path_type=Path, exists=True, file_okay=False),
            help="Pictures for the parity check.  [default: drawn ones]",
        ),
        click.option("--parity-images", type=click.IntRange(1), default=PARITY_IMAGES, show_default=True),
        click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def print_manifest(manifest: Manifest, out: Path, *, as_json: bool) -> None:
    """Say what was written."""
    if as_json:
        click.echo(json.dumps({"bundle": str(out), "manifest": manifest.model_dump(mode="json")}, indent=2))
        return
    click.echo(f"{out}: guard of {manifest.source.checkpoint}, tap {manifest.tap.source} ({manifest.tap.learned})")
    for file in manifest.files:
        line = f"  {file.path}  {file.bytes / 2**20:.1f} MiB"
        if file.parity is not None:
            line += f"  max |Δp| {file.parity.max_abs_prob_delta:.1e}, {file.parity.label_flips} label flips"
            line += f" of {file.parity.images} images"
        if file.latency is not None:
            line += f"  {file.latency.median_ms:.1f} ms an image ({file.latency.runtime})"
        click.echo(line)
    click.echo(f"next: python -m runtimes.check {out} IMAGE...")
