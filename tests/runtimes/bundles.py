"""Write a guard bundle of a few hundred bytes: mean colour, one matrix, softmax.

Red pictures are ``weapon``, green ones ``safe``, blue ones ``drug``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from safevlm.contract.graph_fit import Role
from safevlm.contract.manifest import Band, EngineInfo, GuardFile, Head, Manifest, Source, Tap, TensorSpec, Thresholds
from safevlm.contract.preprocessing import Preprocessing

CLASSES = ("safe", "weapon", "drug")
SIZE = 16
PREPROCESSING = Preprocessing(
    height=SIZE, width=SIZE, fit="squash", filter="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
WEIGHTS = np.array([[0, 6, 0], [6, 0, 0], [0, 0, 6]], np.float32)
"""From mean red, green, blue (-1..1) to the logits of CLASSES."""
GREEN, RED, BLUE = (0, 255, 0), (255, 0, 0), (0, 0, 255)


def guard_graph(
    weights: np.ndarray[Any, Any] = WEIGHTS, output: str = "probs", size: tuple[int, int] = (SIZE, SIZE)
) -> onnx.ModelProto:
    """Return the graph for images of a size, with its probabilities under the name ``output``."""
    classes = weights.shape[1]
    constants = {
        "scale": np.float32(1 / 255),
        "half": np.float32(0.5),
        "axes": np.array([1, 2], np.int64),
        "weights": weights,
    }
    nodes = [
        helper.make_node("Cast", ["rgb"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["levels", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "half"], ["shifted"]),
        helper.make_node("Div", ["shifted", "half"], ["normal"]),
        helper.make_node("ReduceMean", ["normal", "axes"], ["colour"], keepdims=0),
        helper.make_node("MatMul", ["colour", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], [output], axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "guard",
        [helper.make_tensor_value_info("rgb", TensorProto.UINT8, ["N", *size, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", classes]) for name in (output, "logits")],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def listed(folder: Path, name: str, content: bytes, **settings: Any) -> GuardFile:
    """Write a file of the bundle and return its entry."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return GuardFile(path=name, sha256=digest, bytes=len(content), **settings)


def onnx_file(folder: Path, name: str = "guard.fp32.onnx", precision: str = "fp32", **graph: Any) -> GuardFile:
    model = guard_graph(**graph)
    classes, size = graph.get("weights", WEIGHTS).shape[1], graph.get("size", (SIZE, SIZE))
    return listed(
        folder,
        name,
        model.SerializeToString(),
        kind="onnx",
        precision=precision,
        inputs=(TensorSpec(name="rgb", shape=("N", *size, 3), dtype="uint8"),),
        outputs=tuple(TensorSpec(name=n, shape=("N", classes), dtype="float32") for n in ("probs", "logits")),
    )


def guard_file_for(folder: Path, classes: int, preprocessing: Preprocessing) -> GuardFile:
    """Write a graph that fits so many classes and a preprocessing; its answers mean nothing."""
    size = (preprocessing.height, preprocessing.width)
    return onnx_file(folder, weights=np.zeros((3, classes), np.float32), size=size)


RTX: dict[str, Any] = {
    "module": "tensorrt_rtx",
    "tensorrt_version": "1.7.1.116",
    "gpu_name": None,
    "compute_capability": None,
    "targets": ("sm80", "sm87"),
    "verified": False,
    "parity_seed": 5,
}
"""Of an engine that TensorRT-RTX built ahead of time, for the stand-in's GPU among others."""


def engine_file(
    folder: Path,
    *,
    role: Role = "guard",
    precision: str = "fp16",
    content: bytes = b"plan",
    **info: Any,
) -> GuardFile:
    stated: dict[str, Any] = {
        "tensorrt_version": "10.3.0",
        "gpu_name": "Orin",
        "compute_capability": "8.7",
        "min_batch": 1,
        "opt_batch": 2,
        "max_batch": 4,
    }
    return listed(
        folder,
        f"engines/{role}.{precision}.plan",
        content,
        kind="engine",
        role=role,
        precision=precision,
        engine=EngineInfo(**(stated | info)),
    )


TOKENS, WIDTH = 6, 2
"""T x D of the parts of a guard behind the language model."""


