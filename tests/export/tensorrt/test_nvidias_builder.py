"""NVIDIA's own parser and builder, TensorRT-RTX's, which need no GPU: every graph that is exported becomes an engine.

What its network takes and gives is read back; running an engine needs a GPU.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.shapes.random_guard import build_random_guard
from benchmarks.shapes.shapes import find_shape
from export.guard.graph import Graph, build_graph, build_head_graph, build_vision_graph
from export.guard.int8_file import quantize
from export.guard.parts import write_onnx
from export.rewrites.opset17 import lower_to_opset17
from export.rewrites.standard_operators import to_standard
from export.tensorrt.builder import EngineOptions, Tensors, build_engine, network_tensors, read_graph
from export.tensorrt.targets import DEFAULT_TARGETS
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.contract.manifest import TensorSpec
from safevlm.errors import EngineUnavailableError, SafeVLMError
from safevlm.images.drawn import drawn_images
from safevlm.network.head import build_head
from safevlm.network.reference import build_reference_guard, build_vision
from tests.runtimes.bundles import guard_graph

TINY = {"tiny-safegem": (112, 112, 4), "tiny-safellava": (84, 84, 36), "tiny-safeqwen": (168, 168, 36)}
"""Height, width and image tokens."""
WIDTH, CLASSES = 256, 20
TOWERS = {"SafeLLaVA-7B": 336, "SafeQwen2.5-VL-7B": 448, "SafeGem-12B": 896}
"""A model a vision tower, and its resolution."""

Rewrite = Callable[[Path, Path], None]


def as_shipped(source: Path, target: Path) -> None:
    """Leave a file as it is."""
    shutil.copyfile(source, target)


def lowered(source: Path, target: Path) -> None:
    """Rewrite a file as TensorRT 8.6 gets it."""
    standard = target.with_name(f"first.{target.name}")
    to_standard(source, standard)
    lower_to_opset17(standard, target)


REWRITES: dict[str, Rewrite] = {"as shipped": as_shipped, "standard": to_standard, "opset 17": lowered}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write the file of a role of a tiny checkpoint, once."""

    @cache
    def write(name: str, role: str, precision: str, embeddings: bool = False) -> Path:
        path = tmp_path_factory.mktemp("written") / f"{role}.{precision}.onnx"
        if precision == "int8":
            images = drawn_images(build_vision(open_checkpoint(name)).preprocessing, 0, 4)
            quantize(write(name, role, "fp32", embeddings), path, "int8", images, head_layers=2)
        else:
            write_onnx(*_graph(name, role, precision, embeddings=embeddings), path, input_name=_input(role))
        return path

    return write


def _input(role: str) -> str:
    return "hidden" if role == "head" else "rgb"


def _graph(name: str, role: str, precision: Any, *, embeddings: bool) -> tuple[Graph, np.ndarray[Any, Any]]:
    """Return a graph and two of its inputs."""
    checkpoint = open_checkpoint(name, tap="projector")
    if role == "head":
        return build_head_graph(build_head(checkpoint)), np.zeros((2, TINY[name][2], WIDTH), np.float32)
    if role == "vision":
        vision = build_vision(checkpoint)
        graph: Graph = build_vision_graph(vision, checkpoint.family.key, precision)
        return graph, drawn_images(vision.preprocessing, 0, 2)
    guard = build_reference_guard(checkpoint)
    return build_graph(guard, precision, embeddings=embeddings), drawn_images(guard.preprocessing, 0, 2)


def stated(name: str, role: str, embeddings: bool) -> Tensors:
    """Return what a file of a tiny checkpoint takes and gives."""
    height, width, tokens = TINY[name]
    rgb = TensorSpec(name="rgb", shape=("N", height, width, 3), dtype="uint8")
    hidden = TensorSpec(name="hidden", shape=("N", tokens, WIDTH), dtype="float32")
    verdict = tuple(TensorSpec(name=each, shape=("N", CLASSES), dtype="float32") for each in ("probs", "logits"))
    image = TensorSpec(name="embeddings", shape=("N", tokens, WIDTH), dtype="float32")
    if role == "vision":
        return Tensors((rgb,), (image,))
    return Tensors((hidden if role == "head" else rgb,), (*verdict, image) if embeddings else verdict)


