"""A checkpoint on torch, 16 bit or compressed: answer and exact verdict from one prefill, in batches."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from benchmarks.runs.answering.answerer import (
    Description,
    answered,
    checkpoint_artifact,
    class_order,
    decoding_of,
    failed,
    for_row,
    prompt_text,
)
from benchmarks.runs.record import Row, Runtime
from runtimes.language.question import Reader, check_turns
from runtimes.language.torch_language import reader_of
from runtimes.language.writing import Decoding, Writing
from safevlm.errors import SafeVLMError
from safevlm.machine import memory_advice
from safevlm.network.dialogue import as_turns

if TYPE_CHECKING:
    from typing_extensions import Self

    from safevlm.checkpoint.checkpoint import Checkpoint

__all__ = ["TorchAnswerer", "torch_runtime"]


def torch_runtime(device: str, dtype: str, batch: int) -> Runtime:
    """Return what a run record says of torch on a device, which is there."""
    import torch

    from safevlm.network.device import gpu_use, torch_device

    used = gpu_use(torch_device(device))
    gpu = None if used is None else used.name
    return Runtime(name="torch", version=torch.__version__, device=device, dtype=dtype, batch=batch, gpu=gpu)


class TorchAnswerer:
    """Answer with a checkpoint's whole model; rows of kind ``image`` are asked of its exact guard alone."""

    kinds = frozenset({"pair", "question", "image"})

    def __init__(
        self,
        checkpoint: Checkpoint,
        classes: Sequence[str],
        *,
        max_new_tokens: int,
        batch: int = 16,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        grid: tuple[int, int] | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        self.decoding = decoding or Decoding()
        self.checkpoint = checkpoint
        self.batch = batch
        self.max_new_tokens = max_new_tokens
        self.device = device
        self.dtype = dtype
        self.grid = grid
        self._order = class_order(checkpoint.classes, classes, checkpoint.name)
        self._vlm: Any = None
        self._reader: Reader | None = None

    def __enter__(self) -> Self:
        import torch

        from safevlm.network.loading import load_safe_vlm

        dtype = getattr(torch, self.dtype)
        self._vlm = load_safe_vlm(self.checkpoint, dtype=dtype, grid=self.grid, device=self.device).to(dtype=dtype)
        self._reader = reader_of(self._vlm)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._vlm = self._reader = None

    def describe(self) -> Description:
        """Return the checkpoint, torch, the family's prompt, how answers are written."""
        return Description(
            artifact=checkpoint_artifact(self.checkpoint),
            runtime=torch_runtime(self.device, self.dtype, self.batch),
            prompt=prompt_text(self.checkpoint.family.prompt),
            preprocessing=self._vlm.preprocessing.model_dump(mode="json"),
            decoding=decoding_of(self.decoding, self.max_new_tokens),
        )

    def answer(self, rows: Sequence[Row], pictures: Sequence[Image.Image]) -> list[Row]:
        """Answer in one batch; where it fails, row by row, so that one bad row spoils no other.

        A question that the gate would refuse is a failed row here, too.
        """
        try:
            for row in rows:
                if row.kind != "image":
                    check_turns(self._reader, as_turns(row.query or ""), self.max_new_tokens)
            with memory_advice("Give a smaller --batch, or --dtype bfloat16.", SafeVLMError):
                return self._together(rows, pictures)
        except SafeVLMError as error:
            if len(rows) == 1:
                return [failed(rows[0], str(error))]
        return [self.answer([row], [picture])[0] for row, picture in zip(rows, pictures, strict=True)]

    def _choose(self, rows: Sequence[Row]) -> Callable[[Any], int] | None:
        """Return what takes each row's token in turn, None for the likeliest ones."""
        if self.decoding.temperature == 0:
            return None
        turns = itertools.cycle([Writing(decoding=for_row(self.decoding, row)) for row in rows])
        return lambda logits: next(turns).choose(logits)

    def _together(self, rows: Sequence[Row], pictures: Sequence[Image.Image]) -> list[Row]:
        import torch

        begun = time.perf_counter()
        levels = np.stack([self._vlm.preprocessing.apply(picture) for picture in pictures])
        images = torch.from_numpy(levels).to(self.device)
        if rows[0].kind == "image":
            texts: list[str | None] = [None] * len(rows)
            probs = self._vlm.guard(images)[0].float().cpu().numpy()
        else:
            questions = [row.query or "" for row in rows]
            found = self._vlm.answer(images, questions, self.max_new_tokens, choose=self._choose(rows))
            texts, probs = [each.text for each in found], np.stack([each.guard_probs for each in found])
        each_ms = (time.perf_counter() - begun) * 1000 / len(rows)
        return [
            answered(row, answer=text, probs=prob, order=self._order, ms=each_ms)
            for row, text, prob in zip(rows, texts, probs, strict=True)
        ]
