"""Thresholds are fitted for every file by its own answers, written into the manifest, and used by that file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from calibration.labelled.corruptions import parse_corruptions
from calibration.labelled.judged_images import BATCH
from calibration.labelled.labels import read_labels
from calibration.labelled.risk_control import Promise
from calibration.thresholds import _notes, fit_bundle, main
from runtimes.guard.bundle import open_bundle
from runtimes.guard.judge import Guard
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.openvino_runner import OpenVinoRunner
from runtimes.guard.runner import GuardOutput
from safevlm.contract.manifest import Manifest
from safevlm.errors import BundleError, InputError
from safevlm.images.image import open_image
from tests.runtimes.bundles import CLASSES, WEIGHTS, engine_file, fitted, labelled_images, onnx_file, write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose fp16 file is more timid than its fp32 file."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    return write_bundle(folder, onnx_file(folder, "guard.fp16.onnx", "fp16", weights=WEIGHTS / 3))


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    return labelled_images(tmp_path, 120)


def test_each_file_gets_its_own_and_keeps_its_promise_on_what_it_saw(bundle: Path, labels: Path) -> None:
    fit_bundle(open_bundle(bundle), read_labels(labels, CLASSES), Promise(alpha=0.1, max_fpr=0.1))
    manifest = open_bundle(bundle).manifest
    fp32, fp16 = (manifest.thresholds_of(f"guard.{precision}.onnx") for precision in ("fp32", "fp16"))
    assert fp32 is not None and fp16 is not None
    assert fp32.pooled != fp16.pooled
    for entry in (fp32, fp16):
        assert entry.n == 120 and entry.n_unsafe == 80 and entry.provider == "CPUExecutionProvider"
        assert entry.miss_rate <= 0.1 and entry.fpr <= 0.1


def test_files_are_asked_on_the_runtime_that_will_run_them(
    bundle: Path, labels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    infer = OpenVinoRunner.infer

    def counted(self: OpenVinoRunner, rgb: NDArray[np.uint8], **options: bool) -> GuardOutput:
        asked.append(self.file.path)
        return infer(self, rgb, **options)

    monkeypatch.setattr(OpenVinoRunner, "infer", counted)
    promise = Promise(alpha=0.1, max_fpr=0.1)
    fit_bundle(open_bundle(bundle), read_labels(labels, CLASSES), promise, precisions=["fp32"], runtime="openvino")
    assert set(asked) == {"guard.fp32.onnx"}
    on_openvino = open_bundle(bundle).manifest.thresholds_of("guard.fp32.onnx")
    assert on_openvino is not None and on_openvino.provider == "openvino"
    fit_bundle(open_bundle(bundle), read_labels(labels, CLASSES), promise, precisions=["fp32"])
    on_onnxruntime = open_bundle(bundle).manifest.thresholds_of("guard.fp32.onnx")
    assert on_openvino is not None and on_onnxruntime is not None
    assert on_openvino.pooled.block == pytest.approx(on_onnxruntime.pooled.block, abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_judging_uses_the_thresholds_of_the_file_that_runs(bundle: Path, labels: Path, precision: str) -> None:
    read = read_labels(labels, CLASSES)
    fit_bundle(open_bundle(bundle), read, Promise(alpha=0.1, max_fpr=0.1))
    entry = open_bundle(bundle).manifest.thresholds_of(f"guard.{precision}.onnx")
    assert entry is not None
    with Guard.open(bundle, precision=precision) as guard:
        judged = guard.judge(image.path for image in read.images)
    verdicts = [(judgement.verdict, image.label) for judgement, image in zip(judged, read.images, strict=True)]
    missed = sum(verdict == "allow" for verdict, label in verdicts if label)
    blocked = sum(verdict == "block" for verdict, label in verdicts if not label)
    unsure = sum(verdict == "unsure" for verdict, _ in verdicts)
    assert (missed / 80, blocked / 40, unsure / 120) == pytest.approx((entry.miss_rate, entry.fpr, entry.unsure_rate))


def test_the_command_prints_a_table_and_says_what_it_left_out(bundle: Path, labels: Path) -> None:
    contradiction = json.dumps({"image": "0.png", "label": 1})
    labels.write_text(labels.read_text() + "\n" + contradiction)
    done = CliRunner().invoke(main, ["--bundle", str(bundle), "--labels", str(labels), "--alpha", "0.1"])
    assert done.exit_code == 0, done.output
    assert "contradictory labels, left out" in done.stderr and "0.png" in done.stderr
    assert "guard.fp16.onnx" in done.stdout and "119" in done.stdout


def test_the_command_gives_json_with_misses_by_true_class(bundle: Path, labels: Path) -> None:
    arguments = ["--bundle", str(bundle), "--labels", str(labels), "--alpha", "0.1", "--pooled", "--json"]
    stated = json.loads(CliRunner().invoke(main, arguments).stdout)
    assert {entry["file"] for entry in stated["thresholds"]} == {"guard.fp32.onnx", "guard.fp16.onnx"}
    assert all(not entry["per_class"] for entry in stated["thresholds"])
    rows = stated["by_class"]["guard.fp32.onnx"]
    assert set(rows) == {"weapon", "drug"} and sum(row["n"] for row in rows.values()) == 80
    missed = sum(row["n"] * row["missed"] for row in rows.values()) / 80
    assert missed == pytest.approx(stated["thresholds"][0]["miss_rate"])


def test_one_precision_is_fitted_alone_and_the_other_keeps_its_own(bundle: Path, labels: Path) -> None:
    arguments = ["--bundle", str(bundle), "--labels", str(labels), "--alpha", "0.1"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    before = open_bundle(bundle).manifest
    assert CliRunner().invoke(main, [*arguments, "--alpha", "0.2", "--precision", "fp16"]).exit_code == 0
    after = open_bundle(bundle).manifest
    assert after.thresholds_of("guard.fp32.onnx") == before.thresholds_of("guard.fp32.onnx")
    changed = after.thresholds_of("guard.fp16.onnx")
    assert changed is not None and changed.alpha == 0.2
    with pytest.raises(BundleError, match=r"--precision int3: .* has fp16, fp32"):
        fit_bundle(open_bundle(bundle), read_labels(labels, CLASSES), precisions=["int3"])


def test_an_engine_that_does_not_run_here_is_named_and_keeps_its_thresholds(tmp_path: Path, labels: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    engine = engine_file(folder)
    kept = fitted(engine, 0.7, 0.2)
    write_bundle(folder, engine, thresholds=(kept,))
    done = CliRunner().invoke(main, ["--bundle", str(folder), "--labels", str(labels), "--alpha", "0.1"])
    assert done.exit_code == 0, done.output
    assert f"{engine.path} was not fitted" in done.stderr and "python -m calibration.thresholds" in done.stderr
    manifest = open_bundle(folder).manifest
    assert manifest.thresholds_of(engine.path) == kept
    assert manifest.thresholds_of("guard.fp32.onnx") is not None


def test_images_are_judged_a_batch_at_a_time(bundle: Path, labels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SafeGem's 896 x 896 pictures are 2.4 MB each: 1,800 of them must not be held at once."""
    opened, most = [0], [0]
    honest = OnnxRuntimeRunner.infer

    def counted(path: Path) -> Image.Image:
        opened[0] += 1
        most[0] = max(most[0], opened[0])
        return open_image(path)

    def infer(self: OnnxRuntimeRunner, rgb: NDArray[np.uint8]) -> GuardOutput:
        opened[0] -= len(rgb)
        return honest(self, rgb)

    monkeypatch.setattr("calibration.labelled.judged_images.open_image", counted)
    monkeypatch.setattr(OnnxRuntimeRunner, "infer", infer)
    fit_bundle(open_bundle(bundle), read_labels(labels, CLASSES), Promise(alpha=0.1))
    assert opened == [0] and most[0] <= BATCH


