"""A guard bundle is exact, complete, and never half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export import onnx as onnx_export
from export.guard import parts
from export.guard.bundle import bundle_draft
from export.guard.options import print_manifest
from export.onnx import ExportOptions, export_guard
from runtimes.guard.bundle import open_bundle
from runtimes.guard.judge import Guard
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.contract.manifest import Manifest
from safevlm.contract.parity import TOLERANCES, check_parity
from safevlm.errors import CheckpointError, ImageFileError, InputError, ParityError
from safevlm.network.reference import build_reference_guard, normalize
from tests.safevlm.checkpoint.both_loaders import write_folder
from tests.safevlm.checkpoint.random_checkpoints import SIZE, Written, stand_in, write_checkpoint
from tests.safevlm.checkpoint.seeded_models import model_of

QUICK = ExportOptions(parity_images=4)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_checkpoint("gemma3", "hf", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def bundle(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "guard"
    export_guard(open_checkpoint(str(written.folder)), out, ExportOptions(precisions=("fp16", "fp32"), parity_images=6))
    return out


def run(path: Path, images: torch.Tensor) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["probs", "logits"], {"rgb": images.numpy()})


@pytest.mark.parametrize(("family", "layout"), [("llava", "original"), ("qwen2_5_vl", "old"), ("gemma3", "hf")])
def test_a_projector_tap_is_split_off_exactly(family: str, layout: str, tmp_path: Path) -> None:
    """Probabilities equal an independent forward pass through transformers' own classes, for every family."""
    written = write_checkpoint(family, layout, tmp_path / "checkpoint")
    grid = SIZE[family] if family == "qwen2_5_vl" else None
    checkpoint = open_checkpoint(str(written.folder), tap="projector")
    manifest = export_guard(checkpoint, tmp_path / "out", ExportOptions(grid=grid, parity_images=4))
    images = written.images(5)
    expected = written.probs(written.features(images)).numpy()
    probs, logits = run(tmp_path / "out" / "guard.fp32.onnx", images)
    assert np.abs(probs - expected).max() <= 1e-5
    assert expected.max() > 0.2
    assert probs.dtype == logits.dtype == np.float32
    assert manifest.files[0].parity is not None
    assert manifest.files[0].parity.label_flips == 0
    assert not [name for name in checkpoint.tensors.read_names if "language_model" in name or "lm_head" in name]


