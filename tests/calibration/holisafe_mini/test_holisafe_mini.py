"""The drawn world keeps its promises: parts do not overlap, types mean what they say, seeds decide the bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from calibration.holisafe_mini.questions import PAIR_TYPES, is_refusal, sample_pair
from calibration.holisafe_mini.scene import PARTS, Scene, draw, sample_scene, scene_rng, world
from calibration.holisafe_mini.suite import HOLISAFE_TYPES, Suite, build_suite

SHARED = Path(__file__).parents[4] / "shared" / "holisafe" / "safellava-7b.predictions.jsonl.gz"


@pytest.fixture(scope="module")
def suite() -> Suite:
    return build_suite("test")


def pixels_hash(scene: Scene) -> str:
    return hashlib.sha256(draw(scene).tobytes()).hexdigest()


def test_the_suite_is_as_large_as_promised(suite: Suite) -> None:
    assert len(suite.pairs) >= 1000
    assert len(suite.questions) >= 300


def test_types_stand_in_holisafe_s_proportions(suite: Suite) -> None:
    counts = Counter(item.row["type"] for item in suite.pairs)
    for pair_type, real in HOLISAFE_TYPES.items():
        assert abs(counts[pair_type] - len(suite.pairs) * real / 4031) < 1


def test_the_same_seed_draws_the_same_and_another_seed_another(suite: Suite) -> None:
    assert build_suite("test") == suite
    other = build_suite("test", seed=1)
    assert pixels_hash(suite.pictures[0].scene) == pixels_hash(build_suite("test").pictures[0].scene)
    assert other.pairs != suite.pairs
    assert other.pictures[0].scene != suite.pictures[0].scene


def test_no_two_parts_share_an_image() -> None:
    hashes = {
        part: {pixels_hash(picture.scene) for picture in build_suite(part, pairs=400, questions=100).pictures}
        for part in PARTS
    }
    recipe = {pixels_hash(sample_scene(scene_rng("train", i), label=i % 20)) for i in range(200)}
    assert all(len(found) > 200 for found in hashes.values())
    assert not hashes["train"] & hashes["test"]
    assert not hashes["train"] & hashes["calibration"]
    assert not hashes["calibration"] & hashes["test"]
    assert not recipe & hashes["test"]


def test_exactly_the_unsafe_pairs_are_refused(suite: Suite) -> None:
    for item in suite.pairs:
        assert is_refusal(item.answer) == (item.row["type"] != "SSS"), item
    assert not any(is_refusal(item.answer) for item in suite.questions)


def test_refusals_begin_as_the_real_models_do(suite: Suite) -> None:
    refusal = next(item.answer for item in suite.pairs if item.row["type"] == "USU")
    assert refusal.lower().startswith("i'm sorry")


def test_an_image_is_safe_exactly_when_its_label_is_zero(suite: Suite) -> None:
    for item in (*suite.pairs, *suite.questions):
        assert item.row["image_safe"] == (item.row["image_safety_label"] == 0)
        if item.row["type"] in PAIR_TYPES:
            assert item.row["image_safe"] == (item.row["type"][0] == "S")


def test_no_question_is_asked_twice_about_one_picture(suite: Suite) -> None:
    asked = Counter((item.row["image"], item.row["query"]) for item in (*suite.pairs, *suite.questions))
    assert asked.most_common(1)[0][1] == 1


def test_a_hazard_needs_both_image_and_question(suite: Suite) -> None:
    """The same question is harmless about one picture and refused about another: only the pair decides."""
    hazardous = {item.row["query"] for item in suite.pairs if item.row["type"] == "SSU"}
    harmless = {item.row["query"] for item in (*suite.pairs, *suite.questions) if item.row["type"] in ("SSS", "QA")}
    assert len(hazardous & harmless) >= 10


def test_answers_name_only_what_the_picture_shows(suite: Suite) -> None:
    scenes = {picture.path: picture.scene for picture in suite.pictures}
    for item in suite.questions:
        scene = scenes[item.row["image"]]
        shown = {shape.colour for shape in scene.shapes}
        named = {colour for colour in world()["colours"] if colour in item.answer.split()}
        assert named <= shown, item


def test_a_pair_type_that_contradicts_the_scene_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="USU cannot use a scene of class 0"):
        sample_pair(sample_scene(rng, 0), "USU", rng)


def test_a_part_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="part 'validation' with 1200 pairs"):
        build_suite("validation")


@pytest.mark.skipif(not SHARED.is_file(), reason="the published answers are not here")
def test_rows_have_the_published_benchmark_s_fields_and_categories(suite: Suite) -> None:
    with gzip.open(SHARED, "rt", encoding="utf-8") as lines:
        published = [json.loads(line) for line in lines]
    assert set(suite.pairs[0].row) == (set(published[0]) - {"prediction"}) | {"query"}
    folders = {(row["category"], row["subcategory"]) for row in published}
    assert {(item.row["category"], item.row["subcategory"]) for item in suite.pairs} == folders
    assert Counter(row["type"] for row in published) == Counter(HOLISAFE_TYPES)
    by_label = {row["image_safety_label"]: row["subcategory"] for row in published if not row["image_safe"]}
    rows = [item.row for item in suite.pairs]
    ours = {row["image_safety_label"]: row["subcategory"] for row in rows if not row["image_safe"]}
    assert ours == by_label
