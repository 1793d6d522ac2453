"""Run an artifact through a suite: ``python -m benchmarks.run --model M --suite holisafe-mini --out RUN``.

Rows are answered in batches that depend on the suite alone, greedily unless a temperature is given, and written as they
are answered: an interrupted run is resumed with ``--resume``, in the same batches, and ends with the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from PIL import Image

from benchmarks.runs.answering.answerer import Answerer, failed
from benchmarks.runs.answering.select import Request, open_answerer
from benchmarks.runs.record import RECORD_NAME, Row, RunRecord, RunWriter, check_new, read_run
from benchmarks.suites.corrupted import corrupted
from benchmarks.suites.holisafe_mini import PAIRS, QUESTIONS
from benchmarks.suites.select import SUITES, open_suite
from benchmarks.suites.suite import Suite
from calibration.labelled.corruptions import parse_corruptions, under_option
from runtimes.guard.options import precision_option, runtime_option
from runtimes.images.view_option import view_option
from safevlm.errors import ImageFileError, InputError
from safevlm.files.json_file import without_halves
from safevlm.machine import machine_name, now
from safevlm.terminal.commandline import as_started, printable, run
from safevlm.terminal.options import (
    device_option,
    grid_option,
    json_option,
    parse_grid,
    revision_option,
    threads_option,
)
from safevlm.version import VERSION

__all__ = ["batches", "run_suite"]

FAILED_BATCHES, FAILED_ROWS = 3, 12
"""Batches in a row that fail completely, and the rows in them, after which a run gives up."""


def run_suite(
    answerer: Answerer,
    suite: Suite,
    out: Path,
    *,
    resume: bool = False,
    report: Callable[[int], None] = lambda _: None,
) -> RunRecord:
    """Answer every row of a suite into the run record ``out``; ``answerer`` is already entered. With ``resume``, an
    unfinished record in ``out`` is resumed and its failed rows are retried; a missing one is begun. ``report`` gets the
    number of rows done since its last call.

    Raises InputError when the answerer cannot take the suite's kinds of rows, for the record's place, when one batch
    after another fails, and those of :class:`RunWriter`.
    """
    kinds = {row.kind for row in suite.rows}
    if not kinds <= answerer.kinds:
        raise InputError(
            f"suite {suite.name} has rows of kind {', '.join(sorted(kinds - answerer.kinds))}, but this artifact "
            f"answers only {', '.join(sorted(answerer.kinds))}. For a guard bundle, give --suite guard or guard-mini."
        )
    record = _record(answerer, suite)
    again = resume and (out / RECORD_NAME).exists()
    with RunWriter.resume(out, record) if again else RunWriter.begin(out, record) as writer:
        report(len(writer.done))
        waiting: list[Row] = []  # rows of batches that failed whole: nothing is kept of an artifact that is down
        hopeless = 0
        for batch in batches(suite.rows, answerer.batch):
            missing = [row for row in batch if row.id not in writer.done]
            if not missing:
                continue
            found = [row for row in _answer(answerer, suite, batch) if row.id not in writer.done]
            waiting += found
            hopeless = hopeless + 1 if all(row.error is not None for row in found) else 0
            if hopeless >= FAILED_BATCHES and len(waiting) >= FAILED_ROWS:
                raise InputError(
                    f"{len(waiting)} rows failed in a row, the last one with: {found[-1].error} Fix that and continue "
                    "with --resume; failed rows are not kept."
                )
            if not hopeless:
                for row in waiting:
                    writer.write(row)
                waiting.clear()
            report(len(missing))
        for row in waiting:
            writer.write(row)
        writer.finish(now())
        return writer.record


def batches(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Yield rows of one kind and of about equal length together, so that little is padded."""
    ordered = sorted(rows, key=lambda row: (row.kind, len(row.query or ""), row.id))
    start = 0
    while start < len(ordered):
        stop = start
        while stop < len(ordered) and stop - start < size and ordered[stop].kind == ordered[start].kind:
            stop += 1
        yield ordered[start:stop]
        start = stop


def _answer(answerer: Answerer, suite: Suite, batch: Sequence[Row]) -> list[Row]:
    """Answer a batch; a row whose image cannot be read fails alone. What no encoding can hold of a question is asked as
    U+FFFD."""
    pictures: dict[str, Image.Image] = {}
    unreadable: dict[str, Row] = {}
    for row in batch:
        found = _picture(suite, row)
        if isinstance(found, ImageFileError):
            unreadable[row.id] = failed(row, str(found))
        else:
            pictures[row.id] = found
    readable = [row for row in batch if row.id in pictures]
    asked = [row.model_copy(update={"query": row.query and without_halves(row.query)}) for row in readable]
    done = answerer.answer(asked, [pictures[row.id] for row in readable]) if readable else []
    queries = {row.id: row.query for row in readable}
    by_id = {row.id: row.model_copy(update={"query": queries[row.id]}) for row in done} | unreadable
    return [by_id[row.id] for row in batch]


