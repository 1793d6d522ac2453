"""A guard head's file: what is written is read, and nothing else is taken for one."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import GuardHeadError, InputError
from safevlm.network.distilled_head import DistilledHead
from safevlm.network.head import GuardHead
from safevlm.network.reference import guard_sha256
from tests.safevlm.checkpoint.random_checkpoints import write_checkpoint

CLASSES = ("safe", "fire", "flood")


def made(widths: tuple[int, ...] = (12, 8, 3)) -> DistilledHead:
    torch.manual_seed(1)
    return DistilledHead(
        head=GuardHead(widths).eval(),
        pooling="mean_max_std",
        classes=CLASSES,
        checkpoint="some",
        source_sha256="a" * 64,
        size=(112, 84),
        fidelity={"test": {"n": 3}},
    )


def test_a_written_head_is_read_as_it_was(tmp_path: Path) -> None:
    head = made()
    written = head.write(tmp_path / "new" / "head.safetensors")
    read = DistilledHead.read(tmp_path / "new" / "head.safetensors")
    assert vars(replace(read, head=head.head)) == vars(replace(written, head=head.head))
    rows = torch.randn(4, 12)
    assert torch.equal(read.head(rows), head.head(rows))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["head.safetensors"]


def test_the_same_head_is_the_same_bytes(tmp_path: Path) -> None:
    assert made().write(tmp_path / "one").sha256 == made().write(tmp_path / "two").sha256
    assert replace(made(), size=(1, 1)).write(tmp_path / "three").sha256 != made().write(tmp_path / "one").sha256


def test_what_is_not_a_guard_head_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    with pytest.raises(GuardHeadError, match=r"cannot be read.*calibration\.distill"):
        DistilledHead.read(path)
    path.write_bytes(pickle.dumps({"weight": [1.0]}))
    with pytest.raises(GuardHeadError, match="not a guard head"):
        DistilledHead.read(path)
    save_file({"img_safety_head.mlp.0.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(GuardHeadError, match="states format None"):
        DistilledHead.read(path)
    made().write(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(GuardHeadError, match="not a guard head"):
        DistilledHead.read(path)


def test_a_head_fits_only_what_it_was_made_for(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        str(write_checkpoint("llava", "original", tmp_path / "c").folder), tap="language_model"
    )
    digest, width = guard_sha256(checkpoint), checkpoint.hidden_size
    fitting = replace(made((3 * width, 8, len(checkpoint.classes))), classes=checkpoint.classes, source_sha256=digest)
    fitting.check_fits(checkpoint, digest)
    for wrong, said in (
        (replace(fitting, source_sha256="b" * 64), "was made for some"),
        (replace(fitting, classes=tuple(reversed(fitting.classes))), "was made for some"),
        (replace(fitting, pooling="mean"), f"gives {width} features"),
    ):
        with pytest.raises(GuardHeadError, match=said):
            wrong.check_fits(checkpoint, digest)


def test_a_place_that_cannot_be_written_is_said_and_left_clean(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "head", tmp_path / "folder"):
        with pytest.raises(InputError, match="cannot be written"):
            made().write(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
