"""A command that replaces one guard bundle by another, to be killed: see ``test_kills.py``."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

import safevlm.files.draft
from export.guard.bundle import bundle_draft


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--exchange/--no-exchange", default=True, help="Whether the file system can exchange two names.")
def main(source: Path, out: Path, exchange: bool) -> None:
    if not exchange:
        safevlm.files.draft._exchange = lambda *_: False
    with bundle_draft(out) as draft:
        shutil.copytree(source, draft, dirs_exist_ok=True)
