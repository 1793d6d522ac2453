"""Pack many questions about one image into one sequence that shares the image's prefix.

Shapes: B images, K questions an image, P prefix tokens, L packed tokens, M supervised tokens in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tiny.blueprints import Blueprint
from calibration.holisafe_mini.questions import Pair
from safevlm.checkpoint.families import FAMILIES

__all__ = ["Packed", "Packer"]

PREFIX, PADDING = -1, -2
"""Branch numbers of tokens that belong to no question."""
_ROUND = 48
"""Packed lengths are rounded up to this, so that few shapes are compiled."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed batch.

    ``ids`` B×L; ``offsets`` B×L, a token's place after the prefix (prefix tokens: their own place); ``branch``
    B×L, the question that a token belongs to; ``rows`` and ``columns`` M, where the supervised predictions
    are read; ``targets`` M, the tokens to predict there.
    """

    ids: Tensor
    offsets: Tensor
    branch: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    prefix: int


class Packer:
    """Tokenise questions and answers in the family's prompt format, and pack them."""

    def __init__(self, blueprint: Blueprint, folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        self.prompt = FAMILIES[blueprint.family].prompt
        backend: Any = PreTrainedTokenizerFast  # untyped
        self.tokenizer = backend(tokenizer_file=str(folder / "tokenizer.json"))
        self.image_tokens = blueprint.image_tokens
        before = self.encode(self.prompt.before_image)
        self.image_start = len(before)
        self.prefix = [*before, *[0] * self.image_tokens]

    def encode(self, text: str) -> list[int]:
        """Tokenise one piece of text; special tokens stand in it by name."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def pack(self, batch: list[list[Pair]]) -> Packed:
        """Pack K questions for each of B images."""
        rows = [self._row(pairs) for pairs in batch]
        length = -(-max(len(row[0]) for row in rows) // _ROUND) * _ROUND
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        offsets = torch.zeros_like(ids)
        branch = torch.full_like(ids, PADDING)
        where: list[tuple[int, int, int]] = []
        for i, (row_ids, row_offsets, row_branch, supervised) in enumerate(rows):
            ids[i, : len(row_ids)] = torch.tensor(row_ids)
            offsets[i, : len(row_ids)] = torch.tensor(row_offsets)
            branch[i, : len(row_ids)] = torch.tensor(row_branch)
            where += [(i, column, row_ids[column + 1]) for column in supervised]
        at = torch.tensor(where)
        return Packed(
            ids=ids,
            offsets=offsets,
            branch=branch,
            rows=at[:, 0],
            columns=at[:, 1],
            targets=at[:, 2],
            prefix=len(self.prefix),
        )

    def _row(self, pairs: list[Pair]) -> tuple[list[int], list[int], list[int], list[int]]:
        ids, offsets, branch = list(self.prefix), list(range(len(self.prefix))), [PREFIX] * len(self.prefix)
        supervised: list[int] = []
        for number, pair in enumerate(pairs):
            question = self.encode(self.prompt.after_image + pair.query + self.prompt.after_question)
            answer = self.encode(pair.answer + self.prompt.end_of_turn)
            first = len(ids) + len(question) - 1
            supervised += range(first, first + len(answer))
            ids += question + answer
            offsets += range(len(question) + len(answer))
            branch += [number] * (len(question) + len(answer))
        return ids, offsets, branch, supervised
