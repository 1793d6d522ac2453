"""The 16-bit model's own answers to calibration samples, refusals included: what a compressed model must still say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from calibration.conversations import Sample
from models.checkpoint import Checkpoint
from models.prompt_tokens import answer_ids
from models.safe_vlm import SafeVLM, load_safe_vlm

__all__ = ["Answer", "own_answers", "pictures_of", "whole_model_bytes"]

BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is said to a sample; ``ids`` are the model's own tokens, ``None`` for a text from a file."""

    text: str
    ids: tuple[int, ...] | None = None


def whole_model_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Return the bytes of all parameters in ``dtype``: what must fit to let the model answer."""
    names = checkpoint.tensors.names()
    return sum(int(np.prod(checkpoint.tensors.shape(name))) for name in names) * dtype.itemsize


def own_answers(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    grid: tuple[int, int] | None = None,
    max_new_tokens: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    report: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """Return the greedy answer to every sample; the whole model is loaded for it.

    The end of the turn belongs to an answer that came to it within ``max_new_tokens``.

    Errors: CheckpointError; ImageFileError with the sample's place.
    """
    model = load_safe_vlm(checkpoint, grid=grid, dtype=dtype).to(device)
    questions = [len(model.tokenizer.encode(sample.question, add_special_tokens=False)) for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: (samples[i].image is None, questions[i], i))
    answers: dict[int, Answer] = {}
    end = answer_ids(model.tokenizer, model.family.prompt, "")
    for _, group in groupby(order, key=lambda i: samples[i].image is None):
        rows = list(group)
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            report(f"the model answers calibration samples, {len(answers) + len(batch)} of {len(samples)}")
            asked = [samples[i] for i in batch]
            texts = [sample.question for sample in asked]
            if asked[0].image is None:
                prefill = model.embed_text(texts)
            else:
                with torch.inference_mode():
                    prefill = model.embed(pictures_of(model, asked).to(device), texts)
            for i, ids in zip(batch, model.generate(prefill, max_new_tokens), strict=True):
                text = str(model.tokenizer.decode(ids, skip_special_tokens=True)).strip()
                answers[i] = Answer(text=text, ids=(*ids, *end) if len(ids) < max_new_tokens else tuple(ids))
    return [answers[i] for i in range(len(samples))]


def pictures_of(model: SafeVLM, samples: Sequence[Sample]) -> torch.Tensor:
    """Return the samples' pictures at the contract's size: uint8 N × H × W × 3."""
    pictures = (sample.picture() for sample in samples)
    return torch.from_numpy(np.stack([model.preprocessing.apply(each) for each in pictures if each is not None]))
