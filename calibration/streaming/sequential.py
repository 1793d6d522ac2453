"""Run a language model decoder layer by decoder layer, each read from the checkpoint when its turn comes.

A model of 32 billion parameters then needs the memory of one layer and the activations of the samples. The
skeleton is transformers' own model with its decoder layers taken out: its forward pass still builds positions
and masks, and what it would hand to a layer is caught, so no family's rules are written again here.

Shapes: B samples a batch, L positions, D width of the language model.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from safevlm.checkpoint.architectures import architecture_of
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.checkpoint.weights.finite import converted
from safevlm.checkpoint.weights.quantized import QuantizedTensors, round_inputs
from safevlm.errors import InputError
from safevlm.files.storage import check_room, storing
from safevlm.machine import trim_memory
from safevlm.network.device import torch_device
from safevlm.network.filling import fill, on_meta
from safevlm.network.head import build_head
from safevlm.network.prompt_tokens import fitting_tokenizer
from safevlm.network.reference import leave_out_unread
from safevlm.network.safe_vlm import Prefill, SafeVLM

if TYPE_CHECKING:
    from typing_extensions import Self

    from safevlm.checkpoint.checkpoint import Checkpoint

__all__ = ["Activations", "LayerStream"]


class _Caught(Exception):  # noqa: N818  # control flow, not an error
    """What transformers was about to hand to a decoder layer."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def _file_of(size: int, folder: Path) -> IO[bytes]:
    """Return a temporary file whose room is taken already: a full disk under a memory map ends the process (SIGBUS)."""
    check_room(folder, size, "set TMPDIR to a folder with room")
    with storing(folder, "", "set TMPDIR to a folder with room"):
        file = tempfile.TemporaryFile(prefix="safevlm-activations-", dir=folder)  # noqa: SIM115  # kept open
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError:
            file.close()
            raise
        return file