def part_files(folder: Path) -> tuple[GuardFile, GuardFile]:
    """Write the exact parts of a guard: images to T x D tokens, hidden states of that shape to probabilities."""
    constants = {
        "axes": np.array([1, 2], np.int64),
        "token_axis": np.array([1], np.int64),
        "spread": np.linspace(-0.02, 0.02, 3 * TOKENS * WIDTH, dtype=np.float32).reshape(3, -1),
        "shape": np.array([0, TOKENS, WIDTH], np.int64),
        "weights": np.array([[3, -2, 1], [-1, 2, -3]], np.float32),
    }
    vision = [
        helper.make_node("Cast", ["rgb"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["levels", "axes"], ["colour"], keepdims=0),
        helper.make_node("MatMul", ["colour", "spread"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["embeddings"]),
    ]
    head = [
        helper.make_node("ReduceMean", ["hidden", "token_axis"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probs"], axis=-1),
    ]
    tokens = TensorSpec(name="embeddings", shape=("N", TOKENS, WIDTH), dtype="float32")
    pixels = TensorSpec(name="rgb", shape=("N", SIZE, SIZE, 3), dtype="uint8")
    answers = tuple(TensorSpec(name=name, shape=("N", 3), dtype="float32") for name in ("probs", "logits"))
    hidden = tokens.model_copy(update={"name": "hidden"})
    return (
        _part(folder, "vision", vision, constants, pixels, (tokens,)),
        _part(folder, "head", head, constants, hidden, answers),
    )


def _part(
    folder: Path,
    role: Role,
    nodes: list[onnx.NodeProto],
    constants: dict[str, Any],
    given: TensorSpec,
    gives: tuple[TensorSpec, ...],
) -> GuardFile:
    used = {name for node in nodes for name in node.input}
    kinds = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
    graph = helper.make_graph(
        nodes,
        role,
        [helper.make_tensor_value_info(given.name, kinds[given.dtype], list(given.shape))],
        [helper.make_tensor_value_info(each.name, kinds[each.dtype], list(each.shape)) for each in gives],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return listed(
        folder,
        f"{role}.fp32.onnx",
        model.SerializeToString(),
        kind="onnx",
        role=role,
        precision="fp32",
        inputs=(given,),
        outputs=gives,
    )


def write_parts(folder: Path, *others: GuardFile, **changes: Any) -> Path:
    """Write the bundle of a guard behind the language model, ``others`` beside its two ONNX files."""
    folder.mkdir(parents=True, exist_ok=True)
    source = Source(checkpoint="tiny-safellava", sha256="0" * 64, family="llava", standalone=False)
    manifest = manifest_of([*part_files(folder), *others], **({"source": source} | changes))
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def manifest_of(files: Iterable[GuardFile], **changes: Any) -> Manifest:
    listed_files = tuple(files)
    settings: dict[str, Any] = {
        "created": "2026-01-01T00:00:00Z",
        "tool_version": "0.1.0",
        "source": Source(checkpoint="tiny-safegem", sha256="0" * 64, family="gemma3"),
        "tap": Tap(source="projector", pooling="mean", tokens="image", learned="declared"),
        "head": Head(kind="exact", reads="projector", pooling="mean", widths=(8, len(changes.get("classes", CLASSES)))),
        "classes": CLASSES,
        "preprocessing": PREPROCESSING,
        "files": listed_files,
        "default_file": listed_files[0].path,
    }
    return Manifest(**(settings | changes))


def write_bundle(folder: Path, *others: GuardFile, **changes: Any) -> Path:
    """Write a whole bundle: the fp32 graph, ``others``, and a manifest with ``changes``."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = manifest_of([onnx_file(folder), *others], **changes)
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def fitted(file: GuardFile, block: float, allow: float, **changes: Any) -> Thresholds:
    """Return thresholds fitted on ``file``."""
    settings: dict[str, Any] = {
        "file": file.path,
        "file_sha256": file.sha256,
        "method": "conformal_risk_control",
        "alpha": 0.05,
        "max_fpr": 0.05,
        "n": 500,
        "n_unsafe": 300,
        "fitted_on": "2026-01-01",
        "labels_sha256": "1" * 64,
        "pooled": Band(block=block, allow=allow, n_unsafe=300),
        "miss_rate": 0.04,
        "fpr": 0.02,
        "unsure_rate": 0.1,
    }
    return Thresholds(**(settings | changes))


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def labelled_images(folder: Path, count: int) -> Path:
    """Write so many images, red weapons, green safe ones and blue drugs, all more or less so; return their labels."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        label = number % 3
        colour = rng.integers(0, 160, size=3)
        colour[{0: 1, 1: 0, 2: 2}[label]] += 80
        Image.new("RGB", (8, 8), tuple(map(int, colour))).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": CLASSES[label]})
    path = folder / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
