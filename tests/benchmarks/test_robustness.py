"""The page of recall against strength says what the files did, and flatters nobody."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.robustness import main, measure_robustness, steps_of
from calibration.labelled.corruptions import KINDS
from calibration.labelled.labels import read_labels
from calibration.labelled.risk_control import Promise
from calibration.thresholds import fit_bundle
from runtimes.guard.bundle import open_bundle
from runtimes.guard.judge import Guard
from safevlm.errors import BundleError, InputError
from safevlm.images.image import open_image
from tests.runtimes.bundles import CLASSES, WEIGHTS, labelled_images, onnx_file, write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose second file sees less."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    return write_bundle(folder, onnx_file(folder, "guard.int8.onnx", "int8", weights=WEIGHTS / 3))


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    return labelled_images(tmp_path, 90)


def test_figures_are_what_judging_the_corrupted_images_gives(bundle: Path, labels: Path) -> None:
    read = read_labels(labels, CLASSES)
    fit_bundle(open_bundle(bundle), read, Promise(alpha=0.2, max_fpr=0.2))
    corruptions = steps_of("grey:0.3,grey:0.6")
    found = measure_robustness(open_bundle(bundle), read, corruptions)
    assert found.files == ("guard.fp32.onnx", "guard.int8.onnx") and found.seen_in_fitting
    assert len(found.points) == 2 * 3
    truth = np.array([image.label for image in read.images]) != 0
    for point in found.points:
        own = [each for each in corruptions if str(each) == point.name]
        shown = [own[0](open_image(image.path)) if own else open_image(image.path) for image in read.images]
        with Guard.open(bundle, precision=point.file.split(".")[1], threads=1) as guard:
            allowed = np.array([each.verdict == "allow" for each in guard.judge(shown)])
        assert (point.caught, point.stopped) == ((~allowed)[truth].sum(), (~allowed)[~truth].sum())
        low, high = point.recall_interval
        assert low <= point.recall <= high and (point.unsafe, point.safe) == (60, 30)
    for first, other in zip(found.points[::2], found.points[1::2], strict=True):
        assert first.lost == first.gained == 0
        assert other.caught == first.caught - other.lost + other.gained


@pytest.mark.parametrize(
    ("promise", "sure"),
    [
        (Promise(alpha=0.2, max_fpr=0.2), "on average"),
        (Promise(alpha=0.2, max_fpr=0.2, method="learn_then_test", delta=0.1), "with probability 0.9"),
    ],
)
def test_the_promise_is_stated_as_it_was_made(bundle: Path, labels: Path, promise: Promise, sure: str) -> None:
    read = read_labels(labels, CLASSES)
    fit_bundle(open_bundle(bundle), read, promise, view="tiles")
    for view in ("tiles", "whole"):
        found = measure_robustness(open_bundle(bundle), read, (), view=view)
        for stated in found.promises.values():
            assert stated.startswith(f"{sure} at most 20.00% of unsafe images allowed as they are")
            assert ("not for these figures" in stated) == (view == "whole")


def test_the_page_lies_in_the_bundle_which_still_opens(bundle: Path, labels: Path) -> None:
    done = CliRunner().invoke(
        main, ["--bundle", str(bundle), "--labels", str(labels), "--under", "jpeg:50,grey"], catch_exceptions=False
    )
    assert done.exit_code == 0 and "grey:0.25" in done.stdout
    page = (bundle / "robustness.html").read_text()
    stated = json.loads((bundle / "robustness.json").read_text())
    assert page.count("<svg") == 2 and "no thresholds were fitted" in page and "Flattered" not in page
    assert len(stated["points"]) == 2 * (1 + 1 + len(KINDS["grey"].steps))
    for point in stated["points"]:
        assert f"{100 * point['recall']:.2f}" in page
    assert open_bundle(bundle).digest == stated["manifest_sha256"]


def test_a_file_that_catches_less_is_named(bundle: Path, labels: Path) -> None:
    write_bundle(bundle, onnx_file(bundle, "guard.int8.onnx", "int8", weights=-WEIGHTS))
    CliRunner().invoke(
        main, ["--bundle", str(bundle), "--labels", str(labels), "--under", "jpeg:50"], catch_exceptions=False
    )
    page = (bundle / "robustness.html").read_text()
    assert "guard.int8.onnx catches fewer unsafe images than guard.fp32.onnx under jpeg:50" in page


def test_bad_input_is_refused_and_nothing_is_written(bundle: Path, labels: Path) -> None:
    given = ["--bundle", str(bundle), "--labels", str(labels)]
    for more, told in ((["--under", "rain"], "unknown corruption"), (["--precision", "int3"], "has fp32, int8")):
        done = CliRunner().invoke(main, [*given, *more])
        assert isinstance(done.exception, (InputError, BundleError)) and told in str(done.exception)
    safe = labels.with_name("safe.jsonl")
    safe.write_text(json.dumps({"image": "0.png", "label": 0}))
    done = CliRunner().invoke(main, ["--bundle", str(bundle), "--labels", str(safe), "--under", "jpeg"])
    assert isinstance(done.exception, InputError) and "Give both safe and unsafe ones" in str(done.exception)
    assert not (bundle / "robustness.html").exists()


def test_without_a_strength_all_steps_of_a_kind_are_measured() -> None:
    assert len(steps_of("all")) == sum(len(kind.steps) for kind in KINDS.values())
    assert [str(each) for each in steps_of("grey,jpeg:33")] == [
        "grey:0.25",
        "grey:0.5",
        "grey:0.75",
        "grey:1",
        "jpeg:33",
    ]
