"""A guard judges whatever it is given, in order, and one bad file never hides another's verdict."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtimes.guard.fake_runner import FakeRunner
from runtimes.guard.judge import Guard, ImageSource
from runtimes.guard.runner import GuardOutput
from safevlm.errors import BundleError, SafeVLMError
from tests.runtimes.bundles import BLUE, CLASSES, GREEN, PREPROCESSING, RED, fitted, onnx_file, picture, write_bundle
from tests.runtimes.guard.hanging_runners import busy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def test_every_kind_of_source_is_judged_in_order(folder: Path, tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (30, 8), BLUE).save(stream, "PNG")
    red = picture(tmp_path / "red.png", RED)
    sources: list[ImageSource] = [
        red,
        str(red),
        stream.getvalue(),
        Image.new("RGBA", (9, 9), (0, 255, 0, 255)),
    ]
    with Guard.open(folder, threads=1, batch=3) as guard:
        judgements = guard.judge(sources)
    assert [j.file for j in judgements] == [str(red), str(red), "image 3", "image 4"]
    assert [j.label for j in judgements] == ["weapon", "weapon", "drug", "safe"]
    assert [j.verdict for j in judgements] == ["block", "block", "block", "allow"]
    for judgement in judgements:
        assert set(judgement.probs) == set(CLASSES) and sum(judgement.probs.values()) == pytest.approx(1, abs=1e-5)
        assert judgement.p_unsafe == pytest.approx(1 - judgement.probs["safe"], abs=1e-6)


def test_unreadable_images_are_errors_and_never_stop_the_rest(folder: Path, tmp_path: Path) -> None:
    good = picture(tmp_path / "good.png", GREEN)
    cut = tmp_path / "cut.jpg"
    picture(cut, RED, (300, 300))
    cut.write_bytes(cut.read_bytes()[:700])
    animated = tmp_path / "moving.gif"
    Image.new("RGB", (8, 8), RED).save(animated, save_all=True, append_images=[Image.new("RGB", (8, 8), GREEN)])
    empty = tmp_path / "empty.png"
    empty.touch()
    files = [cut, good, animated, empty, tmp_path / "none.png", good]
    with Guard.open(folder, threads=1, batch=2) as guard:
        judgements = guard.judge(files)
    assert [j.verdict for j in judgements] == ["error", "allow", "error", "error", "error", "allow"]
    for judgement, reason in zip(judgements, ["decoded", None, "animated", "empty", "no such file", None], strict=True):
        if reason is None:
            assert judgement.error is None and judgement.label == "safe"
        else:
            assert reason in (judgement.error or "") and judgement.file in (judgement.error or "")
            assert judgement.label is None and judgement.p_unsafe is None and not judgement.probs


def test_odd_pictures_are_judged_by_what_a_viewer_shows(folder: Path) -> None:
    sources = [
        Image.new("CMYK", (20, 20), (0, 255, 255, 0)),
        Image.new("L", (20, 20), 0),
        Image.new("P", (20, 20), 0),
        Image.new("1", (3, 3)),
        Image.fromarray(np.full((20, 20), 40_000, np.uint16)),
    ]
    with Guard.open(folder, threads=1) as guard:
        judgements = guard.judge(sources)
    assert judgements[0].label == "weapon"
    assert all(judgement.verdict != "error" for judgement in judgements)


def hiding(colour: tuple[int, int, int]) -> Image.Image:
    """Return an image that is white to a viewer, and a colour to a reader that drops alpha."""
    return Image.new("RGBA", (9, 9), (*colour, 0))


def test_the_worst_view_of_an_image_counts(folder: Path) -> None:
    images = [hiding(RED), Image.new("RGB", (9, 9), GREEN), hiding(GREEN)]
    for batch in (1, 2, 20):
        with Guard.open(folder, threads=1, batch=batch) as guard:
            red, plain, green = guard.judge(images)
        assert (red.verdict, red.view, red.label) == ("block", "transparency ignored", "weapon")
        assert (plain.verdict, plain.view, plain.views) == ("allow", None, ())
        assert green.view != "transparency ignored", "its other views are worse"
        assert len(red.views) == len(green.views) == 4


def test_a_view_that_cannot_be_judged_is_an_error_unless_another_blocks() -> None:
    black, red = hiding((0, 0, 0)), Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    with Guard(Picky(PREPROCESSING, 3, probs=[0.9, 0.1, 0]), CLASSES) as guard:
        assert [j.verdict for j in guard.judge([black, red])] == ["error", "allow"]
    with Guard(Picky(PREPROCESSING, 3, probs=[0.1, 0.9, 0]), CLASSES) as guard:
        assert [j.verdict for j in guard.judge([black])] == ["block"]


def test_batches_change_no_answer(folder: Path) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(7)]
    answers = []
    for batch in (1, 3, 7, 20):
        with Guard.open(folder, threads=1, batch=batch) as guard:
            answers.append(np.array([judgement.p_unsafe for judgement in guard.judge(images)], np.float64))
    assert all(np.allclose(answer, answers[0], atol=1e-6) for answer in answers)
    with Guard.open(folder, threads=1) as guard:
        assert guard.judge([]) == []


class Picky(FakeRunner):
    """Fail on a batch that holds a black picture."""

    def _run(self, rgb: np.ndarray) -> GuardOutput:  # type: ignore[type-arg]
        if (rgb == 0).all(axis=(1, 2, 3)).any():
            raise SafeVLMError("no number for a black picture")
        return super()._run(rgb)


def test_a_picture_the_runner_fails_on_is_an_error_alone() -> None:
    images = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black", "red")]
    with Guard(Picky(PREPROCESSING, 3, probs=[0.9, 0.1, 0]), CLASSES) as guard:
        judgements = guard.judge(images)
    assert [j.verdict for j in judgements] == ["allow", "error", "allow"]
    assert judgements[1].error == "no number for a black picture"


def test_a_bug_is_not_taken_for_a_bad_picture() -> None:
    with (
        Guard(FakeRunner(PREPROCESSING, 3, failure=ZeroDivisionError()), CLASSES) as guard,
        pytest.raises(ZeroDivisionError),
    ):
        guard.judge([Image.new("RGB", (4, 4))])


def test_fitted_thresholds_of_the_bundle_are_used(tmp_path: Path) -> None:
    thresholds = (fitted(onnx_file(tmp_path), block=0.99999, allow=0.1),)
    folder = write_bundle(tmp_path, thresholds=thresholds)
    grey = Image.new("RGB", (8, 8), (128, 128, 128))
    with Guard.open(folder, threads=1) as guard:
        assert guard.judge([grey])[0].verdict == "unsure"


def test_stream_judges_a_batch_at_a_time() -> None:
    runner = FakeRunner(PREPROCESSING, 3)
    with Guard(runner, CLASSES, batch=2) as guard:
        judgements = guard.stream([Image.new("RGB", (4, 4))] * 5)
        next(judgements)
        assert runner.judged == 2


def test_opening_refuses_an_altered_bundle(folder: Path) -> None:
    path = folder / "guard.fp32.onnx"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(BundleError, match="was altered"):
        Guard.open(folder)


def test_a_busy_runner_judges_nothing_and_check_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every image is an error, which no exit code of 0 stands for."""
    from runtimes import check
    from safevlm.terminal.commandline import run

    runner = FakeRunner(PREPROCESSING, 3, probs=[1, 0, 0])
    monkeypatch.setattr("runtimes.guard.judge.select_runner", lambda *_, **__: runner)
    images = [str(picture(tmp_path / f"{number}.png", GREEN)) for number in range(3)]
    with runner, busy(runner), pytest.raises(SystemExit) as end:
        run(check.main, [str(folder), *images])
    shown = capsys.readouterr()
    assert end.value.code == 2 and "allow" not in shown.out
    assert shown.err.count("FakeRunner is busy with an earlier call") == 3
