"""The streamed teacher is the exact guard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibration.distilling.teacher import teach
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.pooling import POOLINGS, pool
from tests.safevlm.checkpoint.random_checkpoints import SIZE, write_checkpoint


@pytest.mark.parametrize(("family", "layout"), [("llava", "original"), ("qwen2_5_vl", "old"), ("gemma3", "hf")])
def test_its_verdicts_are_the_exact_guards_however_pictures_are_batched(
    family: str, layout: str, tmp_path: Path
) -> None:
    written = write_checkpoint(family, layout, tmp_path / "checkpoint")
    checkpoint = open_checkpoint(str(written.folder), tap="language_model")
    images = written.images(5)
    vlm = load_safe_vlm(checkpoint, grid=SIZE[family])
    expected = vlm.guard(images)[0]
    for limit, batches in ((None, [images[:3], images[3:]]), (0, list(images.split(1)))):
        lesson = teach(checkpoint, batches, grid=SIZE[family], max_bytes=limit)
        assert (lesson.probs - expected).abs().max() <= 1e-5
        for pooling in POOLINGS:
            wanted = pool(written.features(images), pooling)
            assert (lesson.pooled[pooling] - wanted).abs().max() <= 1e-4 * max(1, wanted.abs().max())
    assert expected.std(dim=0).max() > 1e-4  # pictures are told apart


def test_a_guard_on_the_projector_needs_no_teacher(tmp_path: Path) -> None:
    written = write_checkpoint("gemma3", "hf", tmp_path / "checkpoint")
    checkpoint = open_checkpoint(str(written.folder), tap="projector")
    with pytest.raises(InputError, match=r"split off exactly.*export\.onnx"):
        teach(checkpoint, [torch.zeros(1, 56, 56, 3, dtype=torch.uint8)])
