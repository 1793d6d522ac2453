"""Say where a command opens a stand-in: weights that are random (benchmarks.random_checkpoint)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from safevlm.terminal.commandline import printable

if TYPE_CHECKING:
    from runtimes.guard.bundle import Bundle
    from runtimes.language.language import LanguageRunner

MEANS_NOTHING = "has random weights: its verdicts mean nothing"

__all__ = ["warn_of_random_weights"]


def warn_of_random_weights(bundle: Bundle | None, language: LanguageRunner | None = None) -> None:
    """Write a line to standard error for the guard in ``bundle``, and one for what answers, if weights are random."""
    if bundle is not None and bundle.manifest.source.random_weights:
        click.echo(printable(f"warning: the guard in {bundle.folder} {MEANS_NOTHING}"), err=True)
    if language is not None and language.random_weights:
        click.echo("warning: the model that answers has random weights: answers and verdicts mean nothing", err=True)
