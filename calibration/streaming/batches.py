"""Calibration samples as padded batches of prompt and answer, their embeddings and what each token counts.

Shapes: B samples a batch, L positions, T = B · L tokens, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calibration.answers import Answer, pictures_of
from calibration.distilling.teacher import guard_prefix, without_embeddings
from calibration.sets.beginnings import USUAL, Beginning, Beginnings, Begun, Writer, begin_otherwise, system_texts
from calibration.sets.conversations import Sample
from calibration.sets.refusals import is_refusal
from calibration.streaming.sequential import Activations, LayerStream
from safevlm.errors import InputError
from safevlm.network.prompt_tokens import IMAGE
from safevlm.network.safe_vlm import Prefill, SafeVLM

__all__ = ["Batch", "Row", "TokenWeights", "embed_batches", "lay_out", "pack_rows", "row_limit", "row_of"]


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """What tokens count in second moments: text 1, padding 0.

    An image's many tokens share a weight that makes them at most ``image_share`` of their sample, so that 576 of
    them do not drown a short question; they never count more than text. Tokens of an answer that is a refusal count
    ``refusal_weight`` times. On top of that, image tokens that a guard behind the language model reads count
    ``guard_weight`` times, and the first token of a row, an attention sink, ``first_weight`` times. ``by`` gradient
    shifts weights between the tokens of a row's text, and of its image, layer by layer; see
    :mod:`calibration.streaming.gradients`.
    """

    image_share: float = 0.5
    refusal_weight: float = 1.0
    guard_weight: float = 1.0
    first_weight: float = 8.0
    by: Literal["fixed", "gradient"] = "fixed"

    def __post_init__(self) -> None:
        if not 0 < self.image_share < 1:
            raise InputError(
                f"--image-share {self.image_share} is not allowed. Give a number above 0 and below 1; 0.5 is usual."
            )
        for name in ("refusal_weight", "guard_weight", "first_weight"):
            weight = getattr(self, name)
            if not 0 < weight < float("inf"):
                option = "--" + name.replace("_", "-")
                raise InputError(
                    f"{option} {weight} is not allowed. Give a number above 0; 1 counts these tokens as others."
                )

    def of(self, prefill: Prefill, refused: Tensor | None = None, judged: Tensor | None = None) -> Tensor:
        """Return the weight of each token of a batch, float32 T.

        ``refused`` B × L are tokens of refusals, ``judged`` B rows whose image tokens the guard reads.
        """
        real = prefill.masks["attention_mask"].bool()
        image = prefill.image_mask & real
        weights = real.float()
        if refused is not None:
            weights = torch.where(refused & real, weights * self.refusal_weight, weights)
        text_B, images_B = weights.masked_fill(image, 0).sum(dim=1), image.sum(dim=1)
        fitting_B = (text_B * self.image_share / (1 - self.image_share) / images_B.clamp(min=1)).clamp(max=1)
        if judged is not None:
            fitting_B = torch.where(judged, fitting_B * self.guard_weight, fitting_B)
        weights = torch.where(image, fitting_B.unsqueeze(1).to(weights), weights)
        first = real & (real.cumsum(dim=1) == 1)
        return torch.where(first, weights * self.first_weight, weights).flatten()

    def of_batch(self, batch: Batch) -> Tensor:
        """Return the same with what is known of the batch's rows."""
        device = batch.prefill.image_mask.device
        return self.of(batch.prefill, batch.refused().to(device), batch.judged().to(device))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample's token ids: its prompt, and its answer's at the end.

    ``sample`` has the image, if one is shown. ``judged`` rows are those whose image tokens the guard reads: it is
    behind the language model, and before the image stands the family's usual prompt.
    """

    sample: Sample
    ids: tuple[int, ...]
    answer_length: int
    refused: bool
    beginning: Beginning = "usual"
    system: str | None = None
    judged: bool = False

    @property
    def shows_image(self) -> bool:
        """Whether the image is in the row; a piece may have lost it."""
        return IMAGE in self.ids


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

    def judged(self) -> Tensor:
        """Return B, true for rows whose image tokens the guard reads."""
        return torch.tensor([row.judged for row in self.rows])


def lay_out(
    model: SafeVLM,
    samples: Sequence[Sample],
    answers: Sequence[Answer | None],
    *,
    max_length: int | None = None,
    beginnings: Beginnings = USUAL,
    seed: int = 0,
) -> list[Row]:
    """Return each sample's ids in the family's chat template; a share begins otherwise, chosen by ``seed``.

    Raises InputError for one that is longer than the model's context or ``max_length``, with its place.
    """
    limit = row_limit(model, max_length)
    writer = Writer(model, samples, answers, limit)
    usual = [writer.usual(place) for place in range(len(samples))]
    for begun in usual:
        if len(begun.ids) > limit:
            raise InputError(
                f"{begun.sample.where}: {len(begun.ids)} tokens with image and answer; the limit is {limit} "
                f"({'--max-length' if limit == max_length else 'the context of the model'}). Shorten the sample or "
                "leave it out."
            )
    others = begin_otherwise(writer, len(samples), beginnings, system_texts("calibration"), seed)
    return [row_of(model, others.get(place, begun), answers[place]) for place, begun in enumerate(usual)]


def row_limit(model: SafeVLM, max_length: int | None) -> int:
    """Return the most ids that a row may have: the model's context, or ``max_length``."""
    stated = int(model.core.config.get_text_config().max_position_embeddings)
    return stated if max_length is None else min(stated, max_length)


def row_of(model: SafeVLM, begun: Begun, answer: Answer | None) -> Row:
    """Return a row of what was written of a sample with this answer."""
    prefix = tuple(guard_prefix(model)) if model.tap_source == "language_model" and IMAGE in begun.ids else None
    return Row(
        sample=begun.sample,
        ids=begun.ids,
        answer_length=begun.answer_length,
        refused=answer is not None and is_refusal(answer.text),
        beginning=begun.beginning,
        system=begun.system,
        judged=prefix is not None and begun.ids[: len(prefix)] == prefix,
    )


def pack_rows(rows: Sequence[Row], tokens: int) -> list[tuple[Row, ...]]:
    """Group rows of like length, images apart from text, so that a padded batch has at most ``tokens`` tokens.

    A row that is longer is a batch by itself.
    """
    order = sorted(rows, key=lambda row: (not row.shows_image, len(row.ids)))
    batches: list[list[Row]] = []
    for row in order:
        last = batches[-1] if batches else []
        alike = bool(last) and last[0].shows_image == row.shows_image
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
        if not rows[0].shows_image:
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
