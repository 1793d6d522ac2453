"""``calibration.distill``: a head from pictures alone, measured, or refused with the likeliest reasons."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from calibration.distill import DistillOptions, distill, main, pictures_for
from calibration.distilling.teacher import Lesson
from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from calibration.sets.pictures import BuiltIn, Folder
from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.errors import CheckpointError, InputError
from safevlm.network.distilled_head import DistilledHead
from safevlm.network.pooling import POOLINGS
from safevlm.network.reference import guard_sha256
from tests.safevlm.checkpoint.random_checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    written = write_checkpoint("llava", "original", tmp_path_factory.mktemp("distill") / "checkpoint")
    return open_checkpoint(str(written.folder), tap="language_model")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 300 drawn pictures and a labels file for half of them."""
    folder = tmp_path_factory.mktemp("pictures")
    suite = build_suite("calibration", pairs=700, questions=0)
    rows = []
    for number, picture in enumerate(suite.pictures[:300]):
        draw(picture.scene).save(folder / f"{number}.png")
        if number % 2:
            rows.append({"image": f"{number}.png", "label": picture.scene.label})
    (folder / "labels.json").write_text(json.dumps(rows))
    return folder


def command(checkpoint: Checkpoint, *options: str | Path) -> Result:
    return CliRunner().invoke(main, ["--model", str(checkpoint.folder), *map(str, options)])


def test_a_head_is_written_that_fits_and_says_how_faithful_it_is(
    checkpoint: Checkpoint, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "head.safetensors"
    done = command(
        checkpoint, "--images", pictures, "--labels", pictures / "labels.json", "--min-agreement", "0", "--out", out
    )
    assert done.exception is None, done.output
    assert "fidelity to the exact guard on" in done.stdout and f"--guard {out}" in done.stdout
    head = DistilledHead.read(out)
    head.check_fits(checkpoint, guard_sha256(checkpoint))
    found = head.fidelity
    assert found["n_train"] + found["n_validation"] + found["n_test"] == 300 - found["copies_left_out"]
    assert found["n_test"] == found["test"]["n"] == sum(row["n"] for row in found["test"]["per_class"].values())
    assert 0 < found["test"]["labels"]["n"] < found["n_test"]
    assert found["test"]["kl"]["low"] <= found["test"]["kl"]["value"] <= found["test"]["kl"]["high"]
    tried = found["poolings_tried"]
    assert found["pooling"] == head.pooling == min(tried, key=lambda name: tried[name]["validation_kl"])


def test_the_same_pictures_give_the_same_head(checkpoint: Checkpoint, pictures: Path, tmp_path: Path) -> None:
    options = DistillOptions(min_agreement=0, pooling="mean")
    one, two = (
        distill(checkpoint, Folder(path=pictures), options).write(tmp_path / name).sha256 for name in ("one", "two")
    )
    assert one == two
    assert distill(checkpoint, Folder(path=pictures), replace(options, seed=1)).write(tmp_path / "x").sha256 != one


def test_an_unfaithful_head_is_refused_with_the_likeliest_reasons(pictures: Path, tmp_path: Path) -> None:
    options = ["--images", str(pictures), "--min-agreement", "1", "--out", str(tmp_path / "head")]
    done = CliRunner().invoke(main, ["--model", "tiny-safellava", *options])
    assert isinstance(done.exception, InputError) and done.exception.exit_code == 2
    reasons = ("--min-agreement asks for 100.0%", "too few images (", "held-out images (95 % interval", "found: ")
    for said in reasons:
        assert said in str(done.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--min-agreement", "1.5"], "a number from 0 to 1"),
        (["--images", "missing"], "is not a folder"),
        ([], "--images is missing"),
    ],
)
def test_bad_requests_are_refused(
    checkpoint: Checkpoint, options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = command(checkpoint, "--out", tmp_path / "head", *options)
    assert isinstance(done.exception, InputError) and said in str(done.exception)


@pytest.mark.parametrize(("broken", "part"), [("probs", "language model"), ("pooled", "vision tower")])
def test_a_teacher_without_a_verdict_is_refused_with_the_image(
    checkpoint: Checkpoint, pictures: Path, monkeypatch: pytest.MonkeyPatch, broken: str, part: str
) -> None:
    count = 0

    def teach(_: Any, batches: Any, **options: Any) -> Lesson:
        nonlocal count
        count = sum(len(batch) for batch in batches)
        lesson = Lesson(probs=torch.full((count, 20), 0.05), pooled={kind: torch.ones(count, 8) for kind in POOLINGS})
        (lesson.probs if broken == "probs" else lesson.pooled[POOLINGS[0]])[7, 3] = torch.nan
        return lesson

    monkeypatch.setattr("calibration.distill.teach", teach)
    with pytest.raises(CheckpointError, match=rf"the {part} gives NaN or infinity for 1 of .* such as .*\.png"):
        distill(checkpoint, Folder(path=pictures), DistillOptions())
    assert count > 200


def test_too_few_pictures_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(InputError, match=r"distinct images .*At least 200 are needed"):
        distill(checkpoint, BuiltIn(pairs=120))


def test_labels_of_other_pictures_are_refused(checkpoint: Checkpoint, pictures: Path, tmp_path: Path) -> None:
    strange: Any = build_suite("test", pairs=100, questions=0).pictures[0]
    draw(strange.scene).save(tmp_path / "strange.png")
    (tmp_path / "labels.json").write_text(json.dumps([{"image": "strange.png", "label": 0}]))
    with pytest.raises(InputError, match="has no label for any of the"):
        distill(checkpoint, Folder(path=pictures), DistillOptions(labels=tmp_path / "labels.json"))


def test_tiny_checkpoints_bring_their_pictures() -> None:
    assert isinstance(pictures_for(None, open_checkpoint("tiny-safellava")), BuiltIn)
