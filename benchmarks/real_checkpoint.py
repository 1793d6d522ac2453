"""Write a Safe-VLM checkpoint around real weights: ``python -m benchmarks.real_checkpoint --weights gemma3 --out DIR``.

Packages hold the weights (``make peers`` installs them into ``.venv-weights``). Vision tower and guard head are small
and random, so verdicts are noise; what the language model says is real, and so is what rounding does to it.
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from benchmarks.real.checkpoint import write_real_checkpoint
from benchmarks.real.names import CALIBRATION, CHECKPOINT, HELD_OUT
from benchmarks.real.packages import ENVIRONMENT, WEIGHTS, find_weights
from safevlm.terminal.commandline import printable, run

__all__ = ["main"]

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option(
    "--weights",
    type=click.Choice(tuple(WEIGHTS)),
    default="smollm2",
    show_default=True,
    help="Language model to read from its package.",
)
@click.option("--out", type=FOLDER, required=True, help="Folder to write; must not exist.")
@click.option(
    "--environment",
    type=FOLDER,
    default=ENVIRONMENT,
    show_default=True,
    help="Python environment that has the weights' packages (make peers).",
)
@click.option("--layers", type=click.IntRange(min=1), help="Number of decoder layers.  [default: all]")
@click.option(
    "--rows", type=click.IntRange(min=1, max=128), default=128, show_default=True, help="Number of calibration rows."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Maximum length of a calibration answer in tokens.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of vision tower and guard head.")
def main(
    weights: str, out: Path, environment: Path, layers: int | None, rows: int, max_new_tokens: int, seed: int
) -> None:
    """Write a checkpoint with a real language model, rows to calibrate it on and held-out text."""
    found = find_weights(weights)
    with Console(stderr=True).status("opening") as status:
        write_real_checkpoint(
            found,
            out,
            environment=environment,
            layers=layers,
            rows=rows,
            max_new_tokens=max_new_tokens,
            seed=seed,
            report=status.update,
        )
    click.echo(
        printable(
            f"{out / CHECKPOINT}: {found.title} behind a small vision tower and a guard head, both random; calibrate "
            f"on {out / CALIBRATION}, held-out text: {out / HELD_OUT}\nnote: {found.note}"
        )
    )


if __name__ == "__main__":
    run(main)
