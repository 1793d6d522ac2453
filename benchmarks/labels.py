"""Draw answers for people to label, so that a judge's errors can be corrected.

``python -m benchmarks.labels --baseline RUN --candidate RUN --judge string --number 400 --out labels.jsonl``

People fill in ``ok`` of each line; ``benchmarks.regress --labels`` reads the file. Lines are drawn by the judge's word,
so that few labels say much, and what a line weighs is written beside it. Before that the command says how many labels
each line of the report would take. Without ``--candidate`` only the baseline's answers are drawn: that takes fewer
labels, and assumes that the judge errs alike in both runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.comparison.label_drawing import NUMBERS, Drawn, Need, assume_candidate, draw_labels, needs
from benchmarks.comparison.margins import Margins, read_margins
from benchmarks.comparison.measured import Comparison, measure
from benchmarks.runs.record import read_run
from safevlm.errors import InputError
from safevlm.files.json_file import replace_file
from safevlm.files.storage import check_writable
from safevlm.terminal.commandline import printable, run
from safevlm.terminal.options import json_option

__all__ = ["main"]

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--baseline", type=FOLDER, multiple=True, required=True, help="Run record, one per suite; repeatable.")
@click.option(
    "--candidate", type=FOLDER, multiple=True, help="Run record, one per suite; repeatable. Label both runs' answers."
)
@click.option("--judge", help="Judge to correct.  [default: that of benchmarks.regress]")
@click.option(
    "--number", type=click.IntRange(min=20), default=400, show_default=True, help="Number of answers to label."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSONL file to write; must not exist.")
@click.option("--margins", type=click.Path(path_type=Path), help="TOML or JSON file of margins, in points.")
@click.option(
    "--error",
    type=click.FloatRange(0, 0.4),
    default=0.1,
    show_default=True,
    help="Share of answers that the judge is expected to misread.",
)
@click.option(
    "--churn",
    type=click.FloatRange(0, 1),
    default=0.12,
    show_default=True,
    help="Without --candidate: share of pairs expected to change.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of the draw.")
@json_option("strata and needs")
def main(
    baseline: Sequence[Path],
    candidate: Sequence[Path],
    judge: str | None,
    number: int,
    out: Path,
    margins: Path | None,
    error: float,
    churn: float,
    seed: int,
    as_json: bool,
) -> None:
    """Draw answers for people to label, and say how many labels correct the judge."""
    from rich.console import Console
    from rich.progress import Progress

    if out.suffix != ".jsonl":
        raise InputError(f"--out {out} must end in .jsonl.")
    if out.exists():
        raise InputError(f"{out} already exists. Give --out a new file, or remove this one.")
    check_writable(out)
    allowed = Margins() if margins is None else read_margins(margins)
    before = tuple(read_run(folder) for folder in baseline)
    after = tuple(read_run(folder) for folder in candidate) or before
    judges = () if judge is None else (judge,)
    found = measure(before, after, Comparison(baseline=before, candidate=after, judges=judges, margins=allowed))
    if not found.judged:
        raise InputError("these runs share no pair of image and question, so no judge has errors to correct.")
    judged, both = found.judged[0], bool(candidate)
    drawn = draw_labels(judged, number, both=both, seed=seed)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("planning", total=len(NUMBERS))
        told = needs(
            judged if both else assume_candidate(judged, churn, seed),
            allowed,
            both=both,
            error=error,
            seed=seed,
            report=lambda done: progress.update(task, advance=done),
        )
    lines = (json.dumps(line.model_dump(exclude_none=True) | {"ok": None}) for line in drawn.lines)
    replace_file(out, "".join(f"{line}\n" for line in lines).encode("ascii"))
    if as_json:
        click.echo(json.dumps(_as_json(judged.judge, drawn, told), indent=1))
        return
    click.echo(printable("\n".join(_summary(judged.judge, drawn, told, error=error, both=both))))
    click.echo(printable(f"labels to fill in: {out}"))


def _as_json(judge: str, drawn: Drawn, told: Sequence[Need]) -> dict[str, Any]:
    return {
        "judge": judge,
        "drawn": len(drawn.lines),
        "strata": [{"stratum": name, "pairs": rows, "labels": labels} for name, rows, labels in drawn.strata],
        "needed": {need.line.key: need.labels for need in told},
    }


def _summary(judge: str, drawn: Drawn, told: Sequence[Need], *, error: float, both: bool) -> list[str]:
    where = "both runs" if both else "the baseline"
    lines = [f"{len(drawn.lines)} answers of {where}, drawn by the words of judge {judge}:"]
    lines += [f"  {name}: {labels} labels, {rows} pairs" for name, rows, labels in drawn.strata]
    lines.append(f"labels that PASS needs, if the judge misreads {100 * error:g} % of the answers:")
    for need in told:
        if need.labels is not None:
            lines.append(f"  {need.line.title}: about {need.labels:,}")
        elif max(bound.upper for bound in need.line.bounds) >= (need.line.margin or 0):
            lines.append(f"  {need.line.title}: labels do not help, because it does not pass without them either")
        elif both:
            lines.append(f"  {need.line.title}: no number of labels would do")
        else:
            lines.append(f"  {need.line.title}: no number of the baseline's labels would do; add --candidate")
    return lines


if __name__ == "__main__":
    run(main)
