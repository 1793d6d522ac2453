"""Write a compressed checkpoint as transformers has its checkpoints: config, safetensors, tokenizer, processor.

Whatever layout the source had, tensors get the names that transformers >= 4.52 writes, so that a checkpoint whose own
code is no longer loadable becomes one that is. The guard head and its config keys are in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from quantize.streamed.layers import stored_dtype
from quantize.streamed.rotated import RotatedTensors
from safevlm.checkpoint.architectures import architecture_of
from safevlm.checkpoint.checkpoint import RANDOM_KEY, Checkpoint
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.checkpoint.hub import LIGHT_PATTERNS
from safevlm.checkpoint.tap import CONFIG_KEY
from safevlm.checkpoint.weights.shard_header import read_header
from safevlm.files.regular_file import open_regular

__all__ = [
    "SHARD_BYTES",
    "Piece",
    "artifact_config",
    "copy_light_files",
    "kept_dtype",
    "stored_name",
    "write_bytes",
    "write_shards",
    "write_tensors",
]

SHARD_BYTES = 4 * 2**30
CHUNK_BYTES = 8 << 20
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
NOT_COPIED = ("config.json", "*.index.json", "quantize_config.json", "compression.json")
NOT_SAID = (
    "_name_or_path", "chunk_size_feed_forward", "id2label", "label2id", "output_attentions", "output_hidden_states",
    "problem_type", "return_dict",
)  # fmt: skip
"""Settings of a session, not of a model, which transformers writes into every config."""
SAFETY_KEYS = ("safety_", "num_safety_", "img_safety_")


def stored_name(name: str) -> str:
    """Return the name that transformers >= 4.52 stores a canonical tensor under."""
    tower = "model.vision_tower."
    return f"{tower}vision_model.{name.removeprefix(tower)}" if name.startswith(tower) else name


def artifact_config(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json: transformers' own config of the model, the guard's keys, the tap, ``quantization_config``."""
    config = build_config(checkpoint)
    stated = {key: value for key, value in checkpoint.config.items() if key.startswith(SAFETY_KEYS)}
    tap = {"source": checkpoint.tap.source, "pooling": checkpoint.tap.pooling, "tokens": checkpoint.tap.tokens}
    model_class: Any = architecture_of(config).whole_class
    stored = json.loads(config.to_json_string(use_diff=False))
    for part in (stored, stored["text_config"], stored["vision_config"]):
        for key in NOT_SAID:
            part.pop(key, None)
        part.pop("architectures", None)
    return {
        **stored,
        "text_config": {**_older_rope(stored["text_config"]), **stored["text_config"]},
        "architectures": [model_class.__name__],
        "dtype": str(stored_dtype(checkpoint)).removeprefix("torch."),
        **stated,
        "safety_categories": list(checkpoint.classes),
        "num_safety_categories": len(checkpoint.classes),
        CONFIG_KEY: tap,
        **({RANDOM_KEY: True} if checkpoint.random_weights else {}),
        "quantization_config": dict(quantization),
    }


