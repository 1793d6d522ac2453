"""Make a client's key: ``python -m runtimes.gateway.keys NAME >> clients.toml``."""

from __future__ import annotations

import secrets

import click
from pydantic import ValidationError

from runtimes.gateway.serving.clients import MOST_A_MINUTE, ClientEntry, digest_of
from safevlm.errors import InputError
from safevlm.files.json_file import first_problem
from safevlm.terminal.commandline import run

__all__ = ["main"]

KEY_BYTES = 32


@click.command(name="keys")
@click.argument("name")
@click.option(
    "--requests-per-minute", type=click.IntRange(1, MOST_A_MINUTE), help="Limit of requests.  [default: none]"
)
@click.option("--images-per-minute", type=click.IntRange(1, MOST_A_MINUTE), help="Limit of images.  [default: none]")
def main(name: str, requests_per_minute: int | None, images_per_minute: int | None) -> None:
    """Make a key for the client NAME.

    The key is printed once, to standard error; its entry for --client-keys, which holds only its hash, to standard
    output.
    """
    key = f"sk-{secrets.token_urlsafe(KEY_BYTES)}"
    try:
        entry = ClientEntry(
            name=name,
            key_sha256=digest_of(key),
            requests_per_minute=requests_per_minute,
            images_per_minute=images_per_minute,
        )
    except ValidationError as error:
        raise InputError(f"{first_problem(error)}. Letters, digits, '.', '_' and '-' are allowed in a name.") from None
    lines = ["[[client]]", f'name = "{entry.name}"', f'key_sha256 = "{entry.key_sha256}"']
    for limit in ("requests_per_minute", "images_per_minute"):
        value = getattr(entry, limit)
        lines += [] if value is None else [f"{limit} = {value}"]
    click.echo("\n".join(lines) + "\n")
    click.echo(f"key of {entry.name}, shown this once: {key}", err=True)


if __name__ == "__main__":
    run(main)
