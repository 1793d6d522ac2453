"""An int8 engine's graph: the INT8 file's products on the float16 file, as NVIDIA's builder takes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export.guard.graph import build_graph
from export.guard.int8_file import quantize
from export.guard.parts import write_onnx
from export.rewrites.int8_on_half import quantize_half
from export.rewrites.standard_operators import to_standard
from export.tensorrt.builder import EngineOptions, build_engine
from export.tensorrt.engine import tensors_of
from runtimes.guard.engines.library import import_tensorrt
from runtimes.guard.onnx_file import read_onnx
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.contract.manifest import GuardFile
from safevlm.errors import MissingExtraError
from safevlm.images.drawn import drawn_images
from safevlm.network.reference import build_reference_guard
from tests.safevlm.checkpoint.random_checkpoints import write_checkpoint


@pytest.fixture(scope="module", params=["llava", "gemma3", "qwen2_5_vl"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A family's files in all three precisions, weights beside two of them, and images."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = open_checkpoint(str(write_checkpoint(request.param, "hf", folder / "model").folder), tap="projector")
    images = drawn_images(build_reference_guard(checkpoint).preprocessing, 0, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.guard.parts.INSIDE", 0)
        for precision in ("fp32", "fp16"):
            guard = build_reference_guard(checkpoint)
            write_onnx(build_graph(guard, precision), images[:2], folder / f"guard.{precision}.onnx")
    quantize(folder / "guard.fp32.onnx", folder / "guard.int8.onnx", "int8", images, head_layers=2)
    quantize_half(folder / "guard.int8.onnx", folder / "guard.fp16.onnx", folder / "guard.both.onnx")
    return folder, images


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"rgb": images[at : at + 1]})[0] for at in range(len(images))])


def test_it_answers_as_the_int8_file(files: tuple[Path, np.ndarray]) -> None:
    folder, images = files
    right, int8, ours = (logits(folder / f"guard.{name}.onnx", images) for name in ("fp32", "int8", "both"))
    rounding = np.abs(int8 - right).max()
    assert 0 < np.abs(ours - right).max() <= 1.5 * rounding + 1e-2 * np.abs(right).max()


def test_products_are_int8_between_float16_and_attention_is_left_alone(files: tuple[Path, np.ndarray]) -> None:
    folder, _ = files
    int8, ours = (onnx.load(str(folder / f"guard.{name}.onnx"), load_external_data=False) for name in ("int8", "both"))
    codes = [{each.name for each in m.graph.initializer if each.name.endswith("_int8")} for m in (int8, ours)]
    assert codes[0] == codes[1] != set()
    quantized = {node.output[0] for node in ours.graph.node if node.op_type == "DequantizeLinear"}
    assert not any(quantized & set(n.input) for n in ours.graph.node if n.op_type == "MultiHeadAttention")
    size = [sum(path.stat().st_size for path in folder.glob(f"guard.{name}.onnx*")) for name in ("both", "int8")]
    assert size[0] <= size[1] * 1.01


def test_nvidias_builder_takes_it(files: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    try:
        rtx = import_tensorrt("tensorrt_rtx")
    except MissingExtraError as error:
        pytest.skip(str(error))
    folder, _ = files
    source = GuardFile(path="guard.both.onnx", sha256="0" * 64, bytes=1, kind="onnx", precision="int8")
    tensors = tensors_of(folder / source.path, source)
    assert read_onnx(folder / source.path).inputs
    options = EngineOptions(precision="int8")
    build_engine(rtx, folder / source.path, tmp_path / "guard.plan", tensors, options, targets=["sm89"])
    assert (tmp_path / "guard.plan").stat().st_size > 1000
    to_standard(folder / source.path, tmp_path / "again.onnx")
