"""The command line of ``python -m benchmarks.import``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from benchmarks.runs.importing.lmms_eval import import_lmms_eval
from benchmarks.runs.importing.predictions import import_predictions
from benchmarks.runs.record import write_run
from safevlm.errors import InputError
from safevlm.terminal.commandline import printable
from safevlm.terminal.options import json_option

__all__ = ["main"]


@click.command(name="import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--format",
    "kind",
    type=click.Choice(["holisafe", "lmms-eval"]),
    default="holisafe",
    show_default=True,
    help="Format of FILE.",
)
@click.option("--name", help="Name of the model that answered.  [default: the file's]")
@click.option("--task", help="Task of an lmms-eval log.  [default: from the file's name]")
@click.option("--metric", help="Metric of an lmms-eval log.  [default: the task's own]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run record to write; must not exist.")
@json_option("run.json")
def main(
    file: Path, kind: str, name: str | None, task: str | None, metric: str | None, out: Path, as_json: bool
) -> None:
    """Write answers that others published (HoliSafe's format) or logged (lmms-eval) as a run record."""
    if kind == "holisafe":
        if task is not None or metric is not None:
            raise InputError("--task and --metric are for --format lmms-eval.")
        found = import_predictions(file, name=name)
    else:
        found = import_lmms_eval(file, name=name or file.parent.name, task=task, metric=metric)
    write_run(out, found.record, found.rows)
    if as_json:
        click.echo(json.dumps(found.record.model_dump(mode="json", exclude_none=True), indent=1))
        return
    suite = found.record.suite
    click.echo(printable(f"{out}: {found.record.artifact.name} on {suite.name}, {suite.rows} rows"))
