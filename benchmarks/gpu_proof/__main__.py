"""Prove what a GPU machine can prove, within minutes: ``python -m benchmarks.gpu_proof --wheels DIR``.

Starts without the packages that such a machine may lack: they come as wheels, for the steps, which are processes of
their own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu_proof.finding import FAILED, unproved
from benchmarks.gpu_proof.lines import LATE, Line, append, latest, line_of, read_lines, still_to_do
from benchmarks.gpu_proof.section import section
from benchmarks.gpu_proof.steps import PROOFS, STEPS, Step, find_steps
from benchmarks.gpu_proof.wheels import LOAD_BYTES, install, prepare
from benchmarks.speed.isolation import Outcome, run_isolated
from safevlm.errors import InputError, SafeVLMError
from safevlm.files.storage import shown_bytes, storing
from safevlm.imports.siblings import ROOT
from safevlm.machine import core_count
from safevlm.terminal.commandline import printable, run

__all__ = ["main"]

LINES, SECTION = "proof.jsonl", "proof.md"
LOOKING = 300
"""Seconds, for what is no step: looking at the machine, and the page."""
MEBIBYTE = 2**20


@click.command(name="gpu_proof")
@click.option(
    "--steps",
    "names",
    help=f"Steps to run, separated by commas: {', '.join(each.name for each in STEPS)}.  [default: all]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("build/gpu_proof"),
    show_default=True,
    help="Folder for lines, page and section; steps already proved there are not run again.",
)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for what the steps write.  [default: OUT/work]")
@click.option(
    "--wheels",
    type=click.Path(path_type=Path),
    help="Folder of wheels, or of loads that --prepare wrote, to install only for the steps.  [default: .whl]",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=25.0,
    show_default=True,
    help="Minutes for this call; a step that is cut off is run again by the next call.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Factor for the deadline of each step.",
)
@click.option("--again", is_flag=True, help="Also run steps that are already proved.")
@click.option(
    "--dry-run", is_flag=True, help="Run each step on the CPU at its smallest size, to test the steps themselves."
)
@click.option(
    "--prepare",
    "prepared",
    type=click.Path(path_type=Path),
    help="Download the wheels into this new folder, in loads for --wheels, and run no step.",
)
@click.option(
    "--load-mib",
    type=click.IntRange(min=1),
    default=LOAD_BYTES // MEBIBYTE,
    show_default=True,
    help="Maximum size of a load in MiB, with --prepare.",
)
def main(
    names: str | None,
    out: Path,
    work: Path | None,
    wheels: Path | None,
    minutes: float,
    patience: float,
    again: bool,
    dry_run: bool,
    prepared: Path | None,
    load_mib: int,
) -> int:
    """Prove on a GPU what needs one, step by step, and print a JSON line as each step ends.

    No step stops the others. Run the command again with the same --out to resume it. Page and section are written at
    the end. Exits with 1 when a claim failed or a step was late.
    """
    if prepared is not None:
        _prepare(prepared, load_mib)
        return 0
    end = time.monotonic() + 60 * minutes
    steps = find_steps(names)
    work = (work or out / "work").absolute()
    with storing(out, advice="give --out another place"):
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
    lines = read_lines(out / LINES)
    variables, here = _surroundings(wheels, work, dry=dry_run)
    left = steps if again else still_to_do(steps, lines, here)
    for number, step in enumerate(left):
        if time.monotonic() >= end:
            _say(f"no time is left for {', '.join(each.name for each in left[number:])}: run the command again")
            break
        line = _run(step, here, work, variables, min(step.seconds * patience, end - time.monotonic()))
        with storing(out, advice="give --out another place"):
            append(out / LINES, line)
        lines.append(line)
        click.echo(json.dumps(line))
    last = latest(lines)
    _write(out, work, variables, last)
    return int(any(line["outcome"] in (FAILED, LATE) for line in last.values()))


def _prepare(folder: Path, load_mib: int) -> None:
    found = prepare(folder, load_bytes=load_mib * MEBIBYTE)
    for wheel in found:
        pieces = f", {len(wheel.pieces)} pieces" if len(wheel.pieces) > 1 else ""
        click.echo(printable(f"{wheel.name}: {shown_bytes(wheel.bytes)}{pieces}"))
    loads = sorted(each.name for each in folder.iterdir())
    click.echo(
        printable(
            f"{folder}: {len(loads)} loads. Bring them to the machine, one at a time if they must be, and run there: "
            f"python -m benchmarks.gpu_proof --wheels {folder}"
        )
    )


def _surroundings(wheels: Path | None, work: Path, *, dry: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the steps' environment variables, and what each line says of the machine.

    Raises InputError, SafeVLMError.
    """
    if wheels is not None and not wheels.is_dir():
        raise InputError(
            f"--wheels {wheels}: there is no such folder. --prepare {wheels} writes it where pip can download."
        )
    folder = wheels or Path(".whl")
    folders, states = install(folder, work / "site") if folder.is_dir() else ([], [])
    for each in states:
        _say(f"{each['wheel']}: {each['state']}")
    variables = {"PYTHONPATH": _path("PYTHONPATH", [ROOT, *folders], [])}
    looked = run_isolated(
        "benchmarks.gpu_proof.machine:look", {}, threads=core_count(), variables=variables, deadline=LOOKING
    )
    if not looked.answers:
        raise SafeVLMError(f"the machine could not be examined: {looked.problem}\n{looked.said}")
    here = dict(looked.answers[0])
    variables["LD_LIBRARY_PATH"] = _path("LD_LIBRARY_PATH", [], here.pop("libraries"))
    return variables, {**here, "dry": dry, "wheels": states}


