"""Latency, memory and size, peers side by side: ``python -m benchmarks.speed guard --model tiny-safegem``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click

from benchmarks.shapes.shapes import find_shape, shape_names
from benchmarks.speed.gate import GateOptions, gate_table, measure_gate
from benchmarks.speed.gateway import GatewayOptions, gateway_table, measure_gateway, tiny_pair
from benchmarks.speed.gateway_soak import soak_gateway, soak_table
from benchmarks.speed.guard import GuardSpeed, SpeedOptions, measure_guard
from benchmarks.speed.peer import Subject
from benchmarks.speed.quantize_command import quantize
from benchmarks.speed.report import check_out, gate_record, gateway_record, guard_record, guard_table, soak_record
from safevlm.checkpoint.family import TapSource
from safevlm.errors import InputError
from safevlm.files.json_file import replace_file
from safevlm.machine import core_count
from safevlm.terminal.commandline import printable, run
from safevlm.terminal.options import json_option, model_option, revision_option, tap_option, threads_option

__all__ = ["gate_record", "guard_record", "guard_table", "main"]

# -- the commands ---------------------------------------------------------------------------------------


@click.group()
def main() -> None:
    """Measure speed, size and memory, peers side by side."""


@main.command()
@model_option(required=False)
@click.option("--shape", help=f"Measure random weights at the shape of {', '.join(shape_names())}.")
@click.option("--layers", type=int, help="Number of vision layers to keep; only with --shape.")
@tap_option
@revision_option
@click.option("--bundle", type=click.Path(path_type=Path), help="Measure the files of this guard bundle, too.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="Precisions to export, separated by commas: fp32, fp16, int8.",
)
@click.option(
    "--batch",
    "batches",
    type=int,
    multiple=True,
    default=SpeedOptions.batches,
    show_default=True,
    help="Batch size; repeatable.",
)
@click.option("--embeddings", is_flag=True, help="Measure a shared vision tower, too, and the tower without a guard.")
@click.option("--peers", is_flag=True, help="Measure torch.compile, plain ONNX Runtime, OpenVINO and NNCF, too.")
@click.option(
    "--gpu-alone",
    is_flag=True,
    help="Measure on the GPU alone: torch in float32 and float16, torch.compile, ONNX Runtime on CUDA, TensorRT.",
)
@click.option(
    "--peers-python",
    type=click.Path(path_type=Path),
    default=Path(".venv-openvino/bin/python"),
    show_default=True,
    help="Python of OpenVINO's environment (make peers).",
)
@click.option(
    "--rounds", type=int, default=SpeedOptions.rounds, show_default=True, help="Number of rounds; peers take turns."
)
@click.option(
    "--repeats", type=int, default=SpeedOptions.repeats, show_default=True, help="Maximum number of runs per round."
)
@click.option(
    "--seconds",
    type=float,
    default=SpeedOptions.seconds,
    show_default=True,
    help="Seconds per round after which no run starts.",
)
@threads_option
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of images and weights.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to this JSON file.")
@json_option("the result")
def guard(
    model: str | None,
    shape: str | None,
    layers: int | None,
    tap: TapSource | None,
    revision: str | None,
    bundle: Path | None,
    precision: str,
    batches: tuple[int, ...],
    embeddings: bool,
    peers: bool,
    gpu_alone: bool,
    peers_python: Path,
    rounds: int,
    repeats: int,
    seconds: float,
    threads: int | None,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> int:
    """Time a guard on torch eager, ONNX Runtime and, where present, TensorRT.

    The guard of --model, or random weights at the --shape of a real one. Exits with 1 when a peer failed; one that
    cannot run here is listed with the reason.
    """
    subject = _subject(model, shape, layers=layers, tap=tap, revision=revision, seed=seed)
    options = SpeedOptions(
        batches=batches,
        precisions=tuple(precision.split(",")),
        embeddings=embeddings,
        peers=str(_interpreter(peers_python)) if peers else None,
        gpu_alone=gpu_alone,
        rounds=rounds,
        repeats=repeats,
        seconds=seconds,
        threads=core_count() if threads is None else threads,
        seed=seed,
    )
    check_out(out)
    speed = _with_progress(subject, options, bundle)
    record = guard_record(speed, shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]]))
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    if out is not None:
        replace_file(out, text.encode())
    click.echo(text.rstrip() if as_json else "\n".join(guard_table(speed)))
    return int(any(row.status == "failed" for row in speed.rows))


@main.command()
@model_option(required=False)
@click.option("--shape", help=f"Measure random weights at the shape of {', '.join(shape_names())}.")
@click.option("--layers", type=int, help="Number of layers of language model and tower; only with --shape.")
@tap_option
@revision_option
@click.option("--bundle", type=click.Path(path_type=Path), help="Guard bundle.  [default: one is made for it]")
@click.option(
    "--rounds", type=int, default=GateOptions.rounds, show_default=True, help="Number of rounds; the ways take turns."
)
@click.option("--repeats", type=int, default=GateOptions.repeats, show_default=True, help="Number of runs per round.")
@click.option(
    "--max-new-tokens",
    type=int,
    default=GateOptions.max_new_tokens,
    show_default=True,
    help="Maximum length of an answer in tokens.",
)
@threads_option
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of image and weights.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to this JSON file.")
@json_option("the result")
def gate(
    model: str | None,
    shape: str | None,
    layers: int | None,
    tap: TapSource | None,
    revision: str | None,
    bundle: Path | None,
    rounds: int,
    repeats: int,
    max_new_tokens: int,
    threads: int | None,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time the gate beside no guard, the published way and the exact verdict alone, on the CPU."""
    subject = _subject(model, shape, layers=layers, tap=tap, revision=revision, seed=seed)
    options = GateOptions(
        rounds=rounds,
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        threads=core_count() if threads is None else threads,
        seed=seed,
    )
    check_out(out)
    speed = measure_gate(subject, options, bundle=bundle)
    record = gate_record(speed, shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]]))
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    if out is not None:
        replace_file(out, text.encode())
    click.echo(text.rstrip() if as_json else "\n".join(gate_table(speed)))


