"""Ask about an image, gated: ``python -m runtimes.chat --bundle DIR --model M IMAGE "question"``.

The answer is written as it comes; an image that is blocked gets a refusal that names its class. The same in Python::

    from runtimes.chat import open_chat

    with open_chat(bundle="build/guard", model="build/gguf") as chat:
        result = chat.ask("holiday.jpg", "What is this?", on_text=print)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runtimes.gate.open import ended, open_gate, open_told
from runtimes.images.view_option import view_option
from safevlm.terminal.commandline import printable, run
from safevlm.terminal.options import answering_model_option, json_option, threads_option

if TYPE_CHECKING:
    from runtimes.images.tiling import ViewMode

__all__ = ["open_chat"]

open_chat = open_gate
"""A gate around a guard and what answers; see :func:`runtimes.gate.open.open_gate`."""


@click.command(name="chat")
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("question")
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Folder of the guard bundle; GGUF files have their own."
)
@answering_model_option
@click.option(
    "--policy",
    type=click.Path(path_type=Path),
    help="TOML or JSON file with an action per class: block, allow or review.",
)
@threads_option
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Context length in tokens, prompt and answer together.  [default: 4096]",
)
@click.option(
    "--gpu-layers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of llama.cpp layers on the GPU.",
)
@view_option
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds for each verdict.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Maximum length of the answer in tokens.  [default: 256, or what the context leaves]",
)
@json_option("the decision, question and answer")
def main(
    image: Path,
    question: str,
    bundle: Path | None,
    model: str | None,
    policy: Path | None,
    threads: int | None,
    context: int | None,
    gpu_layers: int,
    view: ViewMode,
    timeout: float,
    max_new_tokens: int | None,
    as_json: bool,
) -> int:
    """Answer QUESTION about IMAGE, if the guard lets it pass.

    Exits with 0 when it was answered and 10 when it was refused; 2 when bundle, model or policy cannot be used.
    """
    gate = open_told(
        bundle,
        model,
        policy,
        threads=threads,
        view=view,
        timeout=timeout,
        context=context,
        gpu_layers=gpu_layers,
    )
    with gate:
        result = gate.ask(image, question, max_new_tokens=max_new_tokens, on_text=None if as_json else _show)
    if as_json:
        click.echo(result.to_json_line(text=True))
    elif result.answer is not None:
        click.echo("")
    else:
        click.echo(printable(result.refusal()))
    return ended(gate, result)


def _show(piece: str) -> None:
    click.echo(printable(piece), nl=False)
    sys.stdout.flush()


if __name__ == "__main__":
    run(main)