class _Gap(nn.Module):
    """Stands where a decoder layer was: passes hidden states on, or gives what it was called with away."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.catches = False
        for name in ("attention_type", "layer_type"):  # what models ask of their layers
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_BLD: Tensor, **arguments: Any) -> Tensor:
        if self.catches:
            raise _Caught(arguments)
        return hidden_BLD


class _UsedRows(nn.Module):
    """A token embedding of which only some rows are held, wherever it is; any other id gives zeros.

    ``rows`` U × D belong to the ``ids``. The family's own ``embedding`` runs on them, so what it does besides looking
    up (Gemma-3 scales) is done.
    """

    def __init__(self, embedding: Any, ids: Sequence[int], rows: Tensor) -> None:
        super().__init__()
        places = torch.zeros(embedding.num_embeddings, dtype=torch.long)
        places[list(ids)] = torch.arange(1, len(ids) + 1)
        self.register_buffer("places", places, persistent=False)
        embedding.weight = nn.Parameter(torch.cat([torch.zeros_like(rows[:1]), rows]), requires_grad=False)
        embedding.num_embeddings, embedding.padding_idx = len(ids) + 1, None  # which only training asks for
        self.embedding = embedding
        self.embedding_dim = rows.shape[1]

    @property
    def weight(self) -> Tensor:
        """The rows, which tell device and dtype."""
        return cast(Tensor, self.embedding.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.embedding(cast(Tensor, self.places)[ids]))


class Activations:
    """Hidden states of all batches, in memory up to ``max_bytes``, otherwise in a memory-mapped temporary file.

    float32 or the dtype of what is put in; bfloat16 is kept as its 16 bits. Of a file only the batch that is looked
    at is mapped, so the others take no memory. It has no name, so that even a killed process leaves nothing behind;
    ``folder`` says on which disk it is. A context manager.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        dtype: torch.dtype,
        max_bytes: int | None,
        folder: Path | None = None,
    ) -> None:
        self.dtype = dtype
        self.shapes = list(shapes)
        self.sizes = [int(np.prod(shape)) * dtype.itemsize for shape in shapes]
        self.nbytes = sum(self.sizes)
        self._file: IO[bytes] | None = None
        self._memory: list[Tensor] = []
        if max_bytes is not None and self.nbytes > max_bytes:
            whole_pages = [-(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY for size in self.sizes]
            self._starts = np.cumsum([0, *whole_pages]).tolist()
            self._file = _file_of(self._starts[-1], Path(folder or tempfile.gettempdir()))
        else:
            self._memory = [torch.empty(shape, dtype=dtype) for shape in shapes]

    @property
    def on_disk(self) -> bool:
        """Whether they are in a file."""
        return self._file is not None

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Tensor:
        """Return batch ``index``, B × L × D; writing into it changes what is kept."""
        if self._file is None:
            return self._memory[index]
        mapped = mmap.mmap(self._file.fileno(), self.sizes[index], offset=self._starts[index])
        return torch.frombuffer(mapped, dtype=self.dtype).view(self.shapes[index])

    def copy(self, max_bytes: int | None, folder: Path | None = None) -> Activations:
        """Return the same numbers once more, in memory up to ``max_bytes``, otherwise in a file in ``folder``."""
        found = Activations(self.shapes, self.dtype, max_bytes, folder)
        for number in range(len(self)):
            found[number].copy_(self[number])
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._memory = []
        if self._file is not None:
            self._file.close()


class LayerStream:
    """A checkpoint whose vision path, head and small parts are loaded and whose decoder layers are not.

    ``skeleton`` is a :class:`safevlm.network.safe_vlm.SafeVLM` that makes prompts and image features as ever (``embed``
    and ``assemble`` with the token ids named in ``token_ids``); its decoder layers are gaps and its output
    layer is left out, and of its token embedding it holds the rows of ``token_ids``. ``dtype`` is what weights and
    hidden states of layers are in, ``products`` what factors of their matrix products are rounded to (the sums are
    float32), ``device`` where they run.

    Raises CheckpointError for missing or mis-shaped tensors; InputError for a device that is not there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        grid: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        products: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        token_ids: Callable[[SafeVLM], Sequence[int]],
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.products = products or dtype
        self.device = torch_device(device)
        config = build_config(checkpoint)
        model: Any = on_meta(lambda: architecture_of(config).whole_class(config))
        language = model.model.language_model
        self._layers = language.layers
        language.layers = nn.ModuleList(_Gap(layer) for layer in self._layers)
        model.lm_head = nn.Identity()
        embedding = language.embed_tokens
        language.embed_tokens = nn.Identity()
        leave_out_unread(model.model, checkpoint.tensors)
        fill(model, checkpoint.tensors, prefix="", dtype=dtype, own=True, device=self.device)
        tokenizer = fitting_tokenizer(checkpoint.folder, checkpoint.family.prompt, embedding.num_embeddings)
        self.skeleton = SafeVLM(
            model,
            build_head(checkpoint, dtype=torch.float32),
            family=checkpoint.family,
            classes=checkpoint.classes,
            tap_source=checkpoint.tap.source,
            preprocessing=read_processor(checkpoint.processor, family=checkpoint.family.key, grid=grid),
            tokenizer=tokenizer,
        ).eval()
        language.embed_tokens = _UsedRows(embedding, *self._rows(token_ids(self.skeleton)))
        self.skeleton.to(self.device)
        self._language = language

    def __len__(self) -> int:
        """Return the number of decoder layers."""
        return len(self._layers)

    def _rows(self, ids: Sequence[int]) -> tuple[list[int], Tensor]:
        """Return the ids of the token embedding's rows that are asked for, and the rows."""
        name = self.checkpoint.family.language_prefix + "embed_tokens.weight"
        vocabulary = self.checkpoint.tensors.shape(name)[0]
        rows = sorted({token for token in ids if token >= 0} | {0})
        if rows[-1] >= vocabulary:
            raise InputError(
                f"token {rows[-1]} is outside of the vocabulary of {vocabulary}: the tokenizer does not fit the model"
            )
        wanted, found, first = torch.tensor(rows), [], 0
        for piece in self.checkpoint.tensors.pieces(name):
            inside = wanted[(wanted >= first) & (wanted < first + len(piece))]
            found.append(converted(piece[inside - first], self.dtype, self.checkpoint.tensors.stored_name(name)))
            first += len(piece)
        return rows, torch.cat(found)

    def layers(self, stop: int | None = None) -> Iterator[tuple[int, nn.Module]]:
        """Yield each decoder layer, or the first ``stop``, with its index and its weights in place.

        One layer's weights are in memory at a time: a layer loses them when the next one is asked for, whoever still
        holds it. Until then it may be watched with hooks and changed; :meth:`advance` runs it as it is.
        """
        for index in range(len(self) if stop is None else stop):
            layer = self.load_layer(index)
            yield index, layer
            layer.to_empty(device="meta")
            del layer

    @torch.no_grad()
    def advance(
        self,
        index: int,
        layer: nn.Module,
        batches: Sequence[Prefill],
        hidden: Activations,
        output: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Take ``hidden`` through a layer, in place; ``batches`` are read for their positions and masks.

        ``output`` gives what the layer makes of a batch, B × L × D, by the batch's number, where a shorter way there is
        known.
        """
        for number, batch in enumerate(batches):
            states = hidden[number]
            states.copy_(self.run_layer(index, layer, batch, states) if output is None else output(number))

    def run(
        self, batches: Sequence[Prefill], hidden: Activations, *, report: Callable[[int], None] = lambda _: None
    ) -> None:
        """Take ``hidden`` from embeddings to last hidden states, after the final norm, in place.

        ``batches`` are the prefills that ``hidden`` holds the ``inputs_embeds`` of. ``report`` is called with each
        layer's index when it has run.
        """
        for index, layer in self.layers():
            self.advance(index, layer, batches, hidden)
            report(index)
        self.norm(hidden)

    @torch.no_grad()
    def norm(self, hidden: Activations) -> None:
        """Take the last layer's outputs through the final norm, in place."""
        for number in range(len(hidden)):
            states = hidden[number]
            states.copy_(self.normed(states.to(self.device)))

    def normed(self, states_BLD: Tensor) -> Tensor:
        """Return what the final norm makes of the last layer's output; gradients flow."""
        return cast(Tensor, self._language.norm(states_BLD))

    def forget_vision(self) -> None:
        """Let go of vision tower, projector and tokenizer: no more image features or prompts can be made.

        A tokenizer of 49,152 words has 50 MiB in small pieces, which the C library keeps unless it is told.
        """
        for name in ("vision_tower", "multi_modal_projector", "visual"):
            if hasattr(self.skeleton.core, name):
                setattr(self.skeleton.core, name, nn.Identity())
        self.skeleton.tokenizer = None
        trim_memory()

    def load_layer(self, index: int) -> nn.Module:
        """Return decoder layer ``index`` with its tensors; the caller's reference is the only one."""
        config = self._language.config
        layer: nn.Module = on_meta(lambda: type(self._layers[index])(config, layer_idx=index))
        prefix = f"{self.checkpoint.family.language_prefix}layers.{index}."
        fill(layer, self.checkpoint.tensors, prefix=prefix, dtype=self.dtype, own=True, device=self.device)
        quantization = self.checkpoint.quantization
        if quantization is not None and quantization.rounds_inputs:
            round_inputs(layer, cast(QuantizedTensors, self.checkpoint.tensors).quantized_modules(prefix))
        return layer.to(self.device)

    def multiplying(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which modules' matrix products have factors in :attr:`products`."""
        if self.products == self.dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.products, cache_enabled=False)

    def run_layer(self, index: int, layer: nn.Module, batch: Prefill, hidden_BLD: Tensor) -> Tensor:
        """Return what a layer makes of hidden states B × L × D, with the positions and masks it would have."""
        states = hidden_BLD.to(self.device)
        gap = cast(_Gap, self._language.layers[index])
        gap.catches = True
        try:
            self.skeleton.language_forward(states, batch.masks, batch.position_ids)
        except _Caught as caught:
            arguments = caught.arguments
        finally:
            gap.catches = False
        with self.multiplying():
            output = layer(states, **arguments)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)