def test_what_was_added_to_the_bundle_meanwhile_stays(bundle: Path, labels: Path) -> None:
    opened = open_bundle(bundle)
    engine = engine_file(bundle)
    manifest = opened.manifest
    manifest.model_copy(update={"files": (*manifest.files, engine)}).write(bundle)
    fit_bundle(opened, read_labels(labels, CLASSES), Promise(alpha=0.1))
    assert engine in open_bundle(bundle).manifest.files


def test_thresholds_do_not_outlive_the_file_they_were_fitted_on(bundle: Path, labels: Path) -> None:
    fit_bundle(open_bundle(bundle), read_labels(labels, CLASSES), Promise(alpha=0.1))
    other = onnx_file(bundle, weights=WEIGHTS * 2)
    stated = json.loads((bundle / "manifest.json").read_text())
    stated["files"][0] = other.model_dump(mode="json")
    (bundle / "manifest.json").write_text(json.dumps(stated))
    with pytest.raises(BundleError, match=r"guard\.fp32\.onnx were fitted on a different version"):
        Guard.open(bundle)


def test_thresholds_of_another_file_are_refused(bundle: Path, labels: Path) -> None:
    fit_bundle(open_bundle(bundle), read_labels(labels, CLASSES), Promise(alpha=0.1, max_fpr=0.1))
    stated = json.loads((bundle / "manifest.json").read_text())
    stated["thresholds"][0]["file_sha256"] = "0" * 64
    with pytest.raises(BundleError, match=r"fitted on a different version.*calibration\.thresholds"):
        Manifest.from_bytes(json.dumps(stated).encode(), where="manifest.json")


