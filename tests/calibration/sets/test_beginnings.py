"""Rows begin in every way that is promised, end as their sample does, and are the same for the same seed."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest

from calibration.answers import Answer
from calibration.sets.beginnings import (
    LEAST,
    Beginning,
    Beginnings,
    Begun,
    Writer,
    beginnings_record,
    system_texts,
)
from calibration.sets.conversations import Sample, built_in_conversations
from calibration.sets.mix import Mix, choose
from calibration.streaming.batches import Row, lay_out
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.prompt_tokens import IMAGE
from safevlm.network.safe_vlm import SafeVLM

REFUSAL = "I'm sorry, but I can't assist with that request."
SYSTEMS = ("You count stamps.",)
PLENTY = 10_000


@cache
def loaded(name: str) -> SafeVLM:
    return load_safe_vlm(open_checkpoint(name))


@pytest.fixture(params=["tiny-safellava", "tiny-safeqwen", "tiny-safegem"])
def model(request: pytest.FixtureRequest) -> SafeVLM:
    return loaded(str(request.param))


@cache
def samples() -> tuple[Sample, ...]:
    return choose(built_in_conversations(), Mix(samples=10))


@cache
def answers() -> tuple[Answer, ...]:
    return tuple(Answer(text=REFUSAL if sample.kind == "unsafe" else "It is a red square.") for sample in samples())


def every(model: SafeVLM, kind: Beginning, limit: int = PLENTY) -> list[tuple[Begun, Begun]]:
    """Return each sample with its usual beginning and with another one, where it has that."""
    writer, rng = Writer(model, samples(), answers(), limit), np.random.default_rng(0)
    both = [(writer.usual(place), writer.otherwise(place, kind, SYSTEMS, rng)) for place in range(len(samples()))]
    return [(usual, other) for usual, other in both if other is not None]


def images(ids: tuple[int, ...]) -> int:
    return ids.count(IMAGE)


def text(model: SafeVLM, ids: tuple[int, ...]) -> str:
    return str(model.tokenizer.decode([token for token in ids if token != IMAGE]))


def test_another_system_text_stands_before_the_same_end(model: SafeVLM) -> None:
    found = every(model, "system")
    assert len(found) == len(samples())
    for usual, other in found:
        assert other.system == SYSTEMS[0] and SYSTEMS[0] in text(model, other.ids)
        assert model.family.chat.default_system not in text(model, other.ids) or not model.family.chat.default_system
        assert images(other.ids) == images(usual.ids)
        assert other.answer_length == usual.answer_length
        shared = other.answer_length + 4  # the question's last words are before the answer
        assert other.ids[-shared:] == usual.ids[-shared:]


def test_no_system_text_is_another_beginning_where_the_family_has_a_usual_one(model: SafeVLM) -> None:
    found, default = every(model, "none"), model.family.chat.default_system
    assert len(found) == (len(samples()) if default else 0)
    for usual, other in found:
        assert default in text(model, usual.ids) and default not in text(model, other.ids)
        assert len(other.ids) < len(usual.ids) and other.ids[-8:] == usual.ids[-8:]


def test_an_earlier_turn_is_another_sample_and_one_image_at_most_is_shown(model: SafeVLM) -> None:
    found, one = every(model, "turns"), images(tuple(model.prompt_ids("")))
    assert len(found) == len(samples())
    questions = [sample.question for sample in samples()]
    for usual, other in found:
        assert images(other.ids) in (0, one)
        assert (other.sample.image is None) == (images(other.ids) == 0), "the sample is the one that is shown"
        said = text(model, other.ids)
        assert sum(question in said for question in questions) >= 2 or Counter(questions).most_common(1)[0][1] > 1
        assert other.answer_length == usual.answer_length
        assert other.ids[-other.answer_length :] == usual.ids[-usual.answer_length :]
    assert {images(other.ids) for usual, other in found if not images(usual.ids)} <= {0, one}


def test_a_piece_is_the_end_of_a_row_and_never_begins_within_its_image(model: SafeVLM) -> None:
    one = images(tuple(model.prompt_ids("")))
    bos = model.tokenizer.bos_token_id
    always = bos is not None and model.tokenizer.encode("a")[0] == bos
    kept = set()
    for _ in range(3):
        for usual, piece in every(model, "piece"):
            raw = piece.ids[1:] if always else piece.ids
            assert not always or piece.ids[0] == bos
            assert usual.ids[-len(raw) :] == raw and LEAST <= len(raw) < len(usual.ids)
            assert images(piece.ids) in (0, images(usual.ids))
            kept.add((images(usual.ids), images(piece.ids)))
            assert 0 <= piece.answer_length < len(piece.ids), "something stands before each of the answer's tokens"
            assert piece.answer_length in (usual.answer_length, len(raw), len(raw) - 1)
    assert {(one, one), (one, 0), (0, 0)} >= kept and (one, 0) in kept


def rows(model: SafeVLM, share: float, seed: int = 0, max_length: int | None = None) -> list[Row]:
    return lay_out(model, samples(), answers(), max_length=max_length, beginnings=Beginnings(share=share), seed=seed)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_rows_begins_otherwise_and_the_seed_decides(model: SafeVLM, share: float) -> None:
    found = rows(model, share)
    record = beginnings_record(found, Beginnings(share=share))
    assert sum(count for kind, count in record["rows"].items() if kind != "usual") == round(share * len(samples()))
    assert found == rows(model, share)
    assert (found != rows(model, share, seed=1)) == (share > 0)
    assert [row.refused for row in found] == [answer.text == REFUSAL for answer in answers()]
    if share == 0:
        assert found == lay_out(model, samples(), answers())
    if share == 1:
        kinds = {"piece", "system", "turns"} | ({"none"} if model.family.chat.default_system else set())
        assert set(record["rows"]) == kinds and record["rows"]["piece"] >= 4
        assert sum(record["system_prompts"].values()) == record["rows"]["system"]
        assert set(record["system_prompts"]) <= set(system_texts("calibration"))


def test_no_row_is_longer_than_allowed_for_its_beginning(model: SafeVLM) -> None:
    longest = max(len(row.ids) for row in rows(model, 0.0))
    found = rows(model, 1.0, max_length=longest)
    assert max(len(row.ids) for row in found) <= longest
    assert all(row.beginning != "usual" for row in found), "another kind that fits is taken"


def test_the_guard_reads_images_behind_the_usual_prompt_alone() -> None:
    llava, gemma = (rows(loaded(name), 1.0) + rows(loaded(name), 0.0) for name in ("tiny-safellava", "tiny-safegem"))
    assert {row.judged for row in llava if row.beginning == "usual"} == {True, False}
    assert all(row.shows_image for row in llava if row.judged)
    assert not any(row.judged for row in llava if row.beginning in ("system", "none", "piece"))
    assert not any(row.judged for row in gemma), "its guard taps the projector"


def test_texts_for_measuring_are_not_calibrated_on() -> None:
    assert not set(system_texts("held_out")) & set(system_texts("calibration"))
    assert min(map(len, (system_texts("held_out"), system_texts("calibration")))) >= 4


@pytest.mark.parametrize("share", [1.01, -0.1, float("nan"), float("inf")])
def test_bad_shares_are_refused(share: float) -> None:
    with pytest.raises(InputError, match=r"--other-beginnings .* is not allowed. Give a share from 0 to 1"):
        Beginnings(share=share)
