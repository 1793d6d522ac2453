"""Splits are by content; heads learn, are kept at their best, and lose nothing by folding."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from calibration.distilling.student import Split, fit_head, split_by_content
from safevlm.network.pooling import Pooling

WIDTH, CLASSES = 12, 4


def digests(count: int, salt: str = "") -> list[str]:
    return [hashlib.sha256(f"{salt}{number}".encode()).hexdigest() for number in range(count)]


def test_a_picture_is_in_the_same_part_whatever_the_others_are() -> None:
    all_of_them, few = digests(4000, "a"), digests(4000, "a")[100:200]
    whole, part = split_by_content(all_of_them), split_by_content(few)
    for name in ("train", "validation", "test"):
        in_whole = {all_of_them[index] for index in getattr(whole, name)}
        assert {few[index] for index in getattr(part, name)} == in_whole & set(few)
    together = np.concatenate([whole.train, whole.validation, whole.test])
    assert sorted(together) == list(range(4000))
    assert [len(whole.train) / 4000, len(whole.test) / 4000] == pytest.approx([0.7, 0.15], abs=0.02)


def lesson() -> tuple[dict[Pooling, torch.Tensor], torch.Tensor, Split]:
    """Return features of which the second pooling alone tells the class; scales differ by a million."""
    generator = torch.Generator().manual_seed(0)
    told = torch.randn(900, WIDTH, generator=generator) * torch.logspace(-3, 3, WIDTH) + 5
    untold = torch.randn(900, WIDTH, generator=generator)
    standard = (told - told.mean(0)) / told.std(0)
    teacher = torch.softmax(3 * standard @ torch.randn(WIDTH, CLASSES, generator=generator), dim=-1)
    return {"mean": untold, "mean_max_std": told}, teacher, split_by_content(digests(900))


def test_the_best_pooling_on_the_validation_part_comes_first_and_is_right_on_the_test_part() -> None:
    features, teacher, split = lesson()
    first, second = fit_head(features, teacher, split, hidden=32, steps=400)
    assert (first.pooling, second.pooling) == ("mean_max_std", "mean")
    assert first.validation_kl < second.validation_kl
    for fit in (first, second):  # folded heads read raw features: their figures are found again from outside
        rows = torch.from_numpy(split.validation)
        logits = fit.head(features[fit.pooling][rows])
        log_ratio = teacher[rows].clamp(min=1e-30).log() - torch.log_softmax(logits, -1)
        assert float((teacher[rows] * log_ratio).sum(1).mean()) == pytest.approx(fit.validation_kl, rel=1e-3)
        same = logits.argmax(1) == teacher[rows].argmax(1)
        assert float(same.float().mean()) == pytest.approx(fit.validation_agreement, abs=1e-6)
    rows = torch.from_numpy(split.test)
    said = first.head(features["mean_max_std"][rows]).argmax(1)
    assert float((said == teacher[rows].argmax(1)).float().mean()) > 0.9


def test_a_seed_gives_the_same_head_and_leaves_the_callers_randomness_alone() -> None:
    features, teacher, split = lesson()
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    one, again, other = (
        fit_head(features, teacher, split, hidden=8, pooling="mean", steps=60, seed=seed)[0].head for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_a_feature_that_never_varies_has_no_say() -> None:
    features, teacher, split = lesson()
    told = features["mean_max_std"]
    flat = torch.cat([told, 1000 + 1e-4 * torch.rand(len(told), 1)], dim=1)
    head = fit_head({"mean": flat}, teacher, split, hidden=32, pooling="mean", steps=400)[0].head
    rows = flat[torch.from_numpy(split.test)]
    moved = rows.clone()
    moved[:, -1] = 990.0
    assert torch.equal(head(rows), head(moved)) and bool(torch.isfinite(head(rows)).all())
    assert float((head(rows).argmax(1) == teacher[torch.from_numpy(split.test)].argmax(1)).float().mean()) > 0.9
