"""The command line of the gate: see ``python -m runtimes.gate --help``."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runtimes.gate.open import ended, open_told
from runtimes.gate.result import GateResult
from runtimes.guard.options import precision_option, runtime_option
from runtimes.images.view_option import view_option
from safevlm.checkpoint.family import TapSource
from safevlm.errors import InputError
from safevlm.files.regular_file import open_to_append
from safevlm.terminal.commandline import printable, run
from safevlm.terminal.options import (
    answering_model_option,
    device_option,
    json_option,
    revision_option,
    tap_option,
    threads_option,
)

if TYPE_CHECKING:
    from runtimes.images.tiling import ViewMode
    from runtimes.language.torch_language import Dtype

__all__ = ["main"]


@click.command(name="gate")
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Folder of the guard bundle; GGUF files have their own."
)
@click.option("--question", required=True, help="Question about IMAGE.")
@answering_model_option
@revision_option
@tap_option
@click.option(
    "--policy",
    type=click.Path(path_type=Path),
    help="TOML or JSON file with an action per class: block, allow or review.",
)
@runtime_option
@precision_option
@device_option
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Data type of the model's weights on torch.",
)
@threads_option
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Context length in tokens, prompt and answer together.  [default: 4096]",
)
@view_option
@click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds for each verdict.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Maximum length of the answer in tokens.  [default: 256, or what the context leaves]",
)
@json_option("the decision, question and answer")
@click.option("--log", type=click.Path(path_type=Path), help="Append the decision to this file, as one JSON line.")
@click.option("--log-text", is_flag=True, help="Include question and answer in --log.")
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


if __name__ == "__main__":
    run(main)
