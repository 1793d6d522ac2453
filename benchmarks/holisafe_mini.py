"""Write ``holisafe-mini`` to disk: ``python -m benchmarks.holisafe_mini --out DIR``.

The folder has HoliSafe-Bench's published layout, ``holisafe_bench.json`` and ``images/``, and beside it
``question_answering.json`` (utility) and ``answers.json``: the one right answer of every row, by file and id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import click

from calibration.holisafe_mini.scene import PARTS, draw
from calibration.holisafe_mini.suite import Answered, Suite, build_suite
from safevlm.errors import InputError
from safevlm.files.draft import draft_of, publish
from safevlm.files.storage import storing
from safevlm.terminal.commandline import printable, run

__all__ = ["PAIRS_FILE", "QUESTIONS_FILE", "write_suite"]

PAIRS_FILE = "holisafe_bench.json"
QUESTIONS_FILE = "question_answering.json"
ANSWERS_FILE = "answers.json"


def write_suite(suite: Suite, out: Path) -> None:
    """Write a suite as PNG and JSON into ``out``, which must not exist; all of it or nothing.

    Raises InputError when ``out`` exists.
    """
    if out.exists():
        raise InputError(f"{out} already exists. Give --out a new folder, or remove this one.")
    with draft_of(out) as draft, storing(out, advice="give --out another place"):
        for picture in suite.pictures:
            path = draft / "images" / picture.path
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(picture.scene).save(path, optimize=False)
        _write(draft / PAIRS_FILE, [item.row for item in suite.pairs])
        _write(draft / QUESTIONS_FILE, [item.row for item in suite.questions])
        answers = {PAIRS_FILE: _answers(suite.pairs), QUESTIONS_FILE: _answers(suite.questions)}
        _write(draft / ANSWERS_FILE, answers)
        publish(draft, out)


def _answers(items: Iterable[Answered]) -> dict[str, str]:
    return {str(item.row["id"]): item.answer for item in items}


def _write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--part", type=click.Choice(PARTS), default="test", show_default=True, help="Part of the suite.")
@click.option(
    "--pairs", type=click.IntRange(min=100), default=1200, show_default=True, help="Number of question-image pairs."
)
@click.option(
    "--questions", type=click.IntRange(min=0), default=400, show_default=True, help="Number of utility questions."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed; another seed draws another suite.")
def main(out: Path, part: str, pairs: int, questions: int, seed: int) -> None:
    """Write a part of holisafe-mini as PNG and JSON; the same seed gives the same bytes."""
    suite = build_suite(part, pairs=pairs, questions=questions, seed=seed)
    write_suite(suite, out)
    counts = f"{len(suite.pictures)} images, {len(suite.pairs)} pairs, {len(suite.questions)} questions"
    click.echo(printable(f"{out}: {counts}"))


if __name__ == "__main__":
    run(main)
