"""Options that several commands share, each worded once. ``--runtime`` stands in ``runtimes.guard.options``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from safevlm.errors import InputError

__all__ = [
    "answering_model_option",
    "device_option",
    "grid_option",
    "json_option",
    "model_option",
    "parse_grid",
    "revision_option",
    "tap_option",
    "threads_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])

revision_option = click.option("--revision", help="Hub revision of --model: a branch, tag or commit.")
tap_option = click.option(
    "--tap",
    type=click.Choice(["projector", "language_model"]),
    help="Features that the guard of --model reads.  [default: detected]",
)
grid_option = click.option("--grid", help="Input size in pixels, HEIGHTxWIDTH, for Qwen2.5-VL.  [default: 448x448]")
device_option = click.option(
    "--device", default="cpu", show_default=True, help="Device that torch runs on: cpu, cuda or cuda:N."
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="Number of CPU threads.  [default: all cores]"
)
answering_model_option = click.option(
    "--model", help="Checkpoint or GGUF folder that answers.  [default: what the bundle was made from]"
)


def model_option(*, required: bool = True) -> Callable[[Command], Command]:
    """Return ``--model``, the checkpoint that a command opens."""
    return click.option(
        "--model", required=required, help="Checkpoint: a folder, one of the six names, hub id[@revision], a tiny name."
    )


def json_option(what: str) -> Callable[[Command], Command]:
    """Return ``--json``, which is passed on as ``as_json``; ``what`` is printed then."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print {what} as JSON.")


def parse_grid(text: str | None) -> tuple[int, int] | None:
    """Read ``448`` or ``448x672`` (height x width, pixels)."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdigit() for side in sides):
        raise InputError(f"--grid {text} is not a size. Give one side in pixels (448) or height x width (448x672).")
    return int(sides[0]), int(sides[-1])
