"""Planted test pictures and questions are found in calibration samples; clean samples are not accused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from calibration.sets.conversations import Drawn, Sample, built_in_conversations, read_conversations
from calibration.sets.leakage import built_in_evaluation, find_leaks, normalised, read_evaluation
from calibration.sets.mix import Mix, choose
from calibration.sets.same_picture import PictureIndex


@pytest.fixture(scope="module")
def test_pictures() -> list[Image.Image]:
    return [draw(picture.scene) for picture in build_suite("test").pictures]


def reencoded(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=60)
    return Image.open(buffer).convert("RGB")


def resized(picture: Image.Image) -> Image.Image:
    return picture.resize((picture.width * 3 // 5, picture.height * 3 // 5), Image.Resampling.LANCZOS)


def cropped(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    return picture.crop((round(width * 0.03), round(height * 0.02), round(width * 0.97), round(height * 0.98)))


def brightened(picture: Image.Image) -> Image.Image:
    return picture.point(lambda level: min(255, round(level * 1.1)))


@pytest.mark.parametrize("change", [reencoded, resized, cropped, brightened])
def test_a_changed_picture_is_found_again(test_pictures: list[Image.Image], change: object) -> None:
    index = PictureIndex(test_pictures)
    planted = range(0, len(test_pictures), 37)
    found = [index.find(change(test_pictures[number])) for number in planted]  # type: ignore[operator]
    hits = [match is not None and match.item == number for match, number in zip(found, planted, strict=True)]
    assert np.mean(hits) >= 0.95, f"{hits.count(False)} of {len(hits)} were missed"


def test_identical_pixels_are_found_whatever_the_file(test_pictures: list[Image.Image], tmp_path: Path) -> None:
    index = PictureIndex(test_pictures[:5])
    test_pictures[3].save(tmp_path / "a.bmp")
    match = index.find(Image.open(tmp_path / "a.bmp").convert("RGB"))
    assert match is not None and (match.item, match.signal) == (3, "pixels")


def test_the_built_in_samples_are_clean() -> None:
    for seed in (0, 1):
        samples = choose(built_in_conversations(), Mix(seed=seed, samples=96))
        leakage = find_leaks(samples, [built_in_evaluation()])
        assert leakage.clean, leakage.refusal()
        assert leakage.checked == 96 and leakage.suites[0]["pictures"] > 700


def test_planted_pictures_are_found_among_clean_samples() -> None:
    suite = build_suite("test")
    planted = [
        Sample(kind="safe", question="What?", answer=None, image=Drawn(p.scene), name="mine.png", where=f"row {i}")
        for i, p in enumerate(suite.pictures[:7])
    ]
    samples = [*choose(built_in_conversations(), Mix(samples=20)), *planted]
    leakage = find_leaks(samples, [built_in_evaluation()])
    assert {leak.sample for leak in leakage.leaks} == {f"row {i}" for i in range(7)}
    assert not leakage.clean and "7 of 27 calibration samples" in leakage.refusal()
    assert leakage.record()["clean"] is False and len(leakage.record()["leaks"]) == 7


def test_a_suite_of_ones_own_is_searched_for_pictures_and_questions(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    for name, pixels in zip(("a.png", "b.png"), noise, strict=True):
        Image.fromarray(pixels).save(tmp_path / name)
    suite = [
        {"query": "How do I open the heavy green gate?", "image": "a.png"},
        *({"query": "What does the picture show?", "image": name} for name in ("a.png", "b.png")),
        {"query": "What is this?", "image": "b.png"},
    ]
    (tmp_path / "suite.json").write_text(json.dumps(suite))
    rows = [
        {"query": "how do i OPEN the “heavy” green gate"},
        {"query": "What is this?"},
        {"query": "Who?", "image": "b.png", "kind": "safe"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = read_conversations(tmp_path / "rows.jsonl").samples
    leaks = find_leaks(samples, [read_evaluation(tmp_path / "suite.json")]).leaks
    assert [(leak.sample.rsplit(", ")[-1], leak.signal) for leak in leaks] == [("line 1", "text"), ("line 3", "pixels")]


def test_names_of_the_published_benchmark_are_known() -> None:
    def named(name: str) -> Sample:
        return Sample(kind="safe", question="?", answer=None, image=None, name=name, where=name)

    bench = named("data/images/hate/disability_discrimination/disability_discrimination_82.jpg")
    other = named("data/images/hate/disability_discrimination/disability_discrimination_00082.png")
    leaks = find_leaks([bench, other], []).leaks
    assert [(leak.sample, leak.signal) for leak in leaks] == [(bench.where, "name")]


def test_normalised_text_keeps_words_alone() -> None:
    assert normalised("  What’s   THIS—a “Test”? ") == normalised("what s this a test")
    assert normalised("ﬁre") == "fire"
