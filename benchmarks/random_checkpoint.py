"""Write a checkpoint of a real model's shape with random weights: ``python -m benchmarks.random_checkpoint``.

For tests of size, speed and memory: SafeLLaVA-7B's takes 14 GB of disk and a few hundred megabytes of memory. Its
tokenizer is the family's tiny checkpoint's; what the model says is noise.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click
import torch
from rich.console import Console
from torch import nn

from benchmarks.random_vlm import config_and_class
from benchmarks.shapes import VisionShape, find_shape, shape_names
from models.checkpoint import open_checkpoint
from models.commandline import run
from models.errors import InputError
from models.family import HEAD_PREFIX
from models.filling import on_meta
from models.guard_head import standard_classes
from models.reference import GuardHead
from quantize.artifact import Piece, copy_light_files, stored_name, write_bytes, write_shards

__all__ = ["write_random_checkpoint"]


def write_random_checkpoint(shape: VisionShape, folder: Path, *, layers: int | None = None, seed: int = 0) -> int:
    """Write ``folder``, which must not exist; return the bytes of its tensors, all float16.

    ``layers`` cuts the language model. Matrices have variance 1 / inputs, norms are 1, biases 0.

    Errors: InputError when ``folder`` exists.
    """
    if folder.exists():
        raise InputError(f"{folder} exists. Give --out a folder that does not, or remove this one.")
    config, model_class, tokenizer = config_and_class(shape, layers or int(shape.language["num_hidden_layers"]))
    model: Any = on_meta(lambda: model_class(config))
    head = on_meta(lambda: GuardHead(shape.head_widths))
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        copy_light_files(open_checkpoint(tokenizer).folder, unfinished)
        (unfinished / "preprocessor_config.json").unlink(missing_ok=True)  # the real size is the family's default
        stated = json.loads(config.to_json_string(use_diff=False))
        stated |= {"architectures": [model_class.__name__], "safety_categories": list(standard_classes())}
        (unfinished / "config.json").write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        pieces = [*_pieces(model, "", seed, tied), *_pieces(head, HEAD_PREFIX, seed, set())]
        written = write_shards(pieces, unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return written


def _pieces(module: nn.Module, prefix: str, seed: int, left_out: set[str]) -> Iterator[Piece]:
    for name, slot in module.named_parameters():
        if name in left_out:
            continue

        def write(file: BinaryIO, name: str = name, slot: nn.Parameter = slot) -> None:
            write_bytes(file, _random(name, tuple(slot.shape), seed))

        yield Piece(prefix + stored_name(name), "F16", tuple(slot.shape), slot.numel() * 2, write)


def _random(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return the tensor of a name: the same in every process."""
    if len(shape) < 2:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.float16)
    own = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "little")
    spread = torch.Size(shape[1:]).numel() ** -0.5
    return torch.empty(shape).normal_(0, spread, generator=torch.Generator().manual_seed(own)).to(torch.float16)


@click.command()
@click.option("--shape", required=True, help=f"One of {', '.join(shape_names())}.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--layers", type=click.IntRange(min=1), help="So many decoder layers.  [default: all]")
@click.option("--seed", type=int, default=0, show_default=True)
def main(shape: str, out: Path, layers: int | None, seed: int) -> None:
    """Write a checkpoint with random weights at a real model's shape."""
    with Console(stderr=True).status(f"writing {out}"):
        written = write_random_checkpoint(find_shape(shape), out, layers=layers, seed=seed)
    click.echo(f"{out}: {written / 2**30:.1f} GiB of random weights at {shape}'s shape")


if __name__ == "__main__":
    run(main)
