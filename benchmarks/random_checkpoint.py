"""Write a checkpoint of a real model's shape with random weights: ``python -m benchmarks.random_checkpoint``.

For tests of size, speed and memory: SafeLLaVA-7B's takes 14 GB of disk, with ``--sparse`` 1.2 GB, and a few hundred
megabytes of memory. Its tokenizer is the family's tiny checkpoint's; what the model says is noise.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import click
import torch
from rich.console import Console
from torch import nn

from benchmarks.shapes.random_vlm import config_and_class
from benchmarks.shapes.shapes import VisionShape, find_shape, shape_names
from benchmarks.tiny.blueprints import BLUEPRINTS
from quantize.streamed.artifact import Piece, stored_name, write_bytes, write_shards
from quantize.streamed.companions import copy_light_files
from safevlm.checkpoint.checkpoint import RANDOM_KEY, open_checkpoint
from safevlm.checkpoint.families import FAMILIES
from safevlm.checkpoint.family import HEAD_PREFIX
from safevlm.checkpoint.guard_head import standard_classes
from safevlm.errors import InputError
from safevlm.files.draft import draft_of, publish
from safevlm.files.storage import check_room, shown_bytes, storing
from safevlm.network.filling import on_meta
from safevlm.network.head import GuardHead
from safevlm.terminal.commandline import printable, run

__all__ = ["Layout", "write_random_checkpoint"]

Layout = Literal["published", "transformers"]
SHARD_BYTES = 5 * 10**9
"""As Hugging Face writes them."""
MARGIN = 2**26
DRAWN = 2**24
"""Values at once."""
CLIP_LAYERS = 24
"""Of the tower that original LLaVA configs only name."""
TOWER_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "image_size",
)


def write_random_checkpoint(
    shape: VisionShape,
    folder: Path,
    *,
    layers: int | None = None,
    seed: int = 0,
    layout: Layout = "published",
    sparse: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write ``folder``, which must not exist; return the bytes of its tensors, all float16.

    ``layers`` cuts the language model. Matrices have variance 1 / inputs, norms are 1, biases 0. ``layout`` has the
    tensor names and config that the six were published in, or transformers' own. With ``sparse`` the matrices of
    decoder layers are holes in the file: they read as zeros, take memory and time as numbers do, and no disk.
    ``config.json`` says that the weights are random.

    Raises InputError when ``folder`` exists or the disk cannot hold it.
    """
    if folder.exists():
        raise InputError(f"{folder} already exists. Give --out a new folder, or remove this one.")
    config, model_class = config_and_class(shape, layers or int(shape.language["num_hidden_layers"]))
    model: Any = on_meta(lambda: model_class(config))
    head = on_meta(lambda: GuardHead(shape.head_widths))
    tokenizer = FAMILIES[shape.family].tiny
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    name = stored_name if layout == "transformers" else BLUEPRINTS[tokenizer].stored_name
    pieces = [
        *_pieces(model, "", seed, tied, name, sparse=sparse),
        *_pieces(head, HEAD_PREFIX, seed, set(), name, sparse=False),
    ]
    _check_disk(pieces, folder, sparse)
    with draft_of(folder) as draft, storing(folder, advice="give --out another place"):
        copy_light_files(open_checkpoint(tokenizer).folder, draft)
        (draft / "preprocessor_config.json").unlink(missing_ok=True)  # the real size is the family's default
        stated = _config(config, model_class.__name__, tokenizer, layout)
        (draft / "config.json").write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")
        written = write_shards(pieces, draft, shard_bytes=shard_bytes)
        publish(draft, folder)
    return written


