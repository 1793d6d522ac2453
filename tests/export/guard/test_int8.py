"""INT8 guards: judged on held-out images, what hurts stays in float32, and each flavour is what its target takes."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from export.guard import int8 as int8_module
from export.guard.images import PicturesOnDemand, int8_images
from export.guard.int8 import FLAVOURS, Int8Images, Int8Limits, add_int8, faster_than_float
from export.onnx import INT8_CALIBRATION, ExportOptions, export_guard
from export.rewrites.standard_operators import to_standard
from runtimes.guard.bundle import open_bundle
from runtimes.guard.judge import Guard
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from safevlm.checkpoint.checkpoint import RANDOM_KEY, open_checkpoint
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.checkpoint.guard_head import standard_classes
from safevlm.contract.manifest import GuardFile, Manifest
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import CheckpointError, ImageFileError, InputError, PrecisionError
from tests.safevlm.checkpoint.random_checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "bundle"
    export_guard(open_checkpoint("tiny-safegem"), out, ExportOptions(int8=True))
    return out


@pytest.fixture(scope="module")
def images() -> Int8Images:
    whole = int8_images(preprocessing(), 16)
    return Int8Images(calibration=whole.calibration, held_out=whole.held_out[:300], harms=whole.harms[:300])  # type: ignore[index]


def preprocessing() -> Preprocessing:
    checkpoint = open_checkpoint("tiny-safegem")
    return read_processor(checkpoint.processor, family=checkpoint.family.key)


def files_of(manifest: Manifest) -> dict[str, GuardFile]:
    return {file.precision: file for file in manifest.files}


def test_both_flavours_are_judged_and_described(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    files = files_of(manifest)
    assert list(files) == ["fp32", *FLAVOURS]
    for flavour in FLAVOURS:
        stated = files[flavour].quantization
        assert stated is not None and stated["held_out_images"] == 1000 and stated["labels"] == "true"
        assert stated["label_flips"] <= 1 and stated["auroc_change"] <= 0.002 and stated["auroc"] > 0.99
        parity = files[flavour].parity
        assert parity is not None and parity.images == 1000 and parity.label_flips == stated["label_flips"]
        assert parity.max_abs_prob_delta is not None and 0 < parity.max_abs_prob_delta < 0.3
        assert files[flavour].bytes < 0.5 * files["fp32"].bytes
        assert files[flavour].note is not None and "float32 on this machine" in files[flavour].note
    assert "TensorRT" in str(files["int8"].target) and "CPUs" in str(files["int8-dynamic"].target)
    quick = [file for file in files.values() if file.quantization is not None and faster_than_float(file)]
    default = next(file for file in manifest.files if file.path == manifest.default_file)
    assert default in (quick or [files["fp32"]])


def test_verdicts_are_those_of_float32_and_do_not_depend_on_neighbours(bundle: Path, images: Int8Images) -> None:
    opened = open_bundle(bundle)
    expected = {}
    for precision in ("fp32", *FLAVOURS):
        with OnnxRuntimeRunner(opened, opened.file(precision)) as runner:
            together = runner.infer(images.held_out[:40]).probs
            alone = np.concatenate([runner.infer(image[np.newaxis]).probs for image in images.held_out[:40]])
        assert np.abs(together - alone).max() <= 1e-5, precision
        expected[precision] = together.argmax(axis=1)
    for flavour in FLAVOURS:
        assert (expected[flavour] != expected["fp32"]).mean() <= 0.03
    with Guard.open(bundle) as guard:
        assert guard is not None


def test_image_embeddings_drift_is_stated(images: Int8Images, tmp_path: Path) -> None:
    """The INT8 file's embeddings are the language model's input, for those who ask for it."""
    manifest = export_guard(
        open_checkpoint("tiny-safegem"), tmp_path / "out", ExportOptions(int8=True, embeddings=True)
    )
    for flavour in FLAVOURS:
        parity = files_of(manifest)[flavour].parity
        assert parity is not None and parity.max_rel_embedding_delta is not None
        assert 1e-4 < parity.max_rel_embedding_delta < 0.3


def test_static_int8_is_what_accelerators_build_from(bundle: Path) -> None:
    written = onnx.load(str(bundle / "guard.int8.onnx"))
    onnx.checker.check_model(written)
    assert {function.name for function in written.functions} == {"MultiHeadAttention"}
    to_standard(bundle / "guard.int8.onnx", bundle / "standard.onnx")
    graph = onnx.load(str(bundle / "standard.onnx"))
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} == {""}, "no operator of one runtime alone"
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("QuantizeLinear") >= 15 and not {"MatMulInteger", "QLinearMatMul"} & set(kinds)
    for node in graph.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = values[node.input[1]], values[node.input[2]]
            assert zero.dtype == np.int8 and not zero.any(), "symmetric int8"
            assert (scale > 0).all()
    weights = [node for node in graph.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in values]
    assert len(weights) >= 20 and any(values[node.input[1]].size > 1 for node in weights), "a scale a channel"


def test_products_that_hurt_go_back_to_float32(bundle: Path, images: Int8Images, tmp_path: Path) -> None:
    source = files_of(Manifest.read(bundle))["fp32"]
    (tmp_path / source.path).write_bytes((bundle / source.path).read_bytes())
    loose = add_int8(
        tmp_path, source, "int8", images, Int8Limits(flips=1, auroc=1), classes=standard_classes(), head_layers=2
    )[0]
    floats, found = (
        int8_module._run(tmp_path / path, "logits", images.held_out, 8) for path in (source.path, loose.path)
    )
    error = float(np.square(found - floats).mean())
    assert loose.quantization is not None and loose.quantization["left_in_float32"] == []
    order = int8_module._by_harm(
        int8_module._Maker(tmp_path / source.path, "int8", images.calibration, 2),
        images.held_out[:32],
        "int8",
        lambda _: None,
    )
    asked: list[str] = []

    def strict(reference: object, probs: object, *rest: object) -> int8_module._Judged:
        asked.append("")
        return int8_module._Judged(flips=0 if len(asked) > 3 else 300, largest=0.1, auroc=1.0, auroc_change=0.0)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(int8_module, "_judge", strict)
        (tight,) = add_int8(tmp_path, source, "int8", images, classes=standard_classes(), head_layers=2)
    assert tight.quantization is not None and tight.quantization["left_in_float32"] == order[:4]
    after = int8_module._run(tmp_path / tight.path, "logits", images.held_out, 8)
    assert float(np.square(after - floats).mean()) < 0.8 * error, "the worst were taken out"


def test_what_cannot_meet_its_limits_is_left_out_and_float32_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strict(_: object, found: object, *rest: object) -> int8_module._Judged:
        return int8_module._Judged(flips=300, largest=0.1, auroc=1.0, auroc_change=0.0)

    monkeypatch.setattr(int8_module, "_judge", strict)
    monkeypatch.setattr(int8_module, "_by_harm", lambda maker, *_: list(maker.products))
    monkeypatch.setattr(int8_module._Maker, "write", lambda *_: None)
    monkeypatch.setattr(int8_module, "_probs", lambda *_: np.full((300, 20), 0.05, np.float32))
    options = ExportOptions(int8=True, parity_images=2, int8_images=200)
    with pytest.raises(PrecisionError, match="even with all but one product in float32") as caught:
        export_guard(open_checkpoint("tiny-safegem"), tmp_path / "out", options)
    assert caught.value.left_out == FLAVOURS and caught.value.exit_code == 2
    assert [file.path for file in open_bundle(tmp_path / "out").manifest.files] == ["guard.fp32.onnx"]


def test_a_float32_file_that_gives_nan_is_refused(bundle: Path, images: Int8Images, tmp_path: Path) -> None:
    source = files_of(Manifest.read(bundle))["fp32"]
    written = onnx.load(str(bundle / source.path))
    bias = next(each for each in reversed(written.graph.initializer) if list(each.dims) == [20])
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(20, np.nan, np.float32), bias.name))
    onnx.save(written, str(tmp_path / source.path))
    with pytest.raises(CheckpointError, match="gives NaN or infinity for 300 of 300 held-out images"):
        add_int8(tmp_path, source, "int8-dynamic", images, classes=standard_classes(), head_layers=2)


def test_the_manifest_names_classes_with_too_few_held_out_images(bundle: Path) -> None:
    seen = Counter(int8_images(preprocessing(), INT8_CALIBRATION).harms)
    for file in Manifest.read(bundle).files:
        if file.quantization is not None:
            short = file.quantization["uncertified_classes"]
            assert {name for name in standard_classes()[1:] if seen[name] < 29} <= short.keys()
            assert all(each["drift_needs"] > each["n"] == seen[name] for name, each in short.items())


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Give fp32,int8"):
        ExportOptions(precisions=("fp16",), int8=True)
    with pytest.raises(InputError, match=r"needs a standalone guard, which .* does not have"):
        export_guard(open_checkpoint("tiny-safellava"), tmp_path / "out", ExportOptions(int8=True))
    with pytest.raises(InputError, match="Give at least 200"):
        export_guard(open_checkpoint("tiny-safegem"), tmp_path / "out", ExportOptions(int8=True, int8_images=199))
    with pytest.raises(InputError, match="must be at least 1, not 0"):
        ExportOptions(int8=True, int8_images=0)
    (tmp_path / "few").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "few" / "one.png")
    with pytest.raises(InputError, match="at least 200 more for judging"):
        int8_images(preprocessing(), 8, tmp_path / "few")


def test_random_weights_may_be_judged_on_few_pictures_and_lose_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint("gemma3", "hf", tmp_path / "model").folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, RANDOM_KEY: True}))
    options = ExportOptions(int8=True, int8_images=3, parity_images=1)
    manifest = export_guard(open_checkpoint(str(folder), tap="projector"), tmp_path / "out", options)
    for flavour in FLAVOURS:
        stated = files_of(manifest)[flavour].quantization
        assert stated is not None and stated["held_out_images"] == 3 and stated["left_in_float32"] == []


def test_pictures_are_made_when_they_are_asked_for(tmp_path: Path) -> None:
    made: list[int] = []

    def make(number: int) -> Image.Image:
        made.append(number)
        return Image.new("RGB", (30, 20), (number, 0, 0))

    size = preprocessing()
    pictures = PicturesOnDemand([partial(make, number) for number in range(9)], size)
    assert len(pictures) == 9 and made == []
    found = pictures[6:8]
    assert found.shape == (2, size.height, size.width, 3) and found.dtype == np.uint8 and made == [6, 7]
    assert found[:, 0, 0, 0].tolist() == [6, 7]


def test_an_unreadable_picture_is_told_at_once(tmp_path: Path) -> None:
    for number in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    with pytest.raises(ImageFileError, match=r"3\.png"):
        int8_images(preprocessing(), 2, tmp_path, held_out=4)
