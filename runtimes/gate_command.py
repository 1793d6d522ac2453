"""The command line of the gate: see ``python -m runtimes.gate --help``."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from models.commandline import leave, printable
from models.errors import InputError
from models.family import TapSource
from models.regular_file import open_to_append
from runtimes.check import BLOCKED
from runtimes.gate_result import GateResult
from runtimes.policy import Policy, read_policy
from runtimes.random_weights import warn_of_random_weights
from runtimes.view_option import view_option

if TYPE_CHECKING:
    from runtimes.bundle import Bundle
    from runtimes.gate import Gate
    from runtimes.language import LanguageRunner
    from runtimes.tiling import ViewMode
    from runtimes.torch_language import Dtype

__all__ = ["ended", "main", "open_gate", "open_told"]


def open_gate(
    bundle: Path | str | None,
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
    context: int | None = None,
    gpu_layers: int = 0,
    view: ViewMode = "tiles",
) -> Gate:
    """Open a bundle and what answers: a checkpoint, by default the one that the bundle was made from, or GGUF files.

    On torch pictures are brought to the bundle's size for both. Image embeddings are shared when the bundle gives
    them and was made from the very vision tower that the answers are, by hash. A bundle that is not standalone gates
    by the exact verdict alone. Without a bundle, GGUF files (see ``export.gguf``) judge by themselves. ``context`` is
    in tokens; ``gpu_layers`` is llama.cpp's; ``view`` is the standalone guard's, see ``runtimes.tiling``. Errors:
    InputError for neither; those of opening either.
    """
    from runtimes.bundle import open_bundle
    from runtimes.gate import Gate
    from runtimes.gguf_artifact import is_gguf
    from runtimes.judge import Guard

    if bundle is None:
        if model is None or not is_gguf(model):
            raise InputError(
                "--bundle is missing: the guard that judges before the language model. Without one, --model takes a "
                "folder that python -m export.gguf wrote, whose guard is in it."
            )
        return _gguf_alone(model, policy, timeout, threads=threads, context=context, gpu_layers=gpu_layers, view=view)
    opened = open_bundle(bundle)
    manifest = opened.manifest
    if model is not None and is_gguf(model):
        language, tower = _gguf_language(model, threads=threads, context=context, gpu_layers=gpu_layers)
    else:
        language, tower = _torch_language(
            opened, model, device=device, dtype=dtype, revision=revision, tap=tap, threads=threads, context=context
        )
    guard, shared = None, False
    if manifest.source.standalone:
        guard = Guard.open(bundle, runtime, precision=precision, threads=threads, verify=False, view=view)
        if any(output.name == "embeddings" for file in manifest.files for output in file.outputs):
            shared = tower() == manifest.source.sha256
    return Gate(guard, language, policy, timeout, digest=opened.digest, share_embeddings=shared)


def _torch_language(
    bundle: Bundle,
    model: str | None,
    *,
    device: str,
    dtype: Dtype,
    revision: str | None,
    tap: TapSource | None,
    threads: int | None,
    context: int | None,
) -> tuple[LanguageRunner, Callable[[], str]]:
    """Return a checkpoint's runner and what hashes its vision tower and guard head."""
    from models.checkpoint import open_checkpoint
    from runtimes.torch_language import TorchLanguageRunner

    source, size = bundle.manifest.source, bundle.manifest.preprocessing
    if model is None:
        model, revision, tap = source.checkpoint, revision or source.revision, tap or bundle.manifest.tap.source
    checkpoint = open_checkpoint(model, tap=tap, revision=revision)
    grid = (size.height, size.width) if checkpoint.family.key == "qwen2_5_vl" else None
    language = TorchLanguageRunner(checkpoint, device=device, dtype=dtype, grid=grid, threads=threads, context=context)
    return language, lambda: checkpoint.tensors.sha256([*checkpoint.vision_names(), *checkpoint.head_names()])


def _gguf_language(
    model: str, *, threads: int | None, context: int | None, gpu_layers: int
) -> tuple[LanguageRunner, Callable[[], str]]:
    from runtimes.llamacpp_language import LlamaCppLanguageRunner

    language = LlamaCppLanguageRunner(model, threads=threads, context=context, gpu_layers=gpu_layers)
    return language, lambda: language.artifact.manifest.source.sha256


