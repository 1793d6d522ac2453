"""A checkpoint seen through a rotation: its tensors are turned as they are read, one at a time.

What streams, rounds, compares and writes layers reads them here and knows nothing of it. Turned tensors are float32.

Shapes: R output rows, C input columns, D width of the language model, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantize.methods.rotation import Orthogonal, Rotate, check_rotation, orthogonal
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.checkpoint.family import HEAD_PREFIX, OUTPUT_PREFIX
from safevlm.checkpoint.weights.tensors import TensorStore

__all__ = ["SEED", "RotatedTensors", "rotated"]

SEED = 0
OUTPUT = f"{OUTPUT_PREFIX}weight"
HEAD = f"{HEAD_PREFIX}mlp.0.weight"
ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """What is done to one tensor: columns times a norm's weight, then what it reads and what it writes turned."""

    norm: str | None = None
    reads: Orthogonal | None = None
    repeats: int = 1
    """How many neighbouring heads of what it reads are turned by the same head's matrix."""
    heads_written: Orthogonal | None = None
    writes: Orthogonal | None = None
    is_norm: bool = False
    """A norm's weight, which others have taken over."""


def rotated(checkpoint: Checkpoint, rotate: Rotate) -> Checkpoint:
    """Return a checkpoint that computes the same with other weights; with ``none`` the checkpoint itself.

    A tied output embedding becomes one of its own. Raises InputError for a rotation that the family does not allow.
    """
    check_rotation(checkpoint, rotate)
    if rotate == "none":
        return checkpoint
    config: dict[str, Any] = dict(checkpoint.config)
    if rotate != "values":
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), Mapping):
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return replace(checkpoint, tensors=RotatedTensors(checkpoint, rotate), config=config)


