"""The command line of ``python -m benchmarks.import``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.runs.importing.inspect_log import import_inspect
from benchmarks.runs.importing.lines import numbered_rows, uncompressed
from benchmarks.runs.importing.lm_eval import LOG_NAME, import_lm_eval
from benchmarks.runs.importing.lmms_eval import import_lmms_eval
from benchmarks.runs.importing.predictions import import_predictions
from benchmarks.runs.importing.tables import EXCEL_SUFFIXES, import_table, import_vlmevalkit, parse_columns
from benchmarks.runs.record import Run, write_run
from safevlm.errors import InputError
from safevlm.terminal.commandline import printable
from safevlm.terminal.options import json_option

__all__ = ["main"]

TAKES: Mapping[str, frozenset[str]] = {
    "holisafe": frozenset(),
    "lmms-eval": frozenset({"task", "metric"}),
    "lm-eval": frozenset({"task", "metric", "filter"}),
    "inspect": frozenset({"task", "metric", "epoch"}),
    "vlmevalkit": frozenset({"task", "metric", "sheet"}),
    "csv": frozenset({"task", "columns", "sheet"}),
}
"""The formats, and the options that each takes beside --name."""


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What was asked for on the command line; None is not given."""

    name: str | None
    task: str | None
    metric: str | None
    filter: str | None
    epoch: int | None
    sheet: str | None
    columns: str | None

    def check(self, kind: str) -> None:
        """Refuse options that a format does not take. Raises InputError."""
        for option in ("task", "metric", "filter", "epoch", "sheet", "columns"):
            if getattr(self, option) is not None and option not in TAKES[kind]:
                takers = ", ".join(each for each, options in TAKES.items() if option in options)
                raise InputError(f"--{option} is not for --format {kind}. It is for {takers}.")


@click.command(name="import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--format", "kind", type=click.Choice(list(TAKES)), help="Format of FILE.  [default: by its name and first row]"
)
@click.option("--name", help="Name of the model that answered.  [default: the file's]")
@click.option("--task", help="Task or data set of a log.  [default: from the file]")
@click.option("--metric", help="Metric, scorer or column of the scores.  [default: the task's own]")
@click.option("--filter", help="Filter of an lm-eval log that has several.")
@click.option("--epoch", type=click.IntRange(min=1), help="Epoch of an inspect_ai log that has several.")
@click.option("--sheet", help="Sheet of an Excel file that has several.")
@click.option(
    "--columns",
    metavar="FIELD=COLUMN,…",
    help="Columns of a table: id and answer; type for pairs, reference or score for questions; query, image, category.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run record to write; must not exist.")
@json_option("run.json")
def main(file: Path, kind: str | None, out: Path, as_json: bool, **given: object) -> None:
    """Write answers that others published (HoliSafe's format), logged (lmms-eval, lm-eval, inspect_ai, VLMEvalKit) or
    keep in a table as a run record."""
    asked = _Asked(**given)  # type: ignore[arg-type]
    kind = kind or _kind(file, asked)
    asked.check(kind)
    found = _imported(file, kind, asked)
    write_run(out, found.record, found.rows)
    if as_json:
        click.echo(json.dumps(found.record.model_dump(mode="json", exclude_none=True), indent=1))
        return
    suite = found.record.suite
    click.echo(printable(f"{out}: {found.record.artifact.name} on {suite.name}, {suite.rows} rows"))
    for note in found.record.notes:
        click.echo(printable(f"  {note}"))


def _kind(file: Path, asked: _Asked) -> str:
    """Return the format that a file is in: by its name, otherwise by its first row."""
    if asked.columns is not None:
        return "csv"
    if file.suffix == ".eval":
        return "inspect"
    if file.suffix.lower() in EXCEL_SUFFIXES:
        return "vlmevalkit"
    if uncompressed(file).suffix.lower() in (".csv", ".tsv", ".tab"):
        return "csv"
    where, first = next(numbered_rows(file), ("", None))
    if not isinstance(first, Mapping):
        return "holisafe"
    if "doc_id" in first:
        dated = LOG_NAME.fullmatch(file.name)
        return "lm-eval" if "filter" in first or (dated and dated["date"]) else "lmms-eval"
    if "eval" in first and ("samples" in first or "status" in first):
        return "inspect"
    if not {"id", "image", "type", "prediction"} & first.keys():
        raise InputError(f"{where}: the format is not clear. Give --format, one of {', '.join(TAKES)}.")
    return "holisafe"


def _imported(file: Path, kind: str, asked: _Asked) -> Run:
    name, task, metric = asked.name, asked.task, asked.metric
    model = name or file.absolute().parent.name
    if kind == "lmms-eval":
        return import_lmms_eval(file, name=model, task=task, metric=metric)
    if kind == "lm-eval":
        return import_lm_eval(file, name=model, task=task, metric=metric, chosen=asked.filter)
    if kind == "inspect":
        return import_inspect(file, name=name, task=task, metric=metric, epoch=asked.epoch)
    if kind == "vlmevalkit":
        return import_vlmevalkit(file, name=name, task=task, metric=metric, sheet=asked.sheet)
    if kind == "csv":
        if asked.columns is None:
            raise InputError("--format csv needs --columns, such as id=number,answer=reply,type=kind.")
        return import_table(file, parse_columns(asked.columns), name=name, task=task, sheet=asked.sheet)
    return import_predictions(file, name=name)