def _older_rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary keys that transformers 4 and vLLM ask for, from ``rope_parameters`` of transformers 5."""
    rope = text.get("rope_parameters") or {}
    if "full_attention" in rope:  # Gemma-3: one for each kind of layer
        local = rope.get("sliding_attention", {})
        return {**_rope_keys(rope["full_attention"]), "rope_local_base_freq": local.get("rope_theta", 10000.0)}
    return _rope_keys(rope)


def _rope_keys(rope: Mapping[str, Any]) -> dict[str, Any]:
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default" and "mrope_section" not in scaling
    if "mrope_section" in scaling:
        scaling["type"] = "mrope"
    return {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": None if plain else scaling}


def copy_light_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, processor, chat template and generation settings."""
    for path in sorted(source.iterdir()):
        light = any(fnmatch(path.name, pattern) for pattern in LIGHT_PATTERNS)
        if path.is_file() and light and not any(fnmatch(path.name, pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, folder / path.name)


@dataclass(frozen=True)
class Piece:
    """One tensor to write: what the header says of it (dtype as ``F16``), and its bytes when their turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    write: Callable[[BinaryIO], None]


def write_tensors(
    checkpoint: Checkpoint,
    layers: Sequence[Path],
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[str], None] = lambda _: None,
) -> int:
    """Write all tensors into ``folder``, one at a time; return their bytes.

    ``layers`` are the files of the decoder layers, by names within the layer. What is not in a decoder layer (vision,
    projector, embedding, norm, output, guard head) comes from the checkpoint in 16 bit. One file, or several of
    ``shard_bytes`` at most with an index.

    Raises OSError; CheckpointError.
    """
    pieces = [*_rest(checkpoint)]
    for index, path in enumerate(layers):
        pieces += _of_layer(path, f"{checkpoint.family.language_prefix}layers.{index}.")
    return write_shards(pieces, folder, shard_bytes=shard_bytes, report=report)


def write_shards(
    pieces: Sequence[Piece],
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[str], None] = lambda _: None,
) -> int:
    """Write tensors one at a time into one safetensors file, or several with an index; return their bytes."""
    shards: list[list[Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(each.nbytes for each in shards[-1]) + piece.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(piece)
    total = sum(piece.nbytes for piece in pieces)
    if len(shards) == 1:
        report("writing model.safetensors")
        _write_file(folder / "model.safetensors", shards[0])
        return total
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        report(f"writing {name}")
        _write_file(folder / name, shard)
        places |= {piece.name: name for piece in shard}
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=1)
    (folder / "model.safetensors.index.json").write_text(index_text + "\n", encoding="utf-8")
    return total


def kept_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """Return the dtype that a tensor which is not rounded is written in: its own 16-bit one, or the checkpoint's.

    What a rotation turned in the guard stays in float32: the exact guard is not to change.
    """
    if isinstance(checkpoint.tensors, RotatedTensors) and checkpoint.tensors.is_guard(name):
        return torch.float32
    own = {"F16": torch.float16, "BF16": torch.bfloat16}.get(checkpoint.tensors.dtype(name))
    return stored_dtype(checkpoint) if own is None else own


def _rest(checkpoint: Checkpoint) -> Iterator[Piece]:
    family = checkpoint.family
    for name in checkpoint.tensors.names():
        if not name.startswith(family.prefixes) or name.startswith(f"{family.language_prefix}layers."):
            continue
        if name.endswith("rotary_emb.inv_freq"):  # computed, not learned; old checkpoints store it
            continue
        shape = checkpoint.tensors.shape(name)
        kept = kept_dtype(checkpoint, name)
        nbytes = torch.Size(shape).numel() * kept.itemsize

        def write(file: BinaryIO, name: str = name, kept: torch.dtype = kept) -> None:
            for part in checkpoint.tensors.pieces(name):
                write_bytes(file, part.to(kept))

        yield Piece(stored_name(name), DTYPES[kept], shape, nbytes, write)


def _of_layer(path: Path, prefix: str) -> Iterator[Piece]:
    for name, entry in sorted(read_header(path).items()):

        def write(file: BinaryIO, start: int = entry.start, nbytes: int = entry.nbytes) -> None:
            with open_regular(path) as source:
                source.seek(start)
                left = nbytes
                while left:
                    chunk = source.read(min(left, CHUNK_BYTES))
                    if not chunk:
                        raise OSError(f"{path} was cut short")
                    file.write(chunk)
                    left -= len(chunk)

        yield Piece(prefix + name, entry.dtype, entry.shape, entry.nbytes, write)


def write_bytes(file: BinaryIO, tensor: Tensor) -> None:
    """Write a tensor's elements."""
    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _write_file(path: Path, pieces: Sequence[Piece]) -> None:
    """Write a safetensors file: 8 bytes of header length, a JSON header padded to 8 bytes, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in pieces:
        header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [at, at + piece.nbytes]}
        at += piece.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for piece in pieces:
            piece.write(file)
