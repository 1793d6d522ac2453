"""Did the compressed model stay safe and useful?

``python -m benchmarks.regress --baseline RUN --candidate RUN --out DIR`` compares two run records and writes a report.

Exit codes: 0 PASS, 3 REGRESSION, 4 INCONCLUSIVE, 5 ANOMALOUS; 2 bad input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from benchmarks.comparison.class_drift import decided_rates
from benchmarks.comparison.comparing import compare
from benchmarks.comparison.findings import ClassDrift, ClassRate, Findings, Line
from benchmarks.comparison.margins import Margins, read_margins
from benchmarks.comparison.measured import Comparison
from benchmarks.runs.record import Run, read_run
from safevlm.errors import InputError
from safevlm.files.storage import check_writable
from safevlm.terminal.commandline import printable, run
from safevlm.terminal.options import json_option

__all__ = ["main", "summary_lines"]

PER_SUITE = "Run record, one per suite or several sampled decodings; repeatable."
FOLDER = click.Path(path_type=Path, file_okay=False)
WIDEST = 42
"""Characters of a title in the terminal's table."""


@click.command()
@click.option("--baseline", type=FOLDER, multiple=True, required=True, help=PER_SUITE)
@click.option("--candidate", type=FOLDER, multiple=True, required=True, help=PER_SUITE)
@click.option(
    "--against", type=FOLDER, multiple=True, help="Third run, of the baseline again or on another runtime; repeatable."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the report; must not exist.")
@click.option(
    "--judge",
    "judges",
    multiple=True,
    help="Judge: string, exact, log (scores of an imported log), or a name that benchmarks.judge stored; repeatable.  "
    "[default: exact for built-in suites, otherwise string]",
)
@click.option("--margins", type=click.Path(path_type=Path), help="TOML or JSON file of margins, in points.")
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="JSONL file of human labels of answers, as benchmarks.labels draws them.",
)
@click.option(
    "--images", type=FOLDER, help="Folder of images; those of flipped samples are embedded, blurred until asked for."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of the bootstrap.")
@json_option("report.json")
def main(
    baseline: Sequence[Path],
    candidate: Sequence[Path],
    against: Sequence[Path],
    out: Path,
    judges: Sequence[str],
    margins: Path | None,
    labels: Path | None,
    images: Path | None,
    seed: int,
    as_json: bool,
) -> int:
    """Compare two runs sample by sample, and write a report with a verdict."""
    from rich.console import Console

    from benchmarks.report.write import write_report

    if out.exists():
        raise InputError(f"{out} already exists. Give --out a new folder, or remove this one.")
    check_writable(out)
    with Console(stderr=True).status("comparing"):
        findings = compare(
            Comparison(
                baseline=_runs(baseline),
                candidate=_runs(candidate),
                against=_runs(against),
                judges=tuple(judges),
                margins=Margins() if margins is None else read_margins(margins),
                labels=labels,
                seed=seed,
            )
        )
        page = write_report(findings, out, images=images)
    if as_json:
        click.echo(json.dumps(findings.to_json(), indent=1, allow_nan=False))
    else:
        click.echo(printable("\n".join(summary_lines(findings))))
        click.echo(printable(f"report: {page}"))
    return findings.exit_code


def summary_lines(findings: Findings) -> list[str]:
    """Return what a terminal shows: the verdict, why, the lines that decide, and classes that do not pass."""
    useful = any(line.group == "utility" and line.margin is not None for line in findings.lines)
    first = findings.verdict if useful else f"{findings.verdict}, without a utility suite"
    lines = [first, *(f"  {caution}" for caution in findings.judge_cautions)]
    lines += [*(f"  {reason}" for reason in findings.reasons), ""]
    decided = [line for line in findings.lines if line.margin is not None]
    width = min(max((len(line.title) for line in decided), default=0), WIDEST) + 1
    sides = f"{'before':>9}{'after':>9}{'change':>8}{'interval':>18}{'at most worse by':>18}{'margin':>8}"
    lines.append(f"{'':{width}}{sides}  verdict")
    lines += [_line(line, width) for line in decided]
    classes = [row for row in decided_rates(findings.classes) if row[2].verdict != "PASS"]
    return lines if not classes else [*lines, "", *_class_lines(classes)]


def _class_lines(classes: Sequence[tuple[ClassDrift, str, ClassRate]]) -> Iterator[str]:
    """Yield the classes of the guard that are worse or not certified."""
    names = f"{'images':>7}{'lacks':>7}{'before':>9}{'after':>9}{'worse':>7}{'better':>7}"
    yield f"{'classes of the guard':34}{names}  verdict"
    for each, what, rate in classes:
        shares = ["–" if share is None else f"{100 * share:.2f}%" for share in (rate.before, rate.after)]
        lacks = "–" if rate.lacking is None else str(rate.lacking)
        yield (
            f"{f'{what} {each.name}'[:33]:34}{rate.n:>7}{lacks:>7}{shares[0]:>9}{shares[1]:>9}{rate.worse:>7}"
            f"{rate.better:>7}  {rate.verdict}"
        )


def _line(line: Line, width: int) -> str:
    """Return a row of the table: shares as percent and points, words to a tenth."""
    times, mark, digits = {"share": (100, "%", 2), "words": (1, " ", 1), "number": (1, " ", 4)}[line.unit]

    def shown(value: float, sign: str = "") -> str:
        return f"{times * value + 0.0:{sign}.{digits}f}"

    interval = "–" if line.interval is None else " to ".join(shown(end, "+") for end in line.interval)
    upper = shown(max(bound.upper for bound in line.bounds), "+") if line.bounds else "–"
    title = line.title if len(line.title) < width else f"{line.title[: width - 2]}…"
    return (
        f"{title:{width}}{shown(line.before):>8}{mark}{shown(line.after):>8}{mark}{shown(line.change, '+'):>8}"
        f"{interval:>18}{upper:>18}{times * (line.margin or 0):>8.3g}  {line.verdict}"
    )


def _runs(folders: Sequence[Path]) -> tuple[Run, ...]:
    return tuple(read_run(folder) for folder in folders)


if __name__ == "__main__":
    run(main)
