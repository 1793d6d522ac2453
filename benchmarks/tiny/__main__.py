"""Score tiny checkpoints on holisafe-mini's test part: ``python -m benchmarks.tiny --model tiny-safegem``.

Suite, answers, judge and measures are those of every other run: what ``benchmarks.run`` and ``benchmarks.compare`` do,
in one command and without a record to keep.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.comparison.measured import Comparison, measure
from benchmarks.run import run_suite
from benchmarks.runs.answering.torch_model import TorchAnswerer
from benchmarks.runs.record import read_run
from benchmarks.suites.holisafe_mini import holisafe_mini
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.hub import TINY_CHECKPOINTS
from safevlm.terminal.commandline import run
from safevlm.terminal.options import json_option

__all__ = ["score"]

BATCH = 64


def score(name: str, *, pairs: int, questions: int, report: Callable[[int], None] = lambda _: None) -> dict[str, float]:
    """Return a checkpoint's shares, 0 to 1, by the keys of a comparison's lines, categories left out.

    ``report`` is called with how many more rows are done.
    """
    suite = holisafe_mini(pairs=pairs, questions=questions)
    checkpoint = open_checkpoint(name)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        with TorchAnswerer(checkpoint, suite.classes, max_new_tokens=suite.max_new_tokens, batch=BATCH) as answerer:
            run_suite(answerer, suite, folder, report=report)
        runs = [read_run(folder)]
        measured = measure(runs, runs, Comparison(baseline=runs, candidate=runs))
    shown = [line for line in measured.measures if line.group != "category"]
    found = {line.key: float(line.before.mean()) for line in shown}
    found = {line.key: found[line.key] if line.lower_is_better else 1 - found[line.key] for line in shown}
    types = [value for key, value in found.items() if key.startswith("asr/")]
    return {**found, "masr": sum(types) / len(types)}


@click.command()
@click.option(
    "--model", "models", multiple=True, default=TINY_CHECKPOINTS, show_default=True, help="Checkpoint; repeatable."
)
@click.option(
    "--pairs", type=click.IntRange(min=100), default=1200, show_default=True, help="Number of question-image pairs."
)
@click.option(
    "--questions", type=click.IntRange(min=1), default=400, show_default=True, help="Number of utility questions."
)
@json_option("the scores")
def main(models: Sequence[str], pairs: int, questions: int, as_json: bool) -> None:
    """Score tiny checkpoints on the test part of holisafe-mini."""
    from rich.console import Console
    from rich.progress import Progress

    scores = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name in models:
            task = progress.add_task(name, total=pairs + questions)
            scores[name] = score(
                name,
                pairs=pairs,
                questions=questions,
                report=lambda rows, task=task: progress.update(task, advance=rows),  # type: ignore[misc]
            )
    if as_json:
        click.echo(json.dumps(scores, indent=2))
        return
    for name, found in scores.items():
        click.echo(f"{name}: {', '.join(f'{key} {share:.1%}' for key, share in found.items())}")


if __name__ == "__main__":
    run(main)
