"""``python -m benchmarks.speed quantize``: this project beside those who quantize the same model."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.real.names import CHECKPOINT
from benchmarks.real.packages import ENVIRONMENT, WEIGHTS, find_weights, package_files
from benchmarks.speed.quantize_cases import CASES, quantize_table
from benchmarks.speed.quantize_real_cases import REAL_PEERS, WAYS, RealCase, find_peers, real_record, real_table
from benchmarks.speed.report import check_out, quantize_record, real_quantize_record
from safevlm.errors import InputError
from safevlm.files.json_file import replace_file
from safevlm.terminal.options import json_option, threads_option

__all__ = ["quantize"]

USUAL = RealCase(weights="smollm2")
PLAIN_PEERS = Path(".venv-gptqmodel/bin/python")
REAL_PEERS_PYTHON = ENVIRONMENT / "bin" / "python"
REAL_ONLY = ("weights", "subject", "who", "int8", "bits", "rows", "seed", "windows", "iterations", "minutes", "layers")
PLAIN_ONLY = ("cases", "no_peers", "rounds", "threads")
Measured = tuple[dict[str, Any], list[str], bool]
"""The record, the table's lines, whether anyone failed."""


@click.command()
@click.option(
    "--case",
    "cases",
    type=click.Choice(tuple(CASES)),
    multiple=True,
    default=tuple(CASES),
    show_default=True,
    help="Case to quantize: a small Llama, or one layer of a 7B model; repeatable.",
)
@click.option(
    "--peers",
    type=click.Path(path_type=Path),
    help=f"Python of the peers' environment (make peers).  [default: {PLAIN_PEERS}; with --real that of {ENVIRONMENT}]",
)
@click.option("--no-peers", is_flag=True, help="Measure this project alone.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Number of rounds; peers take turns."
)
@threads_option
@click.option("--real", is_flag=True, help="Quantize real weights instead, and measure KL on held-out text.")
@click.option(
    "--weights",
    type=click.Choice(tuple(WEIGHTS)),
    default=USUAL.weights,
    show_default=True,
    help="With --real: language model to quantize.",
)
@click.option(
    "--subject",
    type=click.Path(path_type=Path, file_okay=False),
    help="With --real: folder that benchmarks.real_checkpoint wrote.  [default: one is made for it]",
)
@click.option(
    "--who",
    multiple=True,
    help=f"With --real: who quantizes, of {', '.join((*WAYS, *REAL_PEERS))}; repeatable.  [default: all]",
)
@click.option("--int8", is_flag=True, help="With --real: round weights and inputs to 8 bits (quantize.int8) instead.")
@click.option(
    "--bits",
    type=click.IntRange(2, 8),
    multiple=True,
    default=USUAL.bits,
    show_default=True,
    help="With --real: bits per weight; repeatable.",
)
@click.option(
    "--rows",
    type=click.IntRange(1, 128),
    default=USUAL.rows,
    show_default=True,
    help="With --real: number of calibration rows.",
)
@click.option(
    "--seed",
    type=int,
    default=USUAL.seed,
    show_default=True,
    help="With --real: random seed of calibration rows and of the held-out text.",
)
@click.option(
    "--windows",
    type=click.IntRange(min=1),
    default=USUAL.windows,
    show_default=True,
    help=f"With --real: number of windows of {USUAL.length} tokens of held-out text.",
)
@click.option(
    "--iterations",
    type=click.IntRange(min=1),
    default=USUAL.iterations,
    show_default=True,
    help="With --real: iterations of AutoRound.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=USUAL.minutes,
    show_default=True,
    help="With --real: minutes that this project's tuning may take.",
)
@click.option("--layers", type=click.IntRange(min=1), help="With --real: number of decoder layers.  [default: all]")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to this JSON file.")
@json_option("the result")
def quantize(real: bool, peers: Path | None, out: Path | None, as_json: bool, **given: Any) -> int:
    """Time GPTQ of the same language model by this project, GPTQModel and llm-compressor, on the CPU.

    With --real, of real weights: by this project before its own steps, as it stands and tuned, by GPTQModel, GPTAQ,
    FOEM, llm-compressor and AutoRound, with the KL divergence from the 16-bit model on held-out text. With --int8, of
    weights and inputs, by this project before and as it stands, and by llm-compressor.
    """
    from rich.console import Console

    _check_given(click.get_current_context(), real)
    check_out(out)
    command = shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]])
    with Console(stderr=True).status("quantize") as status:
        measured = _real if real else _plain
        record, lines, failed = measured(given, peers, command, status.update)
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    if out is not None:
        replace_file(out, text.encode())
    click.echo(text.rstrip() if as_json else "\n".join(lines))
    return int(failed)


def _check_given(context: click.Context, real: bool) -> None:
    """Refuse options of the other comparison. Raises InputError."""
    for name in PLAIN_ONLY if real else REAL_ONLY:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = next(each.opts[0] for each in context.command.params if each.name == name)
            raise InputError(f"{option} {'does not go with' if real else 'needs'} --real. Leave out one of the two.")
    if context.params["int8"] and context.get_parameter_source("bits") is click.core.ParameterSource.COMMANDLINE:
        raise InputError("--bits does not go with --int8. Leave out one of the two.")


def _plain(given: Mapping[str, Any], peers: Path | None, command: str, report: Callable[[str], None]) -> Measured:
    from benchmarks.speed.quantize import measure_quantize

    found = [
        measure_quantize(
            CASES[case],
            peers_python=None if given["no_peers"] else (peers or PLAIN_PEERS).absolute(),
            rounds=given["rounds"],
            threads=given["threads"],
            report=report,
        )
        for case in given["cases"]
    ]
    lines = [line for speed in found for line in [*quantize_table(speed), ""]]
    return quantize_record(found, command), lines, any(row.problem for speed in found for row in speed.rows)


def _real(given: Mapping[str, Any], peers: Path | None, command: str, report: Callable[[str], None]) -> Measured:
    from benchmarks.real.checkpoint import write_real_checkpoint
    from benchmarks.speed.quantize import PEER_VARIABLES
    from benchmarks.speed.quantize_real import measure_real

    case = RealCase(**{name: given[name] for name in REAL_ONLY if name not in ("subject", "who")})
    who, weights = find_peers(given["who"], int8=case.int8), find_weights(case.weights)
    python = (peers or REAL_PEERS_PYTHON).absolute()
    if any(name in REAL_PEERS for name in who) and not python.is_file():
        raise InputError(f"{python} is missing. Run make peers to create the environment of the peers.")
    subject: Path | None = given["subject"]
    if subject is None:
        package_files(weights)
    elif not (subject / CHECKPOINT).is_dir():
        raise InputError(f"--subject {subject}: there is no {CHECKPOINT}/. Give what benchmarks.real_checkpoint wrote.")
    with tempfile.TemporaryDirectory(prefix="safevlm-subject-") as name:
        folder = subject or Path(name, "subject")
        if subject is None:
            write_real_checkpoint(weights, folder, layers=case.layers, report=report)
        tokens, rows = measure_real(case, folder, who, peers_python=python, variables=PEER_VARIABLES, report=report)
    record = real_quantize_record(real_record(case, weights.note, tokens, rows), command)
    return record, real_table(case, weights.note, tokens, rows), any(row.problem for row in rows)
