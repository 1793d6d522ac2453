"""The command line of the gate: see ``python -m runtimes.gate --help``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from models.commandline import printable
from models.errors import InputError
from models.family import TapSource
from runtimes.gate_result import GateResult
from runtimes.policy import Policy, read_policy

if TYPE_CHECKING:
    from runtimes.gate import Gate
    from runtimes.torch_language import Dtype

__all__ = ["BLOCKED", "main", "open_gate"]

BLOCKED = 10


def open_gate(
    bundle: Path | str,
    model: str | None = None,
    *,
    policy: Policy | None = None,
    runtime: str = "auto",
    precision: str | None = None,
    device: str = "cpu",
    dtype: Dtype = "float32",
    revision: str | None = None,
    tap: TapSource | None = None,
    threads: int | None = None,
    timeout: float = 30.0,
) -> Gate:
    """Open a bundle and the checkpoint that answers, by default the one that the bundle was made from.

    Pictures are brought to the bundle's size for both. Image embeddings are shared when the bundle gives them and
    was made from the very vision tower of the checkpoint, by hash. A bundle that is not standalone gates by the
    exact verdict alone. Errors: those of opening either.
    """
    from models.checkpoint import open_checkpoint
    from runtimes.bundle import open_bundle
    from runtimes.gate import Gate
    from runtimes.judge import Guard
    from runtimes.torch_language import TorchLanguageRunner

    opened = open_bundle(bundle)
    manifest = opened.manifest
    source, size = manifest.source, manifest.preprocessing
    if model is None:
        model, revision, tap = source.checkpoint, revision or source.revision, tap or manifest.tap.source
    checkpoint = open_checkpoint(model, tap=tap, revision=revision)
    grid = (size.height, size.width) if checkpoint.family.key == "qwen2_5_vl" else None
    language = TorchLanguageRunner(checkpoint, device=device, dtype=dtype, grid=grid, threads=threads)
    guard, shared = None, False
    if source.standalone:
        guard = Guard.open(bundle, runtime, precision=precision, threads=threads, verify=False)
        if any(output.name == "embeddings" for file in manifest.files for output in file.outputs):
            used = [*checkpoint.vision_names(), *checkpoint.head_names()]
            shared = checkpoint.tensors.sha256(used) == source.sha256
    return Gate(guard, language, policy, timeout, digest=opened.digest, share_embeddings=shared)


@click.command(name="gate")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--bundle", required=True, type=click.Path(path_type=Path), help="Folder of the guard bundle.")
@click.option("--question", required=True, help="What is asked about IMAGE.")
@click.option("--model", help="Checkpoint that answers.  [default: the one that the bundle was made from]")
@click.option("--revision", help="Hub revision of --model: a branch, tag or commit.")
@click.option("--tap", type=click.Choice(["projector", "language_model"]), help="Where the guard of --model taps.")
@click.option("--policy", type=click.Path(path_type=Path), help="TOML or JSON: per class block, allow or review.")
@click.option("--runtime", type=click.Choice(["auto", "onnxruntime", "tensorrt"]), default="auto", show_default=True)
@click.option("--precision", help="Judge with this precision of the bundle.  [default: the bundle's own]")
@click.option("--device", default="cpu", show_default=True, help="Of the language model: cpu, cuda or cuda:N.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Bound the threads of ONNX Runtime and torch.")
@click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds for each verdict.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the decision, question and answer as one JSON line.")
@click.option("--log", type=click.Path(path_type=Path), help="Append the decision to this file, as one JSON line.")
@click.option("--log-text", is_flag=True, help="Let --log hold question and answer, too.")
def main(
    image: Path,
    bundle: Path,
    question: str,
    model: str | None,
    revision: str | None,
    tap: TapSource | None,
    policy: Path | None,
    runtime: str,
    precision: str | None,
    device: str,
    dtype: Dtype,
    threads: int | None,
    timeout: float,
    max_new_tokens: int,
    as_json: bool,
    log: Path | None,
    log_text: bool,
) -> int:
    """Answer a question about IMAGE if the guard lets it pass.

    Exits with 0 when it was answered and 10 when it was blocked, by a verdict or by an error on the way, such as an
    image that cannot be read; 2 when bundle, checkpoint or policy cannot be used.
    """
    if log is not None:
        _append(log, "")  # a log that cannot be written is told before anything is judged
    gate = open_gate(
        bundle,
        model,
        policy=None if policy is None else read_policy(policy),
        runtime=runtime,
        precision=precision,
        device=device,
        dtype=dtype,
        revision=revision,
        tap=tap,
        threads=threads,
        timeout=timeout,
    )
    with gate:
        result = gate.ask(image, question, max_new_tokens=max_new_tokens)
    if log is not None:  # before the answer: what cannot be logged is not answered
        _append(log, result.to_json_line(text=log_text) + "\n")
    click.echo(result.to_json_line(text=True) if as_json else "\n".join(_lines(result)))
    code = 0 if result.verdict == "allow" else BLOCKED
    if gate.stuck:
        # Threads inside a library abort the interpreter's orderly end: leave without one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise InputError(f"--log {path} cannot be written: {error.strerror or error}.") from error


def _lines(result: GateResult) -> list[str]:
    """Return the lines for a terminal: the decision, then the answer."""
    finding = result.finding
    about = "" if finding is None else f"  {finding.label}  p(unsafe) {finding.p_unsafe:.4f}"
    review = "  (for review)" if result.review else ""
    times = ", ".join(f"{name} {value:.0f} ms" for name, value in result.ms.items())
    lines = [printable(f"{result.verdict}{about}{review}  {result.reason}"), times]
    if result.error is not None:
        lines.append(printable(f"error: {result.error}"))
    return lines if result.answer is None else [*lines, "", printable(result.answer)]