def build(rtx: Any, file: Path, plan: Path, tensors: Tensors) -> None:
    build_engine(rtx, file, plan, tensors, EngineOptions(), targets=DEFAULT_TARGETS)
    assert plan.stat().st_size > sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*")) / 2


def cases() -> Iterator[tuple[str, str, str, bool, str]]:
    """Yield what is built: checkpoint, role, precision, with embeddings or without, and how the file is rewritten.

    TensorRT 8.6 alone is given opset 17, and float32 always; parts are of guards behind the language model. One
    checkpoint has every precision with and without embeddings, the others each once: writing graphs takes long.
    """
    each = (("fp32", True), ("fp16", False), ("int8", True))
    for name in TINY:
        crossed = itertools.product(("fp32", "fp16", "int8"), (False, True)) if name == "tiny-safegem" else each
        yield from ((name, "guard", precision, shared, "standard") for precision, shared in crossed)
        yield from ((name, "guard", precision, shared, "as shipped") for precision, shared in each)
        yield name, "guard", "fp32", True, "opset 17"
    for name in ("tiny-safellava", "tiny-safeqwen"):
        yield name, "vision", "fp16", False, "standard"
        yield name, "head", "fp32", False, "standard"


@pytest.mark.parametrize(("name", "role", "precision", "shared", "rewrite"), list(cases()))
def test_a_file_of_a_tiny_checkpoint_becomes_an_engine(
    name: str,
    role: str,
    precision: str,
    shared: bool,
    rewrite: str,
    rtx: Any,
    written: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("export.tensorrt.builder.to_standard", REWRITES[rewrite])
    file, plan = written(name, role, precision, shared), tmp_path / "guard.plan"
    build_engine(rtx, file, plan, stated(name, role, shared), EngineOptions(), targets=DEFAULT_TARGETS)
    assert plan.stat().st_size > file.stat().st_size / 2


@pytest.mark.parametrize("name", TOWERS)
def test_a_layer_of_a_real_vision_tower_becomes_an_engine_at_its_resolution(
    name: str, rtx: Any, tmp_path: Path
) -> None:
    guard = build_random_guard(find_shape(name).shortened(1), seed=0)
    file, plan, side = tmp_path / "guard.fp16.onnx", tmp_path / "scratch" / "guard.plan", TOWERS[name]
    plan.parent.mkdir()
    write_onnx(build_graph(guard, "fp16"), drawn_images(guard.preprocessing, 0, 2), file)
    verdict = tuple(TensorSpec(name=each, shape=("N", CLASSES), dtype="float32") for each in ("probs", "logits"))
    tensors = Tensors((TensorSpec(name="rgb", shape=("N", side, side, 3), dtype="uint8"),), verdict)
    build_engine(rtx, file, plan, tensors, EngineOptions(), targets=DEFAULT_TARGETS)
    assert plan.stat().st_size > 40 * 2**20


def test_what_the_parser_lacks_is_named_with_its_node(rtx: Any, tmp_path: Path) -> None:
    model = guard_graph()
    model.graph.node[-1].op_type, model.graph.node[-1].name = "Det", "the last"
    onnx.save(model, tmp_path / "guard.onnx")
    with pytest.raises(EngineUnavailableError, match=r"TensorRT-RTX .* cannot read guard.onnx: operator Det, node"):
        read_graph(rtx, tmp_path / "guard.onnx")


def test_a_file_with_other_tensors_than_the_bundle_states_is_refused(rtx: Any, tmp_path: Path) -> None:
    onnx.save(guard_graph(output="chances"), tmp_path / "guard.onnx")
    stated_probs = network_tensors(rtx, read_graph(rtx, tmp_path / "guard.onnx").network)
    onnx.save(guard_graph(), tmp_path / "guard.onnx")
    with pytest.raises(SafeVLMError, match=r"reads standard.guard.onnx as rgb .* to probs .*, but the bundle states"):
        build_engine(
            rtx, tmp_path / "guard.onnx", tmp_path / "plan", stated_probs, EngineOptions(), targets=DEFAULT_TARGETS
        )