@main.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="Guard bundle.  [default: tiny-safegem's, made for it]")
@click.option("--gguf", type=click.Path(path_type=Path), help="GGUF folder.  [default: tiny-safegem's, made for it]")
@click.option(
    "--rounds",
    type=int,
    default=GatewayOptions.rounds,
    show_default=True,
    help="Number of rounds; gateway and upstream take turns.",
)
@click.option(
    "--requests",
    type=int,
    default=GatewayOptions.requests,
    show_default=True,
    help="Number of requests of each kind per round.",
)
@click.option(
    "--clients", type=int, default=GatewayOptions.clients, show_default=True, help="Number of concurrent clients."
)
@click.option(
    "--soak", type=float, metavar="MINUTES", help="Minutes to serve honest clients and attackers instead of timing."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to this JSON file.")
@json_option("the result")
def gateway(
    bundle: Path | None,
    gguf: Path | None,
    rounds: int,
    requests: int,
    clients: int,
    soak: float | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time a gateway beside its upstream, blocks, and llama.cpp's first token with and without a gate.

    With --soak, no times: honest clients and attackers together, and the gateway's memory.
    """
    from rich.console import Console

    options = GatewayOptions(rounds=rounds, requests=requests, clients=clients)
    check_out(out)
    with Console(stderr=True).status("gateway") as status, tiny_pair(bundle, gguf, status.update) as pair:
        if soak is None:
            speed = measure_gateway(*pair, options, report=status.update)
            lines = gateway_table(speed)
        else:
            soaked = soak_gateway(pair[0], soak, clients=clients, report=status.update)
            lines = soak_table(soaked)
    command = shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]])
    record = gateway_record(speed, options, command) if soak is None else soak_record(soaked, command)
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    if out is not None:
        replace_file(out, text.encode())
    click.echo(text.rstrip() if as_json else "\n".join(lines))


main.add_command(quantize)


@main.command()
@click.argument("records", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for speed.html and speed.json.")
def page(records: tuple[Path, ...], out: Path) -> None:
    """Show RECORDS that these commands (or benchmarks.true_shapes) wrote as one page, without network."""
    from benchmarks.speed.page import write_speed_page

    click.echo(f"page: {printable(str(write_speed_page(records, out)))}")


def _subject(
    model: str | None,
    shape: str | None,
    *,
    layers: int | None,
    tap: TapSource | None,
    revision: str | None,
    seed: int,
) -> Subject:
    if (model is None) == (shape is None):
        given = "neither was given" if model is None else "both were given"
        raise InputError(
            f"give either --model (a checkpoint) or --shape (random weights at a real one's shape); {given}."
        )
    if model is not None:
        if layers is not None:
            raise InputError("--layers needs --shape; it does not go with --model.")
        return Subject(name=model, random=False, tap=tap, revision=revision, seed=seed)
    assert shape is not None
    if tap is not None or revision is not None:
        raise InputError("--tap and --revision need --model; they do not go with --shape.")
    find_shape(shape).shortened(layers)
    return Subject(name=shape, random=True, layers=layers, seed=seed)


def _interpreter(path: Path) -> Path:
    """Return the absolute path of a peers' Python, links kept: an environment is found by them."""
    if not path.is_file():
        raise InputError(f"--peers-python {path}: there is no such file. Run make peers to create the environment.")
    return path.absolute()


def _with_progress(subject: Subject, options: SpeedOptions, bundle: Path | None) -> GuardSpeed:
    """Measure, with a progress bar on a terminal's standard error."""
    if not sys.stderr.isatty():
        return measure_guard(subject, options, bundle=bundle)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("opening", total=1.0)
        return measure_guard(
            subject,
            options,
            bundle=bundle,
            report=lambda share, stage: progress.update(task, completed=share, description=stage),
        )


if __name__ == "__main__":
    run(main)
