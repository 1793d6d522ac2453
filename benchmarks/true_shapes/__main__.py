"""Run the whole path at real shapes: ``python -m benchmarks.true_shapes --shape SafeLLaVA-7B``.

Weights are random, so that only times, sizes and memory mean something. What was measured is written after each step;
the same command with the same ``--work`` resumes it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.holisafe_mini import write_suite
from benchmarks.shapes.shapes import find_shape, shape_names
from benchmarks.true_shapes.steps import STEPS, Step, steps_of
from benchmarks.true_shapes.watching import watch
from calibration.holisafe_mini.suite import build_suite
from safevlm.errors import InputError
from safevlm.files.storage import shown_bytes
from safevlm.machine import machine_name, now
from safevlm.terminal.commandline import printable, run
from safevlm.terminal.options import json_option
from safevlm.version import VERSION

__all__ = ["main"]

RESULTS = "true_shapes.json"
PAIRS = 120


@click.command(name="true_shapes")
@click.option(
    "--shape", "names", multiple=True, help=f"Shape to write: {', '.join(shape_names())}; repeatable.  [default: all]"
)
@click.option("--layers", type=click.IntRange(min=1), default=2, show_default=True, help="Number of decoder layers.")
@click.option("--all-layers", is_flag=True, help="Use all decoder layers instead of --layers.")
@click.option("--sparse", is_flag=True, help="Write holes for the decoder layers' matrices, to save disk space.")
@click.option("--steps", default=",".join(STEPS), show_default=True, help="Steps to run, separated by commas.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/true_shapes"),
    show_default=True,
    help="Folder to write stand-ins and outputs to.",
)
@click.option("--keep", is_flag=True, help="Keep the steps' output instead of removing it after each shape.")
@json_option("what was measured")
def main(
    names: tuple[str, ...],
    layers: int,
    all_layers: bool,
    sparse: bool,
    steps: str,
    work: Path,
    keep: bool,
    as_json: bool,
) -> int:
    """Write stand-ins of real shapes and run every step on them, watched from outside.

    Exits with 1 when a step fails or takes more memory than is promised.
    """
    wanted = steps.split(",")
    unknown = sorted(set(wanted) - set(STEPS))
    if unknown:
        raise InputError(f"--steps {','.join(unknown)} is unknown. Allowed: {', '.join(STEPS)}.")
    shapes = [find_shape(name) for name in names or shape_names()]
    work.mkdir(parents=True, exist_ok=True)
    _pictures(work)
    rows = _kept(work)
    console = Console(stderr=True)
    for shape in shapes:
        depth = None if all_layers else layers
        place = work / f"{shape.name}-{depth or 'all'}"
        for name, step in steps_of(shape, place, layers=depth, sparse=sparse).items():
            key = f"{place.name}{'-sparse' if sparse else ''}/{name}"
            if name not in wanted or (key in rows and (step.makes is None or step.makes.exists())):
                continue
            console.print(f"{shape.name}: {name}", highlight=False)
            rows[key] = _measure(shape.name, depth, sparse, step)
            (work / RESULTS).write_text(json.dumps(_record(rows), indent=1) + "\n", encoding="utf-8")
            if rows[key]["problem"]:
                console.print(printable(f"  {rows[key]['problem']}"), highlight=False)
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
    click.echo(json.dumps(_record(rows), indent=1) if as_json else "\n".join(_table(list(rows.values()))))
    return int(any(row["problem"] for row in rows.values()))


def _measure(shape: str, layers: int | None, sparse: bool, step: Step) -> dict[str, Any]:
    seen = watch(step.arguments)
    problem = None
    if seen.code not in step.codes:
        problem = f"ended with {seen.code}: {(seen.said.strip().splitlines() or ['nothing was said'])[-1]}"
    elif step.most_bytes is not None and seen.peak_bytes > step.most_bytes:
        problem = f"took {shown_bytes(seen.peak_bytes)}; at most {shown_bytes(step.most_bytes)} are promised"
    row = {"shape": shape, "layers": layers, "sparse": sparse, "step": step.name, "problem": problem}
    return {**row, "most_bytes": step.most_bytes, **asdict(seen)}


def _pictures(work: Path) -> None:
    """Write calibration images, and one to ask about, unless they are there."""
    if (work / "picture.png").exists():
        return
    shutil.rmtree(work / "pictures", ignore_errors=True)
    write_suite(build_suite("calibration", pairs=PAIRS, questions=0), work / "pictures")
    first = sorted((work / "pictures" / "images").rglob("*.png"))[0]
    shutil.copyfile(first, work / "picture.png")


def _kept(work: Path) -> dict[str, dict[str, Any]]:
    path = work / RESULTS
    if not path.exists():
        return {}
    stated = json.loads(path.read_text(encoding="utf-8"))
    return {str(row.pop("key")): row for row in stated["rows"]}


def _record(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "benchmark": "true_shapes",
        "created": now(),
        "machine": machine_name(),
        "versions": {"safevlm-edge": VERSION},
        "weights": "random",
        "rows": [{"key": key, **row} for key, row in rows.items()],
    }


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["random weights: only sizes, times and memory mean something", ""]
    lines.append(f"{'shape':20}{'layers':>7}  {'step':7}{'seconds':>9}{'peak GiB':>10}{'read GiB':>10}  ")
    for row in rows:
        sizes = f"{row['peak_bytes'] / 2**30:10.2f}{row['read_bytes'] / 2**30:10.2f}"
        lines.append(
            f"{row['shape']:20}{row['layers'] or 'all':>7}  {row['step']:7}{row['seconds']:9.1f}{sizes}  "
            f"{printable(row['problem'] or '')}"
        )
    return lines


if __name__ == "__main__":
    run(main)
