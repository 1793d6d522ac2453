"""``python -m runtimes.check BUNDLE IMAGE…``: judge image files with a guard bundle.

Exit codes: 0 every image is allowed; 10 at least one is blocked, or unsure, which is not allowed either;
2 none of these but an image could not be judged. A block is the answer that safety depends on, so it is
told before an unreadable file is; read the verdicts (or ``--json``) to tell errors apart.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from models.commandline import printable, run

if TYPE_CHECKING:
    from runtimes.verdict import Judgement

__all__ = ["BLOCKED", "exit_code", "main", "table"]

BLOCKED = 10
UNREADABLE = 2
COLOURS = {"allow": "green", "block": "red", "unsure": "yellow", "error": "magenta"}
PROGRESS_FROM = 16
"""Images from which a progress bar is worth its line."""


@click.command(name="check")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects instead of a table.")
@click.option(
    "--runtime",
    type=click.Choice(["auto", "onnxruntime", "openvino", "tensorrt", "torch"]),
    default="auto",
    show_default=True,
    help="auto: an engine that runs on this GPU, else ONNX Runtime.",
)
@click.option("--precision", help="Judge with this precision of the bundle.  [default: the bundle's own]")
@click.option("--threads", type=click.IntRange(min=1), help="Bound the threads of ONNX Runtime and torch.")
def main(
    bundle: Path,
    images: tuple[Path, ...],
    as_json: bool,
    runtime: str,
    precision: str | None,
    threads: int | None,
) -> int:
    """Judge each IMAGE with the guard in the folder BUNDLE; a folder stands for the image files in it.

    Exits with 0 when every image is allowed, 10 when one is blocked or unsure, 2 when one cannot be judged
    and none is blocked.
    """
    from runtimes.judge import Guard
    from runtimes.random_weights import warn_of_random_weights

    files = list(_expand(images))
    opened = Guard.open(bundle, runtime, precision=precision, threads=threads)
    warn_of_random_weights(bundle)
    with opened as guard:
        judgements = list(_with_progress(guard.stream(files), len(files)))
    for judgement in judgements:
        if judgement.error is not None:
            click.echo(f"error: {printable(judgement.error)}", err=True)
    if as_json:
        click.echo(json.dumps([judgement.to_json() for judgement in judgements], indent=2, allow_nan=False))
    else:
        click.echo("\n".join(table(judgements, colour=sys.stdout.isatty())))
    return exit_code(judgements)


def exit_code(judgements: Iterable[Judgement]) -> int:
    """Return 10 when an image is blocked or unsure, else 2 when one could not be judged, else 0."""
    verdicts = {judgement.verdict for judgement in judgements}
    if verdicts & {"block", "unsure"}:
        return BLOCKED
    return UNREADABLE if "error" in verdicts else 0


def table(judgements: Sequence[Judgement], *, colour: bool) -> list[str]:
    """Return the aligned lines of a table: verdict, p(unsafe), class, its probability, file."""
    rows = [("verdict", "p(unsafe)", "class", "p(class)", "file"), *map(_row, judgements)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row in rows:
        verdict, p_unsafe, label, p_label = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        if colour and row[0] in COLOURS:
            verdict = click.style(verdict, fg=COLOURS[row[0]])
        lines.append("  ".join((verdict, p_unsafe, label, p_label, row[4])))
    return lines


def _row(judgement: Judgement) -> tuple[str, str, str, str, str]:
    file = printable(judgement.file).replace("\n", "\\n")
    if judgement.label is None or judgement.p_unsafe is None:
        return judgement.verdict, "-", "-", "-", file
    p_label = judgement.probs[judgement.label]
    return judgement.verdict, f"{judgement.p_unsafe:.4f}", printable(judgement.label), f"{p_label:.4f}", file


def _expand(paths: Iterable[Path]) -> Iterator[Path]:
    """Replace each folder by the image files in it and below, in order of name."""
    from models.errors import InputError
    from models.image import IMAGE_SUFFIXES

    for path in paths:
        if not path.is_dir():
            yield path
            continue
        inside = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
        found = sorted(file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise InputError(
                f"{path} is a folder without image files; looked for {', '.join(sorted(IMAGE_SUFFIXES))}. "
                "Name the files themselves if theirs end otherwise."
            )
        yield from found


def _with_progress(judgements: Iterator[Judgement], length: int) -> Iterator[Judgement]:
    """Pass judgements through, drawing a bar on a terminal's stderr when there are many."""
    if length < PROGRESS_FROM or not sys.stderr.isatty():
        yield from judgements
        return
    with click.progressbar(judgements, length=length, label="judging", file=sys.stderr) as bar:
        yield from bar


if __name__ == "__main__":
    run(main)