def test_an_export_in_float16_says_nothing_about_onnx_runtime(
    written: Written, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = open_checkpoint(str(written.folder))
    export_guard(checkpoint, tmp_path / "out", ExportOptions(precisions=("fp16",), parity_images=2))
    assert "onnxruntime" not in "".join(capfd.readouterr())


def test_several_vision_layers_are_concatenated(tmp_path: Path) -> None:
    """LLaVA's vision_feature_layer as a list; layers behind the last one that is read are left out."""
    model = model_of("llava", {}, {"num_hidden_layers": 4}, vision_feature_layer=[1, -3, 0])
    write_folder(tmp_path / "checkpoint", model, json.loads(model.config.to_json_string(use_diff=False)))
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    (tmp_path / "checkpoint/preprocessor_config.json").write_text(json.dumps(size))
    checkpoint = open_checkpoint(str(tmp_path / "checkpoint"), tap="projector")
    export_guard(checkpoint, tmp_path / "out", ExportOptions(parity_images=4))
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    guard = build_reference_guard(checkpoint)
    with torch.no_grad():
        pixels = normalize(images, guard.preprocessing)
        features = torch.stack(tuple(model.get_image_features(pixel_values=pixels).pooler_output))
        expected = torch.softmax(guard.head(features.mean(1)), -1).numpy()
    assert np.abs(run(tmp_path / "out" / "guard.fp32.onnx", images)[0] - expected).max() <= 1e-5
    graph = onnx.load(tmp_path / "out" / "guard.fp32.onnx").graph
    assert sum(node.op_type == "LayerNormalization" for node in graph.node) == 1 + 2 * 2  # of four layers, two


def test_the_graph_is_as_the_contract_says(bundle: Path, written: Written) -> None:
    model = onnx.load(bundle / "guard.fp32.onnx")
    assert model.opset_import[0].version >= 20
    assert [(i.name, i.type.tensor_type.elem_type) for i in model.graph.input] == [("rgb", onnx.TensorProto.UINT8)]
    assert [o.name for o in model.graph.output] == ["probs", "logits"]
    for batch in (1, 2, 7):
        assert run(bundle / "guard.fp32.onnx", written.images(batch))[0].shape == (batch, 20)


def test_the_file_tells_nothing_about_the_machine(bundle: Path) -> None:
    """The exporter writes stack traces with paths into every node; they are cleared."""
    content = (bundle / "guard.fp32.onnx").read_bytes()
    assert str(Path.cwd()).encode() not in content
    assert b"site-packages" not in content
    assert b"stack_trace" not in content


def test_the_batch_is_free_whatever_parity_was_checked_on(written: Written, tmp_path: Path) -> None:
    export_guard(open_checkpoint(str(written.folder)), tmp_path / "out", ExportOptions(parity_images=1))
    assert len(run(tmp_path / "out" / "guard.fp32.onnx", written.images(3))[0]) == 3


def test_half_precision_halves_the_file_and_keeps_the_verdicts(bundle: Path, written: Written) -> None:
    manifest = Manifest.read(bundle)
    sizes = {file.precision: file.bytes for file in manifest.files}
    assert 0.45 < sizes["fp16"] / sizes["fp32"] < 0.65
    images = written.images(16)
    full, half = run(bundle / "guard.fp32.onnx", images)[0], run(bundle / "guard.fp16.onnx", images)[0]
    assert np.abs(full - half).max() < 0.02
    assert np.abs(full - half).max() > 0, "the fp16 file is not in half precision"
    assert manifest.default_file == "guard.fp32.onnx"


def test_the_bundle_opens_and_judges(bundle: Path, written: Written, tmp_path: Path) -> None:
    from PIL import Image

    pixels = written.images(1)[0].numpy()
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    with Guard.open(bundle) as guard:
        judgement = guard.judge([tmp_path / "picture.png"])[0]
    expected = written.probs(written.features(torch.from_numpy(pixels)[None])).numpy()[0]
    assert np.abs(np.array(list(judgement.probs.values())) - expected).max() <= 1e-5


def test_the_manifest_says_where_the_guard_came_from(bundle: Path, written: Written) -> None:
    opened = open_bundle(bundle)
    checkpoint = open_checkpoint(str(written.folder))
    used = [*checkpoint.vision_names(), *checkpoint.head_names()]
    assert opened.manifest.source.sha256 == checkpoint.tensors.sha256(used)
    assert opened.manifest.source.family == "gemma3"
    assert opened.manifest.tap.source == "projector"
    assert opened.manifest.classes == checkpoint.classes
    for file in opened.manifest.files:
        assert file.parity is not None
        assert file.parity.images == 6
        assert file.latency is not None and file.latency.provider == "CPUExecutionProvider"
        assert file.latency.median_ms > 0


def test_large_weights_lie_beside_the_graph(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "INSIDE", 1000)
    out = tmp_path / "guard"
    manifest = export_guard(open_checkpoint(str(written.folder)), out, QUICK)
    assert [(file.path, file.kind) for file in manifest.files] == [
        ("guard.fp32.onnx", "onnx"),
        ("guard.fp32.onnx.data", "onnx_data"),
    ]
    open_bundle(out)
    images = written.images(2)
    expected = written.probs(written.features(images)).numpy()
    assert np.abs(run(out / "guard.fp32.onnx", images)[0] - expected).max() <= 1e-5


def test_a_failed_parity_check_leaves_nothing(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = onnx_export.build_graph

    def tampered(guard: Any, precision: Any, **options: Any) -> Any:
        graph = honest(guard, precision, **options)
        graph.head[-1].bias.data[0] += 1.0
        return graph

    monkeypatch.setattr(onnx_export, "build_graph", tampered)
    with pytest.raises(ParityError, match=r"guard\.fp32\.onnx differs from transformers.* on 4 images"):
        export_guard(open_checkpoint(str(written.folder)), tmp_path / "guard", QUICK)
    assert list(tmp_path.iterdir()) == []


def test_parity_counts_flips_and_refuses_what_is_not_finite() -> None:
    reference = np.array([[0.5 + 4e-6, 0.5 - 4e-6], [0.9, 0.1]], dtype=np.float32)
    flipped = reference[:, ::-1].copy()
    strict, loose = TOLERANCES["fp32"], TOLERANCES["fp16"]
    names = {"what": "x", "reference": "y"}
    assert check_parity(reference, reference, strict, **names).label_flips == 0
    with pytest.raises(ParityError, match=r"x differs from y on 1 images: .* 1 labels changed"):
        check_parity(reference[:1], flipped[:1], strict, **names)
    assert check_parity(reference[:1], flipped[:1], loose, **names).label_flips == 1
    with pytest.raises(ParityError, match=r"on 2 images: max .* 2 labels changed"):
        check_parity(reference, flipped, loose, **names)
    with pytest.raises(ParityError, match="1 probabilities of 2 images are not finite"):
        check_parity(reference, np.array([[np.nan, 1.0], [0.9, 0.1]], dtype=np.float32), loose, **names)


def test_what_is_no_bundle_is_not_replaced(written: Written, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(InputError, match="is not a guard bundle"):
        export_guard(open_checkpoint(str(written.folder)), tmp_path, QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_bundle_is_replaced_and_an_abandoned_draft_removed(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "guard"
    shutil.copytree(bundle, out)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    abandoned = tmp_path / f".guard.partial-{ended.pid}"
    running = tmp_path / f".guard.partial-{os.getppid()}"
    abandoned.mkdir()
    running.mkdir()
    with bundle_draft(out) as draft:
        shutil.copy(bundle / "manifest.json", draft)
    assert not abandoned.exists()
    assert running.exists(), "a draft of a process that still runs was removed"
    assert [path.name for path in out.iterdir()] == ["manifest.json"]


def test_an_unreadable_parity_image_and_an_empty_folder_are_named(written: Written, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(written.folder))
    (tmp_path / "pictures").mkdir()
    with pytest.raises(InputError, match="pictures is a folder without image files"):
        export_guard(checkpoint, tmp_path / "guard", ExportOptions(images=tmp_path / "pictures"))
    (tmp_path / "pictures" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ImageFileError, match=r"broken\.png"):
        export_guard(checkpoint, tmp_path / "guard", ExportOptions(images=tmp_path / "pictures"))


@pytest.mark.parametrize("precisions", [(), ("int3",), ("fp32", "fp32")])
def test_impossible_precisions_are_refused(precisions: Any) -> None:
    with pytest.raises(InputError, match="give one or more of fp32, fp16, each once; int8 needs fp32 as well"):
        ExportOptions(precisions=precisions)


def test_the_grid_is_checked(tmp_path: Path) -> None:
    write_checkpoint("qwen2_5_vl", "hf", tmp_path)
    with pytest.raises(InputError, match="28"):
        export_guard(open_checkpoint(str(tmp_path), tap="projector"), tmp_path / "out", ExportOptions(grid=(100, 100)))


def test_the_command_writes_and_describes_a_bundle(written: Written, tmp_path: Path) -> None:
    out = tmp_path / "guard"
    command = [sys.executable, "-m", "export.onnx", "--model", str(written.folder), "--out", str(out), "--json"]
    done = subprocess.run([*command, "--parity-images", "4"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["bundle"] == str(out)
    assert said["manifest"] == json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def test_random_weights_are_marked_and_told(
    bundle: Path, written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stand_in(written.folder, tmp_path / "checkpoint")
    export_guard(open_checkpoint(str(folder)), tmp_path / "guard", QUICK)
    for place, marked in ((tmp_path / "guard", True), (bundle, False)):
        manifest = Manifest.read(place)
        assert manifest.source.random_weights == marked
        print_manifest(manifest, place, [], as_json=False)
        assert ("random weights: its verdicts mean nothing" in capsys.readouterr().out) == marked


@pytest.mark.parametrize(
    ("damage", "message"),
    [("missing", "preprocessor|config.json|missing"), ("truncated", "model.safetensors")],
)
def test_bad_checkpoints_end_with_code_2_and_one_message(
    written: Written, tmp_path: Path, damage: str, message: str
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(written.folder, folder)
    if damage == "missing":
        (folder / "config.json").unlink()
    else:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder))
    command = [sys.executable, "-m", "export.onnx", "--model", str(folder), "--out", str(tmp_path / "guard")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
