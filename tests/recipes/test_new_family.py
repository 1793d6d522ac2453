"""CONTRIBUTING's recipe for a new family, followed: three entries, and it opens, exports, judges and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export.gguf.artifact import export_gguf
from export.guard.trunks import TRUNKS
from export.onnx import ExportOptions, export_guard
from runtimes.guard.judge import Guard
from safevlm.checkpoint.architectures import ARCHITECTURES
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.families import FAMILIES
from safevlm.errors import CheckpointError, InputError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.reference import normalize
from tests.recipes.internvl import FACTS, KEY, SIDE, TRANSFORMERS, InternTrunk, write_tiny


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, KEY, FACTS)
    monkeypatch.setitem(ARCHITECTURES, KEY, TRANSFORMERS)
    monkeypatch.setitem(TRUNKS, KEY, InternTrunk)


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)


def wanted(model: Any, head: torch.nn.Module, rgb: torch.Tensor, preprocessing: Any) -> torch.Tensor:
    """Return the guard's probabilities by transformers' own model."""
    with torch.no_grad():
        features = model.get_image_features(pixel_values=normalize(rgb, preprocessing)).pooler_output
        return torch.softmax(head(features.mean(1)), -1)


@pytest.mark.usefixtures("entered")
def test_a_new_family_opens_exports_judges_and_answers(tmp_path: Path) -> None:
    model, head = write_tiny(tmp_path / "checkpoint")
    checkpoint = open_checkpoint(str(tmp_path / "checkpoint"))
    assert checkpoint.family is FACTS
    vlm = load_safe_vlm(checkpoint)
    expected = wanted(model, head, images(3), vlm.preprocessing)
    torch.testing.assert_close(vlm.guard(images(3))[0], expected, atol=1e-5, rtol=0)
    answer = vlm.answer(images(1), ["What is drawn?"], max_new_tokens=3)[0]
    np.testing.assert_allclose(answer.guard_probs, expected[0], atol=1e-5)

    manifest = export_guard(
        checkpoint, tmp_path / "bundle", ExportOptions(precisions=("fp32", "fp16"), parity_images=4)
    )
    assert manifest.source.family == KEY
    with Guard.open(tmp_path / "bundle", "onnxruntime", precision="fp32") as guard:
        verdicts = guard.judge([Image.fromarray(image.numpy()) for image in images(3)])
    found = [[verdict.probs[name] for name in manifest.classes] for verdict in verdicts]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.usefixtures("entered")
def test_without_a_gguf_table_that_export_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "checkpoint")
    checkpoint = open_checkpoint(str(tmp_path / "checkpoint"))
    with pytest.raises(
        InputError, match=r"SafeInternVL cannot be exported as GGUF; .* can\. Use python -m export\.onnx"
    ):
        export_gguf(checkpoint, tmp_path / "gguf")


def test_without_its_tables_it_is_no_family(tmp_path: Path) -> None:
    write_tiny(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="SafeLLaVA needs"):
        open_checkpoint(str(tmp_path / "checkpoint"))
