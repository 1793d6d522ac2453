"""Something small and unsafe in a large image is judged as what it is, and nothing that was not judged is shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes.gate.gate import Gate
from runtimes.guard.fake_runner import FakeRunner
from runtimes.guard.judge import Guard
from runtimes.guard.policy import Limits, Policy
from runtimes.images.tiling import MOST_TILES, ViewMode, judged_pixels, shown, tiles_of
from runtimes.images.view_option import view_note
from runtimes.images.views import read_views
from safevlm.contract.manifest import Thresholds
from safevlm.contract.preprocessing import Preprocessing
from tests.runtimes.bundles import CLASSES, PREPROCESSING, SIZE, fitted, onnx_file
from tests.runtimes.gate.test_gate import SAFE, UNSURE, WEAPON, ByColour, FakeLanguage, ReadsRed
from tests.runtimes.gateway.servers import SUITE, bundle_of, draw

SCENES = {
    unsafe: [draw(each.scene) for each in SUITE.pictures if (each.scene.label > 0) == unsafe] for unsafe in (0, 1)
}
POLICY = Policy(guard=Limits(block=0.9, allow=0.1))
LARGE = (6 * SIZE, 5 * SIZE)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of("tiny-safegem", tmp_path_factory.mktemp("large") / "guard")


def pasted(scene: Image.Image, size: tuple[int, int], at: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, "white")
    canvas.paste(scene, at)
    return canvas


def places(size: tuple[int, int], scene: Image.Image, preprocessing: Preprocessing) -> Iterator[tuple[int, int]]:
    """Yield corners, edges, the centre, and across the borders of tiles."""
    right, bottom = size[0] - scene.width, size[1] - scene.height
    yield from ((0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, 0), (right // 2, bottom // 2))
    tiles = tiles_of(size, preprocessing)
    assert tiles is not None
    by = size[0] / tiles.size[0]
    for _, _, across, down in tiles.boxes[: MOST_TILES // 2]:
        at = (int(across * by) - scene.width // 2, int(down * by) - scene.height // 2)
        yield min(right, max(0, at[0])), min(bottom, max(0, at[1]))


def blocked(bundle: Path, images: Sequence[Image.Image], view: ViewMode) -> float:
    with Guard.open(bundle, threads=1, view=view) as guard:
        return float(np.mean([judgement.verdict == "block" for judgement in guard.judge(images)]))


@pytest.mark.parametrize(("factor", "aspect"), [(2, 1), (3, 1), (4, 1), (3, 2.5), (3, 0.4)])
def test_an_unsafe_scene_in_a_large_image_is_blocked(bundle: Path, factor: float, aspect: float) -> None:
    unsafe, safe = SCENES[1], SCENES[0]
    side = unsafe[0].width * factor
    size = max(unsafe[0].width, int(side * aspect**0.5)), max(unsafe[0].height, int(side / aspect**0.5))
    with Guard.open(bundle, threads=1) as guard:
        at = list(places(size, unsafe[0], guard.runner.preprocessing))
    images, others = ([pasted(scenes[k], size, each) for k, each in enumerate(at)] for scenes in (unsafe, safe))
    assert blocked(bundle, images, "tiles") >= 0.9
    assert blocked(bundle, images, "whole") < blocked(bundle, images, "tiles")
    assert blocked(bundle, others, "tiles") <= 0.3


def test_with_judged_the_language_model_sees_what_the_guard_saw(bundle: Path) -> None:
    image = pasted(SCENES[1][0], (700, 500), (0, 0))
    with Guard.open(bundle, threads=1, view="judged") as guard:
        size = guard.runner.preprocessing
        views = read_views(image, size, "it", mode="judged")
        assert views.image.size == (size.width, size.height) and len(views.pixels) == 1
        assert (np.asarray(views.image) == views.pixels[0]).all()
        seen, again = guard.judge([image, views.image])
    assert seen.probs == again.probs and seen.view_mode == "judged"


def red_corner(size: tuple[int, int] = LARGE, at: tuple[int, int] = (0, 0)) -> Image.Image:
    """Return a white image with a red square the size of a tile, which its whole is far from."""
    tiles = tiles_of(size, PREPROCESSING)
    assert tiles is not None
    side = tuple(int(frame * size[0] / tiles.size[0]) + 1 for frame in tiles.frame)
    return pasted(Image.new("RGB", side, "red"), size, at)  # type: ignore[arg-type]


def gate_of(guard: Any, language: Any, policy: Policy = POLICY, view: ViewMode = "tiles") -> Gate:
    return Gate(Guard(guard, CLASSES, view=view), language, policy, 600)


def test_a_tile_is_the_image_itself() -> None:
    with gate_of(ByColour(WEAPON), FakeLanguage()) as gate:
        result = gate.ask(red_corner(), "Why?")
    assert (result.verdict, result.stage, result.view) == ("block", "guard", "tile 1 of 9")
    assert result.reason == "the standalone guard blocks the image" and result.to_json()["view_mode"] == "tiles"
    with Guard(ByColour(WEAPON), CLASSES) as guard:
        judged = guard.judge([red_corner()])[0]
    assert (judged.verdict, judged.view) == ("block", "tile 1 of 9") and judged.to_json()["view_mode"] == "tiles"
    with gate_of(ByColour(WEAPON), FakeLanguage(), view="whole") as gate:
        assert gate.ask(red_corner(), "Why?").verdict == "allow"


def test_tiles_of_other_views_are_named_and_hidden() -> None:
    hiding = red_corner().convert("RGBA")
    hiding.putalpha(0)  # white to a viewer
    with gate_of(ByColour(WEAPON), FakeLanguage()) as gate:
        result = gate.ask(hiding, "Why?")
    assert result.view == "transparency ignored, tile 1 of 9" and "as other programs show it" in result.reason


@pytest.mark.parametrize(
    ("exact", "verdict", "view", "calls"),
    [
        (ReadsRed, "block", "tile 1 of 9", ["prefill"]),
        (FakeLanguage, "allow", "usual", ["prefill", "prefill", "generate"]),
        (partial(FakeLanguage, None), "block", "tile 1 of 9", []),
    ],
)
def test_an_unsure_tile_needs_an_exact_verdict_of_its_own(exact: Any, verdict: str, view: str, calls: Any) -> None:
    language = exact()
    with gate_of(ByColour(UNSURE), language) as gate:
        result = gate.ask(red_corner(), "Why?")
    assert (result.verdict, result.view, language.calls) == (verdict, view, calls), result.reason
    if verdict == "allow":
        whole = PREPROCESSING.apply(shown(red_corner(), PREPROCESSING, "tiles"))
        assert (language.pictures[-1] == whole).all(), "answered about the whole"


def test_a_language_model_of_another_size_settles_no_tile() -> None:
    for policy, verdict in ((POLICY, "block"), (POLICY.model_copy(update={"still_unsure": "allow"}), "allow")):
        language = FakeLanguage()
        language.preprocessing = PREPROCESSING.model_copy(update={"height": 24, "width": 24})
        with gate_of(ByColour(UNSURE), language, policy) as gate:
            result = gate.ask(red_corner(), "Why?")
        assert (result.verdict, result.error) == (verdict, None)
        assert language.calls == (["prefill", "generate"] if verdict == "allow" else [])


@pytest.mark.parametrize("view", ["tiles", "judged"])
def test_a_language_model_that_takes_any_size_is_shown_no_more_than_was_judged(view: ViewMode) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (333, 207, 3), np.uint8))
    language = FakeLanguage()
    language.preprocessing = None
    with gate_of(FakeRunner(PREPROCESSING, 3, probs=SAFE), language, view=view) as gate:
        assert gate.ask(image, "Why?").verdict == "allow"
    visible = shown(image, PREPROCESSING, view)
    assert visible.size != image.size and (language.pictures[-1] == np.asarray(visible)).all()


def test_views_have_tiles_once_and_say_whose_they_are() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 200, 4), np.uint8), "RGBA")
    views = read_views(image, PREPROCESSING, "it", mode="tiles")
    usual = list(judged_pixels(views.image, PREPROCESSING, "tiles"))
    assert views.own == len(usual) < len(views.pixels)
    for at, (name, pixels) in enumerate(usual):
        assert (views.pixels[at] == pixels).all() and views.names[at].endswith(name) and not views.is_hidden(at)
    assert views.names[1].startswith("on white, tile 1 of ") and views.is_hidden(views.own)
    plain = read_views(Image.new("RGB", LARGE, "red"), PREPROCESSING, "it", mode="tiles")
    assert len(plain.pixels) == 1 and plain.name(0) is None, "tiles with the same pixels are judged once"


def of_view(view: ViewMode, tmp_path: Path) -> Thresholds:
    return fitted(onnx_file(tmp_path), 0.9, 0.1, view=view)


def test_thresholds_of_another_view_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = of_view("whole", tmp_path).model_dump()
    del old["view"]
    assert Thresholds.model_validate(old).view == "whole", "of manifests from before there were tiles"
    for view, stated, told in (
        ("tiles", "whole", "miss no more than they promise, but may block more"),
        ("judged", "tiles", "may miss more than they promise"),
        ("whole", "whole", "shown in more detail than the guard sees"),
        ("tiles", "tiles", None),
        ("judged", "whole", None),
    ):
        caplog.clear()
        guard = Guard(FakeRunner(PREPROCESSING, 3), CLASSES, of_view(stated, tmp_path), view=view)  # type: ignore[arg-type]
        with caplog.at_level(logging.WARNING, "runtimes"), guard:
            assert len(caplog.messages) == (told is not None)
        assert told is None or told in caplog.text
    assert view_note("tiles", None) is None