class RotatedTensors(TensorStore):
    """The store of a checkpoint, its tensors turned; hashes are those of what is stored."""

    def __init__(self, checkpoint: Checkpoint, rotate: Rotate) -> None:
        self._inner = checkpoint.tensors
        text = build_config(checkpoint).text_config
        heads = text.num_attention_heads
        self._groups = text.num_key_value_heads
        self._repeats = heads // self._groups
        self._head = getattr(text, "head_dim", None) or text.hidden_size // heads
        self._values = rotate in ("values", "both")
        self._stream = orthogonal(text.hidden_size, SEED) if rotate in ("residual", "both") else None
        self._family, self._tap = checkpoint.family, checkpoint.tap.source
        self._prefix = checkpoint.family.language_prefix
        self._layer = re.compile(re.escape(self._prefix) + r"layers\.(\d+)\.(.+)\.(weight|bias)")
        self._untied = self._stream is not None and OUTPUT not in self._inner

    # -- names, shapes, hashes --------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """Return all canonical names, sorted; the output matrix is among them where it was tied."""
        return tuple(sorted({*self._inner.names(), *([OUTPUT] if self._untied else [])}))

    def __contains__(self, name: object) -> bool:
        return name in self._inner or (self._untied and name == OUTPUT)

    def __len__(self) -> int:
        return len(self.names())

    def stored_name(self, name: str) -> str:
        """Return the name that the file uses."""
        return self._inner.stored_name(self._source(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, which no rotation changes."""
        return self._inner.shape(self._source(name))

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype; that of a turned one is ``F32``."""
        turn = self._turn(name)
        return self._inner.dtype(self._source(name)) if turn is None or turn.is_norm else "F32"

    def sha256(self, names: Iterable[str]) -> str:
        """Return the hash of the tensors as they are stored."""
        return self._inner.sha256(names)

    def share(self, names: Iterable[str]) -> float | None:
        """Return the named tensors' share of all that is stored."""
        return self._inner.share(names)

    @property
    def read_names(self) -> frozenset[str]:
        """Canonical names of the tensors whose bytes were read so far."""
        return self._inner.read_names

    @property
    def bytes_read(self) -> int:
        """Tensor bytes read so far."""
        return self._inner.bytes_read

    def turned_names(self) -> Iterator[str]:
        """Yield the names of the tensors that are not as they are stored."""
        return (name for name in self.names() if self._turn(name) is not None)

    def is_guard(self, name: str) -> bool:
        """Say whether a turned tensor is of the vision path or the guard head, and is stored as exactly as it is."""
        return self._turn(name) is not None and not name.startswith((self._prefix, OUTPUT_PREFIX))

    # -- values -----------------------------------------------------------------------------------------

    def read(self, name: str, *, own: bool = False) -> Tensor:
        """Return one tensor, turned. Raises CheckpointError."""
        turn = self._turn(name)
        stored = self._inner.read(self._source(name), own=own)
        return stored if turn is None else self._turned(stored, turn)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` of a tensor; of one that only reads what is turned no others are turned."""
        turn = self._turn(name)
        if turn is None:
            return self._inner.read_rows(name, start, stop)
        if turn.writes is not None or turn.heads_written is not None:
            return self.read(name)[start:stop]
        return self._turned(self._inner.read_rows(self._source(name), start, stop), turn)

    def pieces(self, name: str, rows: int | None = None) -> Iterator[Tensor]:
        """Yield a tensor in pieces of so many rows; one whose rows depend on each other is turned whole.

        Raises as :meth:`read`.
        """
        turn = self._turn(name)
        if turn is None:
            yield from self._inner.pieces(name, rows)
        elif turn.reads is not None and turn.writes is None and turn.heads_written is None:
            for piece in self._inner.pieces(self._source(name), rows):
                yield self._turned(piece, turn)
        else:
            whole = self.read(name, own=True)
            yield from (whole,) if rows is None or not whole.ndim else whole.split(rows)  # type: ignore[no-untyped-call]

    def _source(self, name: str) -> str:
        return f"{self._prefix}embed_tokens.weight" if self._untied and name == OUTPUT else name

    def _turned(self, stored: Tensor, turn: _Turn) -> Tensor:
        if turn.is_norm:
            return torch.ones_like(stored)
        value = stored.float()
        if turn.norm is not None:
            value = value * self._inner.read(turn.norm).float()
        if turn.reads is not None:
            heads = value.reshape(len(value), -1, turn.repeats, turn.reads.signs.shape[1]).transpose(1, 2)
            value = turn.reads.turn(heads.contiguous()).transpose(1, 2).reshape(stored.shape)
        for outputs in (turn.heads_written, turn.writes):
            if outputs is not None:
                value = outputs.turn(value) if value.ndim == 1 else outputs.turn_outputs(value)
        return value

    def _turn(self, name: str) -> _Turn | None:
        """Return what is done to a tensor; ``None`` for one that stays as it is stored."""
        matched = self._layer.fullmatch(name)
        if matched is not None:
            return self._turn_in_layer(int(matched[1]), matched[2], matched[3])
        stream, norm = self._stream, f"{self._prefix}norm.weight"
        if stream is None:
            return None
        if name == norm:
            return _Turn(is_norm=True)
        if name == f"{self._prefix}embed_tokens.weight":
            return _Turn(reads=stream)
        if name == OUTPUT or (name == HEAD and self._tap == "language_model"):
            return _Turn(norm=norm, reads=stream)
        if name == HEAD:
            return _Turn(reads=stream)
        if name in (f"{self._family.image_linear}.weight", f"{self._family.image_linear}.bias"):
            return _Turn(writes=stream)
        return None

    def _turn_in_layer(self, index: int, module: str, kind: str) -> _Turn | None:
        stream, weight = self._stream, kind == "weight"
        norms = {"input_layernorm": ATTENTION_INPUTS, self._family.mlp_norm: MLP_INPUTS}
        if module in norms and stream is not None:
            return _Turn(is_norm=True)
        norm = next((norm for norm, readers in norms.items() if module in readers and stream is not None), None)
        values = module in ("self_attn.v_proj", "self_attn.o_proj") and self._values
        heads = self._heads(index) if values else None
        if module in OUTPUTS:
            reads = heads if weight else None
            turn = _Turn(reads=reads, repeats=self._repeats if reads else 1, writes=stream)
            return None if turn.reads is None and turn.writes is None else turn
        reads_stream = norm is not None and weight
        if not reads_stream and heads is None:
            return None
        return _Turn(
            norm=f"{self._prefix}layers.{index}.{norm}.weight" if reads_stream else None,
            reads=stream if reads_stream else None,
            heads_written=heads,
        )

    def _heads(self, index: int) -> Orthogonal:
        return orthogonal(self._head, SEED + 1 + index, self._groups)
