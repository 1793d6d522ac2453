"""Write a checkpoint as transformers has its checkpoints: config and safetensors, beside the companions.

Whatever layout the source had, tensors get the names that transformers >= 4.52 writes, so that a checkpoint whose own
code is no longer loadable becomes one that is. The guard's config keys are in it, its head in a file of its own
(:data:`safevlm.checkpoint.weights.shards.GUARD_FILE`), which readers of the model alone do not see.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from quantize.streamed.companions import ImageToken, image_token_of, write_companions
from quantize.streamed.layers import stored_dtype
from quantize.streamed.rotated import RotatedTensors
from safevlm.checkpoint.architectures import architecture_of
from safevlm.checkpoint.checkpoint import RANDOM_KEY, Checkpoint
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.checkpoint.family import HEAD_PREFIX, OUTPUT_PREFIX
from safevlm.checkpoint.tap import CONFIG_KEY
from safevlm.checkpoint.weights.finite import converted
from safevlm.checkpoint.weights.shard_header import read_header
from safevlm.checkpoint.weights.shards import GUARD_FILE
from safevlm.files.regular_file import open_regular
from safevlm.network.prompt_tokens import load_tokenizer

__all__ = [
    "SHARD_BYTES",
    "Piece",
    "artifact_config",
    "kept_dtype",
    "stored_name",
    "write_bytes",
    "write_light_files",
    "write_shards",
    "write_tensors",
]

SHARD_BYTES = 4 * 2**30
CHUNK_BYTES = 8 << 20
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
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


def write_light_files(
    checkpoint: Checkpoint, folder: Path, quantization: Mapping[str, Any] | None = None
) -> ImageToken:
    """Write all but the tensors into ``folder``: config.json and its companions; return the image token.

    Raises CheckpointError for a config or a tokenizer that transformers does not take; OSError.
    """
    tokenizer = load_tokenizer(checkpoint.folder)
    token = image_token_of(checkpoint, tokenizer)
    stated = json.dumps(artifact_config(checkpoint, token, quantization), indent=2)
    (folder / "config.json").write_text(stated + "\n", encoding="utf-8")
    write_companions(checkpoint, tokenizer, token, folder)
    return token


def artifact_config(
    checkpoint: Checkpoint, token: ImageToken, quantization: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return config.json: transformers' own config of the model, the guard's keys, the tap, ``quantization_config``.

    The vocabulary has a row for the image ``token``.
    """
    config = build_config(checkpoint)
    config.image_token_id = token.id
    config.text_config.vocab_size = token.rows(config.text_config.vocab_size)
    stated = {key: value for key, value in checkpoint.config.items() if key.startswith(SAFETY_KEYS)}
    tap = {"source": checkpoint.tap.source, "pooling": checkpoint.tap.pooling, "tokens": checkpoint.tap.tokens}
    model_class: Any = architecture_of(config).whole_class
    stored = json.loads(config.to_json_string(use_diff=False))
    dtype = torch.bfloat16 if checkpoint.family.half == "BF16" else stored_dtype(checkpoint)  # what it computes in
    for part in (stored, stored["text_config"], stored["vision_config"]):
        for key in NOT_SAID:
            part.pop(key, None)
        part.pop("architectures", None)
    return {
        **stored,
        "text_config": {**_older_rope(stored["text_config"]), **stored["text_config"]},
        "architectures": [model_class.__name__],
        "dtype": str(dtype).removeprefix("torch."),
        **stated,
        "safety_categories": list(checkpoint.classes),
        "num_safety_categories": len(checkpoint.classes),
        CONFIG_KEY: tap,
        **({RANDOM_KEY: True} if checkpoint.random_weights else {}),
        **({} if quantization is None else {"quantization_config": dict(quantization)}),
    }


def _computed_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype to compute in: that of the tensors, unless activations exceed it."""
    wide = checkpoint.family.half == "BF16"
    return str(torch.bfloat16 if wide else stored_dtype(checkpoint)).removeprefix("torch.")


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
    layers: Sequence[Path] | None,
    folder: Path,
    *,
    token: ImageToken | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[str], None] = lambda _: None,
) -> int:
    """Write all tensors into ``folder``, one at a time; return their bytes.

    ``layers`` are the files of the decoder layers, by names within the layer, or None. Everything else (vision,
    projector, embedding, norm, output, guard head) comes from the checkpoint in 16 bit. One file, or several of
    ``shard_bytes`` at most with an index, and one for the guard head. ``token`` gets a row of the embeddings.

    Raises OSError; CheckpointError.
    """
    pieces = [*_of_checkpoint(checkpoint, token, layers=layers is None)]
    for index, path in enumerate(layers or ()):
        pieces += _of_layer(path, f"{checkpoint.family.language_prefix}layers.{index}.")
    head = [piece for piece in pieces if piece.name.startswith(HEAD_PREFIX)]
    if head:
        (folder / GUARD_FILE).parent.mkdir(exist_ok=True)
        _write_file(folder / GUARD_FILE, head)
    model = [piece for piece in pieces if not piece.name.startswith(HEAD_PREFIX)]
    return write_shards(model, folder, shard_bytes=shard_bytes, report=report) + sum(piece.nbytes for piece in head)


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


def _of_checkpoint(checkpoint: Checkpoint, token: ImageToken | None, *, layers: bool) -> Iterator[Piece]:
    """Yield what is written of a checkpoint's own tensors, decoder layers only with ``layers``."""
    family = checkpoint.family
    for name in checkpoint.tensors.names():
        if not name.startswith(family.prefixes) or name.endswith("rotary_emb.inv_freq"):  # computed; old files hold it
            continue
        if name.startswith(f"{family.language_prefix}layers.") and not layers:
            continue
        shape = checkpoint.tensors.shape(name)
        more = 0
        if token is not None and name in (f"{family.language_prefix}embed_tokens.weight", f"{OUTPUT_PREFIX}weight"):
            more = token.rows(shape[0]) - shape[0]
        shape = (shape[0] + more, *shape[1:]) if more else shape
        kept = kept_dtype(checkpoint, name)

        def write(file: BinaryIO, name: str = name, kept: torch.dtype = kept, more: int = more) -> None:
            first = None
            for part in checkpoint.tensors.pieces(name):
                values = converted(part, kept, name)
                first = values[:1].clone() if first is None and more else first
                write_bytes(file, values)
            for _ in range(more):  # as the first token: no logit is above all that there were
                assert first is not None
                write_bytes(file, first)

        yield Piece(stored_name(name), DTYPES[kept], shape, torch.Size(shape).numel() * kept.itemsize, write)


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