def _picture(suite: Suite, row: Row) -> Image.Image | ImageFileError:
    try:
        return suite.picture(row)
    except ImageFileError as error:
        return error


def _record(answerer: Answerer, suite: Suite) -> RunRecord:
    described = answerer.describe()
    return RunRecord(
        created=now(),
        artifact=described.artifact,
        runtime=described.runtime,
        suite=suite.record(),
        prompt=described.prompt,
        preprocessing=described.preprocessing,
        decoding=described.decoding,
        threshold=described.threshold,
        view=described.view,
        machine=machine_name(),
        versions={"safevlm-edge": VERSION},
    )


@click.command()
@click.option("--model", help="Checkpoint, compressed or not; with --server the name of its model.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Guard bundle; with --model both as a gated pair.")
@click.option("--server", metavar="URL", help="An OpenAI-compatible server, such as http://127.0.0.1:8000/v1.")
@click.option(
    "--suite", "suite_name", type=click.Choice(SUITES), default="holisafe-mini", show_default=True, help="Suite to run."
)
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), help="Folder of HoliSafe-Bench.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run record to write.")
@click.option("--resume", is_flag=True, help="Resume the run in --out if there is one.")
@click.option("--limit", type=click.IntRange(min=1), help="Number of rows, types in proportion, for a trial.")
@click.option("--pairs", type=click.IntRange(min=100), help=f"Number of pairs of a built-in suite.  [default: {PAIRS}]")
@click.option(
    "--questions", type=click.IntRange(min=10), help=f"Number of questions of a built-in suite.  [default: {QUESTIONS}]"
)
@under_option("Corruptions under which each image of a guard suite is judged, too")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Batch size in rows.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Maximum length of an answer in tokens.  [default: the suite's]",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=0.0,
    show_default=True,
    help="Temperature at which answers are sampled; 0 is greedy decoding.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of sampled decoding; each run of a suite needs its own.")
@revision_option
@grid_option
@runtime_option
@precision_option
@device_option
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Data type of the model's weights on torch.",
)
@threads_option
@view_option
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Maximum number of concurrent requests.",
)
@click.option(
    "--api-key-env", default="OPENAI_API_KEY", show_default=True, help="Environment variable that holds the API key."
)
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Seconds for a request.")
@json_option("run.json and counts")
def main(
    suite_name: str,
    data: Path | None,
    out: Path,
    resume: bool,
    limit: int | None,
    pairs: int | None,
    questions: int | None,
    under: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Run an artifact through a suite and write a run record, row by row."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not resume:
        check_new(out)
    corruptions = () if under is None else parse_corruptions(under)
    opened = open_suite(suite_name, data, limit=limit, pairs=pairs, questions=questions)
    suite = corrupted(opened, corruptions)
    tokens = given.pop("max_new_tokens") or suite.max_new_tokens
    request = Request(**{**given, "grid": parse_grid(given["grid"])}, max_new_tokens=tokens)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        open_answerer(request, suite.classes) as answerer,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task(suite.name, total=len(suite.rows))
        record = run_suite(answerer, suite, out, resume=resume, report=lambda rows: progress.update(task, advance=rows))
    _print(record, out, as_json)


def _print(record: RunRecord, out: Path, as_json: bool) -> None:
    rows = read_run(out).rows
    failed = [row for row in rows if row.error is not None]
    if as_json:
        stated = record.model_dump(mode="json", exclude_none=True)
        click.echo(json.dumps({**stated, "counts": {"rows": len(rows), "failed": len(failed)}}, indent=1))
        return
    random = " (random weights)" if record.artifact.random_weights else ""
    click.echo(
        printable(
            f"{out}: {record.artifact.name}{random} on {record.suite.name}, {len(rows)} rows, {len(failed)} failed"
        )
    )
    if failed:
        click.echo(printable(f"first failure: {failed[0].id}: {failed[0].error}"))
    command = f"python -m benchmarks.regress --baseline RUN --candidate {out} --out REPORT"
    click.echo(printable(as_started(f"next: {command}")))


if __name__ == "__main__":
    run(main)
