"""Write a run record in a form that other tools read: ``python -m benchmarks.export RUN --format F --out FILE``."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.runs.exporting.inspect_log import inspect_log
from benchmarks.runs.exporting.parquet import parquet
from benchmarks.runs.record import read_run
from safevlm.errors import InputError
from safevlm.files.json_file import replace_file
from safevlm.files.storage import check_writable, storing
from safevlm.terminal.commandline import printable, run

__all__ = ["main"]

WRITERS = {"inspect": inspect_log, "parquet": parquet}
SUFFIXES = {"inspect": ".eval", "parquet": ".parquet"}


@click.command(name="export")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path, file_okay=False))
@click.option("--format", "kind", type=click.Choice(list(WRITERS)), required=True, help="Format of the file to write.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File to write, which must not exist: .eval for inspect, .parquet for parquet.",
)
def main(folder: Path, kind: str, out: Path) -> None:
    """Write a run record as a log of inspect_ai, or as a Parquet table."""
    if out.suffix != SUFFIXES[kind]:
        raise InputError(f"--out {out}: its readers expect the suffix {SUFFIXES[kind]} for {kind}. Rename the file.")
    if out.exists():
        raise InputError(f"{out} already exists. Give --out a new file, or remove this one.")
    found = read_run(folder)
    check_writable(out)
    content = WRITERS[kind](found)
    with storing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, content)
    click.echo(printable(f"{out}: {len(found.rows)} rows of {found.record.artifact.name} on {found.record.suite.name}"))


if __name__ == "__main__":
    run(main)
