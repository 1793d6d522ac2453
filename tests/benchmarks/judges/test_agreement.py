"""Agreement and quality equal counts made by hand, and labels are read without guessing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.judges.agreement import Agreement, Quality, agreement, judge_quality, read_labels
from safevlm.errors import InputError


def test_kappa_is_agreement_beyond_chance() -> None:
    # Cohen's table: 20 both yes, 15 both no, 5 and 10 apart: p_o 0.7, p_e 0.5
    first = [True] * 25 + [False] * 25
    other = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert agreement(first, other) == Agreement(kappa=pytest.approx(0.4), agreement=0.7, n=50)


def test_kappa_equals_its_definition_on_random_scores() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        first, other = rng.random(60) < 0.7, rng.random(60) < 0.4
        observed, one, two = (first == other).mean(), first.mean(), other.mean()
        chance = one * two + (1 - one) * (1 - two)
        found = agreement(first.tolist(), other.tolist())
        assert found.kappa == pytest.approx((observed - chance) / (1 - chance))
        assert found.agreement == pytest.approx(observed)


def test_only_rows_that_both_scored_count() -> None:
    found = agreement([True, None, False, True], [True, True, False, None])
    assert (found.n, found.agreement, found.kappa) == (2, 1.0, pytest.approx(1.0))


@pytest.mark.parametrize("scores", [[], [None], [True] * 5, [False] * 5])
def test_kappa_is_undefined_where_judges_cannot_disagree_by_chance(scores: list[bool | None]) -> None:
    found = agreement(scores, scores)
    assert found.kappa is None
    assert found.agreement == (1.0 if any(score is not None for score in scores) else None)


def test_constant_and_opposite_judges_have_kappa_0() -> None:
    assert agreement([True] * 4, [False] * 4) == Agreement(kappa=pytest.approx(0.0), agreement=0.0, n=4)


def test_scores_of_different_rows_are_refused() -> None:
    with pytest.raises(InputError, match="3 and 2 rows"):
        agreement([True] * 3, [True] * 2)


def test_quality_counts_bad_outcomes_as_positive() -> None:
    labels = {"a": False, "b": False, "c": False, "d": True, "e": True, "f": True, "g": True}
    scores = {"a": False, "b": True, "c": None, "d": True, "e": False, "f": True, "z": False}
    assert judge_quality(labels, scores) == Quality(
        true_positive=1, positive_labelled=2, true_negative=2, negative_labelled=3
    )


def labels(folder: Path, text: str) -> Path:
    path = folder / "labels.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_are_read(tmp_path: Path) -> None:
    path = labels(tmp_path, '{"id": "17", "ok": true}\n\n{"ok": false, "id": 18}\n')
    assert read_labels(path) == {"17": True, "18": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no label"),
        ('{"id": "1", "ok": true}\n{"id": 1, "ok": false}\n', "line 2: id '1' is already on line 1"),
        ('{"id": "1", "ok": true}\n{"id": "2"}\n', "line 2: ok: Field required"),
        ('{"id": "1", "ok": 1}\n', "line 1: ok: .*bool"),
        ('{"id": "1", "ok": null}\n', "line 1: ok: .*bool"),
        ('{"id": "1", "ok": true, "by": "me"}\n', "line 1: by: Extra"),
        ('{"id": "", "ok": true}\n', "line 1: id"),
        ('{"id": true, "ok": true}\n', "line 1: id"),
        ("1 yes\n", "line 1 is not valid JSON"),
        ("[1]\n", "row 1: the whole"),
    ],
)
def test_damaged_labels_are_refused_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_labels(labels(tmp_path, text))


def test_labels_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    with pytest.raises(InputError, match="cannot be read"):
        read_labels(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-16-LE text"):
        read_labels(path)