def _path(variable: str, before: Sequence[object], after: Sequence[object]) -> str:
    """Return a search path of the environment with folders before and after what it holds."""
    return os.pathsep.join(map(str, (*before, *filter(None, [os.environ.get(variable)]), *after)))


def _run(step: Step, here: Mapping[str, Any], work: Path, variables: Mapping[str, str], deadline: float) -> Line:
    """Run one step, unless it is plain that nothing can be tried, and return its line."""
    begun = time.monotonic()
    lacking = _lacking(here)
    if lacking is not None:
        outcome = Outcome(answers=(unproved(step.title, lacking),))
    else:
        _say(f"{step.name}: {step.title}, at most {deadline:.0f} s")
        request = {"device": "cpu" if here["dry"] else "cuda", "dry": here["dry"], "work": str(work)}
        outcome = run_isolated(
            f"{PROOFS}.{step.function}",
            request,
            threads=core_count(),
            variables=variables,
            deadline=deadline,
        )
    return line_of(step, outcome, here, seconds=time.monotonic() - begun, deadline=deadline)


def _lacking(here: Mapping[str, Any]) -> str | None:
    if here["missing"]:
        return f"missing packages: {', '.join(here['missing'])}; bring them as wheels, with --prepare and --wheels"
    if here["gpu"] is None and not here["dry"]:
        return "no GPU that torch can use; --dry-run tries the steps on the CPU"
    return None


def _write(out: Path, work: Path, variables: Mapping[str, str], last: Mapping[str, Line]) -> None:
    """Write the section and the page. A page that cannot be made is no reason to lose the lines."""
    with storing(out, advice="give --out another place"):
        (out / SECTION).write_text(section(last), encoding="utf-8")
    _say(f"section: {out / SECTION}")
    if not last:
        return
    request = {"lines": str(out / LINES), "out": str(out), "work": str(work)}
    made = run_isolated(
        "benchmarks.gpu_proof.page:write", request, threads=core_count(), variables=variables, deadline=LOOKING
    )
    _say(f"page: {made.answers[0]['page']}" if made.answers else f"no page: {made.problem}")


def _say(text: str) -> None:
    click.echo(printable(text), err=True)


if __name__ == "__main__":
    run(main)
