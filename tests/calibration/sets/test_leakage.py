"""Planted test pictures and questions are found in calibration samples; clean samples are not accused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps

from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from calibration.sets.conversations import Drawn, Sample, built_in_conversations, read_conversations
from calibration.sets.leakage import built_in_evaluation, find_leaks, normalised, read_evaluation
from calibration.sets.mix import Mix, choose
from calibration.sets.same_picture import PictureIndex

Change = Callable[[Image.Image], Image.Image]


@pytest.fixture(scope="module")
def test_pictures() -> list[Image.Image]:
    return [draw(picture.scene) for picture in build_suite("test").pictures]


@pytest.fixture(scope="module")
def test_index(test_pictures: list[Image.Image]) -> PictureIndex:
    return PictureIndex(test_pictures)


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


def mirrored(picture: Image.Image) -> Image.Image:
    return ImageOps.mirror(picture)


def turned(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.ROTATE_270)


def mirrored_and_turned(picture: Image.Image) -> Image.Image:
    return reencoded(turned(mirrored(picture)))


def greyed(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def framed(picture: Image.Image) -> Image.Image:
    return reencoded(ImageOps.expand(picture, picture.width // 8, (20, 20, 20)))


def letterboxed_and_mirrored(picture: Image.Image) -> Image.Image:
    return ImageOps.mirror(ImageOps.pad(picture, (picture.width, picture.height * 3 // 2), color=(90, 10, 10)))


def written(picture: Image.Image) -> Image.Image:
    copy = picture.copy()
    font = ImageFont.load_default(picture.height // 12)
    ImageDraw.Draw(copy).text((8, picture.height * 0.8), "You will not believe it", font=font, fill="white")
    return copy


ANY_PICTURE = [reencoded, resized, cropped, brightened, mirrored, turned, mirrored_and_turned]
PHOTOGRAPHS = [*ANY_PICTURE, greyed, framed, letterboxed_and_mirrored, written]
SAID = {
    mirrored: "mirrored; ",
    turned: "turned 90° clockwise; ",
    mirrored_and_turned: "mirrored and turned 90° clockwise; ",
    framed: "with a border; ",
    letterboxed_and_mirrored: "mirrored, with a border; ",
    greyed: "near copy; ",
}


def photograph(seed: int) -> Image.Image:
    """Return smooth noise at three scales, 300 × 240."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize(
            (300, 240), Image.Resampling.BICUBIC
        )
        for cells in (4, 9, 25)
    ]
    return Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.3)


@pytest.mark.parametrize("change", ANY_PICTURE)
def test_a_changed_drawing_is_found_again(
    test_pictures: list[Image.Image], test_index: PictureIndex, change: Change
) -> None:
    planted = range(0, len(test_pictures), 37)
    found = [test_index.find(change(test_pictures[number])) for number in planted]
    hits = [match is not None and match.item == number for match, number in zip(found, planted, strict=True)]
    assert np.mean(hits) >= 0.95, f"{hits.count(False)} of {len(hits)} were missed"


@pytest.mark.parametrize("change", PHOTOGRAPHS)
def test_a_changed_photograph_is_found_again_and_the_change_is_named(change: Change) -> None:
    index = PictureIndex(photograph(seed) for seed in range(12))
    for number in range(0, 12, 3):
        match = index.find(change(photograph(number)))
        assert match is not None and (match.item, match.signal) == (number, "picture")
        assert match.detail.startswith(SAID.get(change, "")), match.detail


def test_other_photographs_and_parts_of_one_are_not_taken_for_copies() -> None:
    whole = photograph(0)
    tiles = [whole.crop((x, y, x + 100, y + 80)) for x in (0, 100, 200) for y in (0, 80, 160)]
    index = PictureIndex([*tiles, *(photograph(seed) for seed in range(1, 30))])
    assert [index.find(photograph(seed)) for seed in range(30, 50)] == [None] * 20
    for number, tile in enumerate(tiles):
        others = PictureIndex(other for place, other in enumerate(tiles) if place != number)
        assert others.find(tile) is None


def test_smooth_and_flat_pictures_are_not_taken_for_each_other() -> None:
    ramp = np.linspace(90, 160, 200)[None, :, None]
    skies = [
        Image.fromarray((ramp * tint + np.zeros((120, 1, 3))).astype(np.uint8))
        for tint in ((0.7, 0.9, 1.2), (1.3, 0.9, 0.6))
    ]
    index = PictureIndex([skies[0], Image.new("RGB", (200, 120), (40, 40, 40))])
    assert index.find(skies[1]) is None
    assert index.find(Image.new("RGB", (200, 120), (42, 40, 40))) is None


def test_pages_with_other_words_are_not_taken_for_each_other() -> None:
    rng = np.random.default_rng(0)

    def page() -> Image.Image:
        sheet = Image.new("RGB", (400, 520), "white")
        pen = ImageDraw.Draw(sheet)
        for line in range(24):
            words = " ".join("abcdefghij"[number : number + 5] for number in rng.integers(0, 7, 9))
            pen.text((30, 20 + 20 * line), words, font=ImageFont.load_default(14), fill="black")
        return sheet

    pages = [page() for _ in range(12)]
    assert [PictureIndex(pages[:6]).find(other) for other in pages[6:]] == [None] * 6
    copy = PictureIndex(pages).find(reencoded(resized(pages[3])))
    assert copy is not None and copy.item == 3


def test_an_empty_index_finds_nothing() -> None:
    assert PictureIndex([]).find(photograph(0)) is None


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
