"""Write a checkpoint in 16 bit as transformers has its own: ``python -m export.hf --model SafeLLaVA-7B --out DIR``.

From every layout that is read here (original LLaVA, older Qwen and transformers names, wrapped and merged models) comes
one that transformers, vLLM and what stands on them open without the original's code. The guard travels beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from quantize.streamed.artifact import SHARD_BYTES, kept_dtype, write_light_files, write_tensors
from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.checkpoint.family import TapSource
from safevlm.checkpoint.weights.shards import GUARD_FILE
from safevlm.errors import InputError
from safevlm.files.draft import draft_of, publish
from safevlm.files.storage import check_room, check_writable, shown_bytes, storing
from safevlm.machine import return_freed_memory
from safevlm.terminal.commandline import as_started, printable, run
from safevlm.terminal.options import json_option, model_option, revision_option, tap_option

__all__ = ["Written", "export_hf"]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What came out: ``bytes`` of tensors, in the folder ``out``."""

    out: Path
    checkpoint: str
    bytes: int
    random_weights: bool


def export_hf(
    checkpoint: Checkpoint, out: Path, *, shard_bytes: int = SHARD_BYTES, report: Callable[[str], None] = lambda _: None
) -> Written:
    """Write a checkpoint to the folder ``out``, tensor by tensor; all of it or nothing.

    Raises InputError for a checkpoint that is quantized, and a folder that exists; StorageError; CheckpointError for a
    config or a tokenizer that transformers does not take, and for values that are not finite; PrecisionError for
    values that 16 bits do not hold.
    """
    if checkpoint.quantization is not None:
        raise InputError(
            f"{checkpoint.name} is quantized ({checkpoint.quantization.method}) and in transformers' layout already. "
            "Give the 16-bit checkpoint."
        )
    if out.exists():
        raise InputError(f"{out} already exists. Give --out a new folder, or remove this one.")
    check_writable(out)
    check_room(out, _bytes_of(checkpoint))
    with draft_of(out) as draft, storing(out, advice="give --out another place"):
        token = write_light_files(checkpoint, draft)
        written = write_tensors(checkpoint, None, draft, token=token, shard_bytes=shard_bytes, report=report)
        open_checkpoint(draft)
        publish(draft, out)
    return Written(out=out, checkpoint=checkpoint.name, bytes=written, random_weights=checkpoint.random_weights)


def _bytes_of(checkpoint: Checkpoint) -> int:
    tensors = checkpoint.tensors
    names = [name for name in tensors.names() if name.startswith(checkpoint.family.prefixes)]
    return sum(math.prod(tensors.shape(name)) * kept_dtype(checkpoint, name).itemsize for name in names)


@click.command(name="hf")
@model_option()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder to write; must not exist.",
)
@revision_option
@tap_option
@json_option("what was written")
def main(model: str, out: Path, revision: str | None, tap: TapSource | None, as_json: bool) -> None:
    """Write MODEL in 16 bit in the layout of transformers, for transformers, vLLM and others."""
    return_freed_memory()
    checkpoint = open_checkpoint(model, tap=tap, revision=revision)
    with Console(stderr=True).status("opening") as status:
        written = export_hf(checkpoint, out, report=lambda stage: status.update(escape(stage)))
    if as_json:
        found = {"out": str(out), "checkpoint": written.checkpoint, "bytes": written.bytes, "guard": GUARD_FILE}
        click.echo(json.dumps({**found, "random_weights": written.random_weights}, indent=1))
        return
    random = " (random weights)" if written.random_weights else ""
    lines = [
        f"{out}: {written.checkpoint}{random} in 16 bit, {shown_bytes(written.bytes)}, the guard head in {GUARD_FILE}",
        f"next: vllm serve {out}",
    ]
    click.echo("\n".join(printable(as_started(line)) for line in lines))


if __name__ == "__main__":
    run(main)
