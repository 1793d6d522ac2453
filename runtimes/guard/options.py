"""Options of every command that judges with a guard bundle."""

from __future__ import annotations

import click

from runtimes.guard.select import RUNTIMES

__all__ = ["precision_option", "runtime_option"]

runtime_option = click.option(
    "--runtime",
    type=click.Choice(list(RUNTIMES)),
    default="auto",
    show_default=True,
    help="Runtime of the guard; auto is an engine that runs on this GPU, otherwise ONNX Runtime.",
)
precision_option = click.option("--precision", help="Precision of the bundle's file.  [default: the bundle's own]")