def _gguf_alone(
    model: str,
    policy: Policy | None,
    timeout: float,
    *,
    threads: int | None,
    context: int | None,
    gpu_layers: int,
    view: ViewMode,
) -> Gate:
    """Return a gate whose guard and language model share one llama.cpp."""
    from runtimes.gate import Gate
    from runtimes.gguf_artifact import open_gguf
    from runtimes.judge import Guard
    from runtimes.llamacpp_guard import LlamaCppGuardRunner, has_standalone_guard
    from runtimes.llamacpp_language import LlamaCppLanguageRunner, open_session

    artifact = open_gguf(model)
    session = open_session(artifact, threads=threads, context=context, gpu_layers=gpu_layers)
    language = LlamaCppLanguageRunner(artifact, session=session)
    guard = None
    if has_standalone_guard(artifact):
        guard = Guard(LlamaCppGuardRunner(artifact, session), artifact.manifest.classes, view=view)
    return Gate(guard, language, policy, timeout, digest=artifact.digest)


def open_told(bundle: Path | None, model: str | None, policy: Path | None, **options: Any) -> Gate:
    """Open a gate as a command does, the policy from its file, with a line on standard error for random weights.

    ``options`` and errors are those of :func:`open_gate`, and of :func:`runtimes.policy.read_policy`.
    """
    gate = open_gate(bundle, model, policy=None if policy is None else read_policy(policy), **options)
    warn_of_random_weights(bundle, gate.language)
    return gate


def ended(gate: Gate, result: GateResult) -> int:
    """Return a command's exit code; where a call of guard or language model still runs, leave the process with it."""
    code = 0 if result.verdict == "allow" else BLOCKED
    if gate.stuck:
        leave(code)
    return code


@click.command(name="gate")
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Folder of the guard bundle; GGUF files have their own."
)
@click.option("--question", required=True, help="What is asked about IMAGE.")
@click.option("--model", help="Checkpoint or GGUF folder that answers.  [default: what the bundle was made from]")
@click.option("--revision", help="Hub revision of --model: a branch, tag or commit.")
@click.option("--tap", type=click.Choice(["projector", "language_model"]), help="Where the guard of --model taps.")
@click.option("--policy", type=click.Path(path_type=Path), help="TOML or JSON: per class block, allow or review.")
@click.option(
    "--runtime", type=click.Choice(["auto", "onnxruntime", "openvino", "tensorrt"]), default="auto", show_default=True
)
@click.option("--precision", help="Judge with this precision of the bundle.  [default: the bundle's own]")
@click.option("--device", default="cpu", show_default=True, help="Of the language model: cpu, cuda or cuda:N.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="Bound the threads of ONNX Runtime and torch.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens of a prompt with its answer.  [default: 4096]")
@view_option
@click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds for each verdict.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="[default: 256, or what the context leaves]")
@click.option("--json", "as_json", is_flag=True, help="Print the decision, question and answer as one JSON line.")
@click.option("--log", type=click.Path(path_type=Path), help="Append the decision to this file, as one JSON line.")
@click.option("--log-text", is_flag=True, help="Let --log hold question and answer, too.")
def main(
    image: Path,
    bundle: Path | None,
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
    context: int | None,
    view: ViewMode,
    timeout: float,
    max_new_tokens: int | None,
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
    gate = open_told(
        bundle,
        model,
        policy,
        runtime=runtime,
        precision=precision,
        device=device,
        dtype=dtype,
        revision=revision,
        tap=tap,
        threads=threads,
        context=context,
        view=view,
        timeout=timeout,
    )
    with gate:
        result = gate.ask(image, question, max_new_tokens=max_new_tokens)
    if log is not None:  # before the answer: what cannot be logged is not answered
        _append(log, result.to_json_line(text=log_text) + "\n")
    click.echo(result.to_json_line(text=True) if as_json else "\n".join(_lines(result)))
    return ended(gate, result)


def _append(path: Path, text: str) -> None:
    try:
        with open_to_append(path) as stream:
            line = text.encode()
            if stream.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
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
