"""Distilled heads, exact parts and shared towers: each bundle answers as the torch modules it was made of."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

from export.guard.heads import HeadRequest, find_head
from export.onnx import ExportOptions, export_guard
from export.trt import main as trt
from runtimes.guard.bundle import open_bundle
from runtimes.guard.judge import Guard
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.select import select_runner
from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.contract.parity import TOLERANCES, check_embeddings
from safevlm.errors import BundleError, EngineUnavailableError, GuardHeadError, InputError, ParityError
from safevlm.network.distilled_head import DistilledHead
from safevlm.network.head import GuardHead
from safevlm.network.loading import load_safe_vlm
from safevlm.network.pooling import Pooling, pool, pooled_width
from safevlm.network.reference import guard_sha256
from tests.safevlm.checkpoint.random_checkpoints import SIZE, Written, write_checkpoint

FAMILIES = (("llava", "original"), ("qwen2_5_vl", "old"), ("gemma3", "hf"))


def behind_language_model(family: str, layout: str, folder: Path) -> tuple[Written, Checkpoint]:
    written = write_checkpoint(family, layout, folder)
    return written, open_checkpoint(str(written.folder), tap="language_model")


def random_head(checkpoint: Checkpoint, family: str, pooling: Pooling = "mean") -> DistilledHead:
    """Return a head that fits, with weights large enough for classes to differ."""
    generator = torch.Generator().manual_seed(7)
    head = GuardHead((pooled_width(pooling, checkpoint.hidden_size), 16, len(checkpoint.classes)))
    for parameter in head.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return DistilledHead(
        head=head.eval().requires_grad_(False),
        pooling=pooling,
        classes=checkpoint.classes,
        checkpoint=checkpoint.name,
        source_sha256=guard_sha256(checkpoint),
        size=SIZE[family],
        fidelity={"made": "by a test"},
    )


def run(path: Path, name: str, values: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, {name: values})
    return outputs


@pytest.mark.parametrize(("family", "layout"), FAMILIES)
@pytest.mark.parametrize("pooling", ["mean", "mean_max_std"])
def test_a_distilled_head_judges_as_it_does_in_torch(
    family: str, layout: str, pooling: Pooling, tmp_path: Path
) -> None:
    written, checkpoint = behind_language_model(family, layout, tmp_path / "checkpoint")
    head = random_head(checkpoint, family, pooling)
    manifest = export_guard(checkpoint, tmp_path / "out", ExportOptions(parity_images=4, distilled=head))
    images = written.images(5)
    with torch.no_grad():
        expected = torch.softmax(head.head(pool(written.features(images), pooling)), dim=-1).numpy()
    probs, _ = run(tmp_path / "out" / "guard.fp32.onnx", "rgb", images.numpy())
    assert np.abs(probs - expected).max() <= 1e-5
    assert expected.std(axis=0).max() > 1e-3  # images are told apart
    assert manifest.head.kind == "distilled" and manifest.head.reads == "projector" and manifest.head.pooling == pooling
    assert manifest.tap.source == "language_model" and manifest.source.standalone
    assert manifest.fidelity == {"made": "by a test"}
    assert not [name for name in checkpoint.tensors.read_names if "language_model" in name or "lm_head" in name]


@pytest.mark.parametrize(("family", "layout"), FAMILIES)
def test_shared_embeddings_are_those_the_language_model_takes(family: str, layout: str, tmp_path: Path) -> None:
    written, checkpoint = behind_language_model(family, layout, tmp_path / "checkpoint")
    options = ExportOptions(parity_images=4, distilled=random_head(checkpoint, family), embeddings=True)
    export_guard(checkpoint, tmp_path / "shared", options)
    export_guard(checkpoint, tmp_path / "plain", replace(options, embeddings=False))
    images = written.images(3).numpy()
    with (
        OnnxRuntimeRunner(open_bundle(tmp_path / "shared")) as shared,
        OnnxRuntimeRunner(open_bundle(tmp_path / "plain")) as plain,
    ):
        output = shared.infer(images, embeddings=True)
        assert shared.infer(images).embeddings is None
        assert np.abs(output.probs - plain.infer(images).probs).max() <= 1e-6
        with pytest.raises(InputError, match="gives no image embeddings: export it with --embeddings"):
            plain.infer(images, embeddings=True)
    assert output.embeddings is not None
    expected = load_safe_vlm(checkpoint, grid=SIZE[family]).image_features(torch.from_numpy(images)).detach().numpy()
    assert np.abs(output.embeddings - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(np.diff(expected, axis=1)).max() > 1e-2 * np.abs(expected).max()  # so order counts


@pytest.mark.parametrize(("family", "layout"), FAMILIES)
def test_the_exact_parts_around_a_language_model_are_the_exact_guard(family: str, layout: str, tmp_path: Path) -> None:
    written, checkpoint = behind_language_model(family, layout, tmp_path / "checkpoint")
    grid = SIZE[family] if family == "qwen2_5_vl" else None
    manifest = export_guard(checkpoint, tmp_path / "out", ExportOptions(grid=grid, parity_images=4))
    assert not manifest.source.standalone
    assert {file.path: file.role for file in manifest.files} == {
        "head.fp32.onnx": "head",
        "vision.fp32.onnx": "vision",
    }
    images = written.images(3)
    vlm = load_safe_vlm(checkpoint, grid=SIZE[family])
    (embeddings,) = run(tmp_path / "out" / "vision.fp32.onnx", "rgb", images.numpy())
    with torch.inference_mode():
        prefill = vlm.embed(None, ["What?"] * 3, torch.from_numpy(embeddings))
        hidden = vlm.language_forward(prefill.inputs_embeds, prefill.masks, prefill.position_ids)
        tapped = hidden[prefill.image_mask].view(embeddings.shape).numpy()
    probs, _ = run(tmp_path / "out" / "head.fp32.onnx", "hidden", tapped)
    assert np.abs(probs - vlm.guard(images)[0].numpy()).max() <= 1e-5


def test_exact_parts_are_not_taken_for_a_guard(tmp_path: Path) -> None:
    _, checkpoint = behind_language_model("llava", "original", tmp_path / "checkpoint")
    export_guard(checkpoint, tmp_path / "out", ExportOptions(parity_images=2))
    for opening in (
        lambda: Guard.open(tmp_path / "out"),
        lambda: select_runner(open_bundle(tmp_path / "out"), "torch"),
    ):
        with pytest.raises(BundleError, match=r"standalone: false.*--images DIR"):
            opening()


def test_the_torch_runtime_does_not_pretend_to_run_a_distilled_head(tmp_path: Path) -> None:
    _, checkpoint = behind_language_model("llava", "original", tmp_path / "checkpoint")
    options = ExportOptions(parity_images=2, distilled=random_head(checkpoint, "llava"))
    export_guard(checkpoint, tmp_path / "out", options)
    with pytest.raises(InputError, match="distilled head"):
        select_runner(open_bundle(tmp_path / "out"), "torch")


def test_a_head_of_another_checkpoint_or_size_is_refused(tmp_path: Path) -> None:
    _, checkpoint = behind_language_model("qwen2_5_vl", "old", tmp_path / "checkpoint")
    head = random_head(checkpoint, "qwen2_5_vl")
    stranger = replace(head, source_sha256="0" * 64)
    with pytest.raises(GuardHeadError, match=r"made for .*With another vision tower"):
        export_guard(checkpoint, tmp_path / "out", ExportOptions(distilled=stranger))
    with pytest.raises(InputError, match="fitted at 112x84 pixels, the input would be 56x56"):
        export_guard(checkpoint, tmp_path / "out", ExportOptions(distilled=head, grid=(56, 56)))
    assert not (tmp_path / "out").exists()


def test_which_head_is_found(tmp_path: Path) -> None:
    written, checkpoint = behind_language_model("llava", "original", tmp_path / "checkpoint")
    file = tmp_path / "head.safetensors"
    made = random_head(checkpoint, "llava").write(file)
    read = find_head(checkpoint, HeadRequest(guard=file))
    assert read is not None and read.sha256 == made.sha256
    assert find_head(checkpoint, HeadRequest()) is None
    exact = open_checkpoint(str(written.folder), tap="projector")
    assert find_head(exact, HeadRequest(images="anything")) is None
    with pytest.raises(GuardHeadError, match=r"split off exactly.*Leave --guard out"):
        find_head(exact, HeadRequest(guard=file))
    with pytest.raises(InputError, match="--labels"):
        HeadRequest(guard=file, labels=file)


def test_export_trt_leaves_the_exact_parts_and_says_which_flag_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    written, _ = behind_language_model("llava", "original", tmp_path / "checkpoint")
    arguments = ["--model", str(written.folder), "--out", str(tmp_path / "out"), "--parity-images", "2"]
    done = CliRunner().invoke(trt, arguments)
    assert isinstance(done.exception, EngineUnavailableError)
    assert f"python -m export.trt {' '.join(arguments[:4])} --images DIR\n" in done.stdout
    assert "at least 2,000 images" in done.stdout
    roles = [(file.role, file.precision) for file in open_bundle(tmp_path / "out").manifest.files]
    assert roles == [("head", "fp32"), ("vision", "fp32"), ("vision", "fp16")]


def test_embeddings_that_differ_or_are_not_finite_are_refused() -> None:
    reference = np.linspace(-1, 2, 24, dtype=np.float32).reshape(2, 3, 4)
    assert check_embeddings(reference, reference, TOLERANCES["fp32"], what="x") == 0
    assert check_embeddings(reference, reference + 1e-4, TOLERANCES["fp32"], what="x") == pytest.approx(5e-5, rel=0.01)
    with pytest.raises(ParityError, match="x: image embeddings differ"):
        check_embeddings(reference, reference + 1e-3, TOLERANCES["fp32"], what="x")
    with pytest.raises(ParityError, match="not finite"):
        check_embeddings(reference, reference * np.nan, TOLERANCES["fp32"], what="x")
