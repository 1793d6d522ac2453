"""Calibration samples as padded batches of prompt and answer, their embeddings and what each token counts.

Shapes: B samples a batch, L positions, T = B · L tokens, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.answers import Answer, pictures_of
from calibration.distilling.teacher import without_embeddings
from calibration.sets.conversations import Sample
from calibration.sets.refusals import is_refusal
from calibration.streaming.sequential import Activations, LayerStream
from safevlm.errors import InputError
from safevlm.network.prompt_tokens import answer_ids, text_ids
from safevlm.network.safe_vlm import Prefill, SafeVLM

__all__ = ["Batch", "Row", "TokenWeights", "embed_batches", "lay_out", "pack_rows"]


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """What tokens count in second moments: text 1, padding 0.

    An image's many tokens share a weight that makes them at most ``image_share`` of their sample, so that 576 of
    them do not drown a short question; they never count more than text. Tokens of an answer that is a refusal count
    ``refusal_weight`` times.
    """

    image_share: float = 0.5
    refusal_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.image_share < 1:
            raise InputError(
                f"--image-share {self.image_share} is not allowed. Give a number above 0 and below 1; 0.5 is usual."
            )
        if not 0 < self.refusal_weight < float("inf"):
            raise InputError(
                f"--refusal-weight {self.refusal_weight} is not allowed. Give a number above 0; 1 is usual."
            )

    def of(self, prefill: Prefill, refused: Tensor | None = None) -> Tensor:
        """Return the weight of each token of a batch, float32 T; ``refused`` B × L are tokens of refusals."""
        real = prefill.masks["attention_mask"].bool()
        image = prefill.image_mask & real
        weights = real.float()
        if refused is not None:
            weights = torch.where(refused & real, weights * self.refusal_weight, weights)
        text_B, images_B = weights.masked_fill(image, 0).sum(dim=1), image.sum(dim=1)
        fitting = text_B * self.image_share / (1 - self.image_share) / images_B.clamp(min=1)
        return torch.where(image, fitting.clamp(max=1).unsqueeze(1).to(weights), weights).flatten()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample's token ids: its prompt, and its answer's at the end."""

    sample: Sample
    ids: tuple[int, ...]
    answer_length: int
    refused: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows of about one length, with or without images; ``prefill`` without embeddings."""

    rows: tuple[Row, ...]
    prefill: Prefill

    def answers(self) -> Tensor:
        """Return B × L, true where a position's token belongs to the answer."""
        length = self.prefill.image_mask.shape[1]
        places = torch.arange(length)
        starts = torch.tensor([length - row.answer_length for row in self.rows])
        return places.unsqueeze(0) >= starts.unsqueeze(1)

    def refused(self) -> Tensor:
        """Return the same for answers that are refusals alone."""
        return self.answers() & torch.tensor([row.refused for row in self.rows]).unsqueeze(1)


def lay_out(
    model: SafeVLM, samples: Sequence[Sample], answers: Sequence[Answer | None], *, max_length: int | None = None
) -> list[Row]:
    """Return each sample's ids in the family's chat template.

    Raises InputError for one that is longer than the model's context or ``max_length``, with its place.
    """
    stated = int(model.core.config.get_text_config().max_position_embeddings)
    limit = stated if max_length is None else min(stated, max_length)
    rows = []
    for sample, answer in zip(samples, answers, strict=True):
        if sample.image is None:
            prompt = text_ids(model.tokenizer, model.family.prompt, sample.question)
        else:
            prompt = model.prompt_ids(sample.question)
        said: Sequence[int] = ()
        if answer is not None:
            said = answer.ids or answer_ids(model.tokenizer, model.family.prompt, answer.text)
        if len(prompt) + len(said) > limit:
            raise InputError(
                f"{sample.where}: {len(prompt) + len(said)} tokens with image and answer; the limit is {limit} "
                f"({'the context of the model' if limit == stated else '--max-length'}). Shorten the sample or leave "
                "it out."
            )
        rows.append(
            Row(
                sample=sample,
                ids=(*prompt, *said),
                answer_length=len(said),
                refused=answer is not None and is_refusal(answer.text),
            )
        )
    return rows


def pack_rows(rows: Sequence[Row], tokens: int) -> list[tuple[Row, ...]]:
    """Group rows of like length, images apart from text, so that a padded batch has at most ``tokens`` tokens.

    A row that is longer is a batch by itself.
    """
    order = sorted(rows, key=lambda row: (row.sample.image is None, len(row.ids)))
    batches: list[list[Row]] = []
    for row in order:
        last = batches[-1] if batches else []
        alike = bool(last) and (last[0].sample.image is None) == (row.sample.image is None)
        if alike and (len(last) + 1) * len(row.ids) <= tokens:
            last.append(row)
        else:
            batches.append([row])
    return [tuple(batch) for batch in batches]


@torch.no_grad()
def embed_batches(
    stream: LayerStream,
    packed: Sequence[tuple[Row, ...]],
    hidden: Activations,
    report: Callable[[str], None] = lambda _: None,
) -> list[Batch]:
    """Run the vision path over all batches and put their embeddings into ``hidden``.

    Raises ImageFileError with the sample's place; InputError for features that are not finite.
    """
    model = stream.skeleton
    size = (model.preprocessing.height, model.preprocessing.width)
    batches = []
    for number, rows in enumerate(packed):
        report(f"vision tower, batch {number + 1} of {len(packed)}")
        sequences = [row.ids for row in rows]
        if rows[0].sample.image is None:
            prefill = model.assemble(sequences)
        else:
            features = model.image_features(pictures_of(model, [row.sample for row in rows]).to(stream.device))
            if not bool(torch.isfinite(features).all()):
                raise InputError(
                    f"{rows[0].sample.where}: the vision tower gives NaN or infinity. Check the checkpoint."
                )
            prefill = model.assemble(sequences, features, size)
        hidden[number].copy_(prefill.inputs_embeds)
        batches.append(Batch(rows=rows, prefill=without_embeddings(prefill)))
    return batches