def test_a_bundle_that_does_not_stand_alone_is_refused(bundle: Path, labels: Path) -> None:
    stated = json.loads((bundle / "manifest.json").read_text())
    stated["source"]["standalone"] = False
    (bundle / "manifest.json").write_text(json.dumps(stated))
    with pytest.raises(BundleError, match=r"standalone: false.*--images DIR"):
        fit_bundle(open_bundle(bundle), read_labels(labels, CLASSES))


def test_random_weights_get_no_thresholds(bundle: Path, labels: Path) -> None:
    stated = json.loads((bundle / "manifest.json").read_text())
    stated["source"]["random_weights"] = True
    (bundle / "manifest.json").write_text(json.dumps(stated))
    before = (bundle / "manifest.json").read_bytes()
    done = CliRunner().invoke(main, ["--bundle", str(bundle), "--labels", str(labels), "--alpha", "0.1"])
    assert isinstance(done.exception, InputError) and "random weights" in str(done.exception)
    assert (bundle / "manifest.json").read_bytes() == before


def test_unreadable_images_above_one_in_a_hundred_are_fatal(bundle: Path, labels: Path) -> None:
    (labels.parent / "7.png").write_bytes(b"not a picture")
    read = read_labels(labels, CLASSES)
    done = fit_bundle(open_bundle(bundle), read, Promise(alpha=0.1, max_fpr=0.1))
    assert [Path(name).name for name in done.unreadable] == ["7.png"]
    (labels.parent / "8.png").write_bytes(b"not a picture either")
    with pytest.raises(InputError, match="2 of 120 images cannot be read"):
        fit_bundle(open_bundle(bundle), read_labels(labels, CLASSES), Promise(alpha=0.1, max_fpr=0.1))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Labels of 240 large images: a red or blue square in some corner of a green ground, or a square of green."""
    folder = tmp_path / "large"
    folder.mkdir()
    rng = np.random.default_rng(1)
    rows = []
    for number in range(240):
        label = number % 3
        colour = rng.integers(0, 160, size=3)
        colour[{0: 1, 1: 0, 2: 2}[label]] += 80
        image = Image.new("RGB", (80, 80), (100, 180, 100))
        image.paste(Image.new("RGB", (40, 40), tuple(map(int, colour))), tuple(map(int, rng.integers(0, 40, 2))))
        image.save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": CLASSES[label]})
    path = folder / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_thresholds_are_fitted_for_a_view_and_promise_the_same_for_it(bundle: Path, large: Path) -> None:
    read, promise = read_labels(large, CLASSES), Promise(alpha=0.1, max_fpr=0.1)
    truth = np.array([image.label for image in read.images]) != 0
    for view in ("whole", "tiles", "judged"):
        done = fit_bundle(open_bundle(bundle), read, promise, precisions=["fp32"], view=view)
        entry = done.manifest.thresholds_of("guard.fp32.onnx")
        assert entry is not None and entry.view == view
        assert entry.miss_rate <= 0.1 and entry.fpr <= 0.1
        with Guard.open(bundle, threads=1, view=view) as guard:
            verdicts = np.array([each.verdict for each in guard.judge([image.path for image in read.images])])
        assert (verdicts[truth] == "allow").mean() == pytest.approx(entry.miss_rate), "as judging counts it"
        assert (verdicts[~truth] == "block").mean() == pytest.approx(entry.fpr)
        assert (list(done.tile_cost) == ["guard.fp32.onnx"]) == (view == "tiles")
    with Guard.open(bundle, threads=1, view="tiles") as guard:  # now fitted for the image as judged: never less recall
        blocks = np.array([each.verdict != "allow" for each in guard.judge([image.path for image in read.images])])
    assert (~blocks[truth]).mean() <= entry.miss_rate


def test_the_command_says_what_tiles_cost(bundle: Path, large: Path) -> None:
    arguments = ["--bundle", str(bundle), "--labels", str(large), "--alpha", "0.1", "--max-fpr", "0.1", "--json"]
    done = CliRunner().invoke(main, [*arguments, "--precision", "fp32"], catch_exceptions=False)
    assert done.exit_code == 0
    cost = json.loads(done.stdout)["tile_cost"]["guard.fp32.onnx"]
    assert cost["tiled"] == 240 and cost["fpr_limits_of_whole"] >= cost["fpr_whole"]
    assert "240 images were also judged in tiles. Safe images blocked: " in done.stderr
    assert "one band for all classes" in done.stderr
    (entry,) = json.loads(done.stdout)["thresholds"]
    assert entry["view"] == "tiles" and entry["per_class"] == {}


UNDER = parse_corruptions("jpeg:30,noise:40,grey:0.5")


def test_the_promise_on_misses_is_kept_under_the_corruptions_that_the_manifest_states(
    bundle: Path, labels: Path
) -> None:
    read, promise = read_labels(labels, CLASSES), Promise(alpha=0.1, max_fpr=0.1)
    alone = fit_bundle(open_bundle(bundle), read, promise, per_class=False).manifest
    fitted_under = fit_bundle(open_bundle(bundle), read, promise, per_class=False, under=UNDER).manifest
    for before, after in zip(alone.thresholds or (), fitted_under.thresholds or (), strict=True):
        assert before.under == () and [each.corruption for each in after.under] == ["jpeg:30", "noise:40", "grey:0.5"]
        assert after.pooled.allow <= before.pooled.allow
    truth = np.array([image.label for image in read.images]) != 0
    for entry in fitted_under.thresholds or ():
        with Guard.open(bundle, precision=entry.file.split(".")[1], threads=1) as guard:
            for corruption, stated in zip(UNDER, entry.under, strict=True):
                judged = guard.judge([corruption(open_image(image.path)) for image in read.images])
                allowed = np.array([each.verdict == "allow" for each in judged])
                assert allowed[truth].mean() == pytest.approx(stated.miss_rate) and stated.miss_rate <= 0.1
                blocked = np.array([each.verdict == "block" for each in judged])
                assert blocked[~truth].mean() == pytest.approx(stated.fpr)


def test_the_command_shows_each_corruption(bundle: Path, labels: Path) -> None:
    arguments = ["--bundle", str(bundle), "--labels", str(labels), "--alpha", "0.1", "--under", "grey , blur:3"]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout.count("under grey:1") == done.stdout.count("under blur:3") == 2


def test_what_a_corruption_costs_and_limits_that_allow_nothing_are_said(bundle: Path, labels: Path) -> None:
    read = read_labels(labels, CLASSES)
    done = fit_bundle(open_bundle(bundle), read, Promise(alpha=0.1, max_fpr=0.1), precisions=["fp32"], under=UNDER)
    assert not list(_notes(read, done, bundle, per_class=True))
    (entry,) = done.manifest.thresholds or ()
    costly = entry.model_copy(
        update={
            "under": (entry.under[0], entry.under[1].model_copy(update={"fpr": 0.5})),
            "pooled": entry.pooled.model_copy(update={"allow": 0.0}),
        }
    )
    manifest = done.manifest.model_copy(update={"thresholds": (costly,)})
    notes = "\n".join(_notes(read, replace(done, manifest=manifest), bundle, per_class=True))
    assert "safe images blocked: 50.00% under noise:40. --max-fpr 0.1 is promised for images as they are" in notes
    assert "(all): the promise is kept only by allowing nothing" in notes


@pytest.mark.parametrize("method", ["conformal_risk_control", "learn_then_test"])
def test_a_promise_that_cannot_be_kept_is_refused_before_any_image_is_judged(
    bundle: Path, labels: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(OnnxRuntimeRunner, "_activate", lambda self: pytest.fail("the guard was opened"))
    before = (bundle / "manifest.json").read_bytes()
    arguments = ["--bundle", str(bundle), "--labels", str(labels), "--alpha", "0.01", "--method", method]
    done = CliRunner().invoke(main, [*arguments, "--under", "jpeg,blur"])
    assert isinstance(done.exception, InputError)
    needed = {"conformal_risk_control": 99, "learn_then_test": 230}[method]
    assert "No promise can be kept under jpeg:50, blur:1.5: 80 unsafe images are too few" in str(done.exception)
    assert f"at least {needed} are needed" in str(done.exception)
    assert (bundle / "manifest.json").read_bytes() == before


def test_an_unknown_corruption_is_refused_and_nothing_is_written(bundle: Path, labels: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    for under, told in (("jpg", "unknown corruption"), ("jpeg:500", "must be a whole number from 5 to 95")):
        done = CliRunner().invoke(main, ["--bundle", str(bundle), "--labels", str(labels), "--under", under])
        assert isinstance(done.exception, InputError) and told in str(done.exception)
    assert (bundle / "manifest.json").read_bytes() == before


def test_thresholds_from_before_there_were_corruptions_are_read(bundle: Path, labels: Path) -> None:
    fit_bundle(open_bundle(bundle), read_labels(labels, CLASSES), Promise(alpha=0.1), under=UNDER)
    stated = json.loads((bundle / "manifest.json").read_text())
    for entry in stated["thresholds"]:
        entry.pop("under")
    manifest = Manifest.from_bytes(json.dumps(stated).encode(), where="manifest.json")
    assert [entry.under for entry in manifest.thresholds or ()] == [(), ()]


@pytest.mark.parametrize("change", [{"miss_rate": 0.5}, {"corruption": "noise:40"}])
def test_a_manifest_whose_promise_under_a_corruption_is_broken_or_repeated_is_refused(
    bundle: Path, labels: Path, change: dict[str, object]
) -> None:
    fit_bundle(open_bundle(bundle), read_labels(labels, CLASSES), Promise(alpha=0.1), under=UNDER)
    stated = json.loads((bundle / "manifest.json").read_text())
    stated["thresholds"][0]["under"][0] |= change
    with pytest.raises(BundleError, match=r"under jpeg:30 breaks the promise|a name appears twice: noise:40"):
        Manifest.from_bytes(json.dumps(stated).encode(), where="manifest.json")


def test_classes_that_are_not_certified_stand_in_the_manifest(bundle: Path, labels: Path) -> None:
    lines = labels.read_text().splitlines()
    few = [line for number, line in enumerate(lines) if number % 3 != 2 or number < 15]  # five images of drugs
    labels.write_text("\n".join(few))
    result = CliRunner().invoke(main, ["--bundle", str(bundle), "--labels", str(labels), "--pooled"])
    assert result.exit_code == 0, result.output
    manifest = open_bundle(bundle).manifest
    fp32, fp16 = (manifest.thresholds_of(f"guard.{precision}.onnx") for precision in ("fp32", "fp16"))
    assert fp32 is not None and fp16 is not None and fp32.uncertified is not None and fp16.uncertified is not None
    drug = fp32.uncertified["drug"]
    assert drug.n == 5 and drug.promise_needs == 19 + 20 * (drug.missed or 0) and drug.drift_needs is None
    assert fp16.uncertified["drug"].drift_needs is not None, "drift is measured from the float32 file"
    assert f"at most 5 % missed is not certified of drug ({drug.missed} of 5 missed" in result.stderr
    assert "guard.fp16.onnx: at most 10 points more missed than in float32 is not certified of " in result.stderr


def test_a_manifest_from_before_classes_were_named_is_read(bundle: Path, labels: Path) -> None:
    fit_bundle(open_bundle(bundle), read_labels(labels, CLASSES), Promise(alpha=0.1, max_fpr=0.1))
    stated = json.loads((bundle / "manifest.json").read_text())
    for entry in stated["thresholds"]:
        entry.pop("uncertified")
    old = Manifest.from_bytes(json.dumps(stated).encode(), where="manifest.json")
    assert old.thresholds is not None and {entry.uncertified for entry in old.thresholds} == {None}
    stated["thresholds"][0]["uncertified"] = {"gun": {"n": 1, "missed": 0, "promise_needs": 19}}
    with pytest.raises(BundleError, match="classes that do not exist: gun"):
        Manifest.from_bytes(json.dumps(stated).encode(), where="manifest.json")