def _config(config: Any, architecture: str, tokenizer: str, layout: Layout) -> dict[str, Any]:
    """Return config.json: what the published checkpoints state, at this shape, and that the weights are random."""
    guard = {"safety_categories": list(standard_classes()), RANDOM_KEY: True}
    if layout == "transformers":
        return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [architecture], **guard}
    published = json.loads(json.dumps(BLUEPRINTS[tokenizer].config))
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    keep = ("bos_token_id", "eos_token_id", "pad_token_id")  # the tokenizer's, which is a tiny checkpoint's

    def at_shape(stated: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        return {key: own[key] if key in own and key not in keep else value for key, value in stated.items()}

    if "text_config" in published:
        published["text_config"] = at_shape(published["text_config"], text)
        published["mm_tokens_per_image"] = config.mm_tokens_per_image
    else:
        published = at_shape(published, {key: value for key, value in text.items() if key != "architectures"})
    if "vision_config" in published:
        published["vision_config"] = at_shape(published["vision_config"], vision)
    else:
        published["mm_hidden_size"] = vision["hidden_size"]
        if vision["num_hidden_layers"] == CLIP_LAYERS:
            published["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
        else:  # no name stands for it, and no tensor shows its heads
            published["vision_config"] = {key: vision[key] for key in TOWER_KEYS}
    if "rope_scaling" in published:
        published["rope_scaling"] = {
            "type": "mrope",
            "mrope_section": config.text_config.rope_parameters["mrope_section"],
        }
    return {**published, **_class_keys(tokenizer), **guard}


def _class_keys(tokenizer: str) -> dict[str, Any]:
    """Return what the published checkpoints call their class."""
    config = BLUEPRINTS[tokenizer].config
    return {key: config[key] for key in ("architectures", "model_type")}


def _check_disk(pieces: Sequence[Piece], folder: Path, sparse: bool) -> None:
    needed = sum(piece.nbytes for piece in pieces if not (sparse and _is_hole(piece.name)))
    hint = "" if sparse else "give --sparse, which leaves holes for the decoder layers, or "
    check_room(folder, needed + MARGIN, f"{hint}give fewer --layers, or give --out another disk")


def _is_hole(name: str) -> bool:
    """Say whether a tensor is a matrix of a decoder layer, by its name in any layout."""
    tower = "vision" in name or "visual" in name
    return not tower and ".layers." in name and name.endswith("proj.weight")


def _pieces(
    module: nn.Module, prefix: str, seed: int, left_out: set[str], stored: Callable[[str], str], *, sparse: bool
) -> Iterator[Piece]:
    for name, slot in module.named_parameters():
        if name in left_out:
            continue
        nbytes, under = slot.numel() * 2, stored(prefix + name)

        def write(file: BinaryIO, name: str = name, slot: nn.Parameter = slot) -> None:
            for rows in _random(name, tuple(slot.shape), seed):
                write_bytes(file, rows)

        def skip(file: BinaryIO, nbytes: int = nbytes) -> None:
            file.seek(nbytes - 1, os.SEEK_CUR)
            file.write(b"\0")

        yield Piece(under, "F16", tuple(slot.shape), nbytes, skip if sparse and _is_hole(under) else write)


def _random(name: str, shape: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """Yield the tensor of a name, a few million values at a time: the same in every process."""
    if len(shape) < 2:
        yield torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.float16)
        return
    own = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "little")
    generator = torch.Generator().manual_seed(own)
    spread = torch.Size(shape[1:]).numel() ** -0.5
    values = torch.Size(shape).numel()
    for start in range(0, values, DRAWN):
        yield torch.empty(min(DRAWN, values - start)).normal_(0, spread, generator=generator).to(torch.float16)


@click.command()
@click.option("--shape", required=True, help=f"Shape to write: {', '.join(shape_names())}.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--layers", type=click.IntRange(min=1), help="Number of decoder layers.  [default: all]")
@click.option(
    "--layout",
    type=click.Choice(["published", "transformers"]),
    default="published",
    show_default=True,
    help="Names and files as published, or as transformers saves them.",
)
@click.option("--sparse", is_flag=True, help="Write holes for the decoder layers' matrices, to save disk space.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed.")
def main(shape: str, out: Path, layers: int | None, layout: Layout, sparse: bool, seed: int) -> None:
    """Write a checkpoint with random weights at a real model's shape, marked as such."""
    with Console(stderr=True).status("writing"):
        written = write_random_checkpoint(
            find_shape(shape), out, layers=layers, seed=seed, layout=layout, sparse=sparse
        )
    disk = sum(path.stat().st_blocks * 512 for path in out.iterdir())
    holes = f", {shown_bytes(disk)} on the disk" if sparse else ""
    click.echo(printable(f"{out}: {shown_bytes(written)} of random weights at {shape}'s shape{holes}"))


if __name__ == "__main__":
    run(main)
