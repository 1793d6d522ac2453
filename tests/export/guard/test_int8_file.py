"""INT8 files: the numbers of ONNX Runtime's own quantizer, weights streamed, only what was asked for changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.speed.isolation import peak_rss, restart_peak
from export.guard.int8_file import FLAVOURS, Flavour, activation_ranges, quantizable, write_int8
from export.rewrites.streamed_weights import ALIGNMENT, WeightWriter, read_weight

SIDE, PATCH, WIDTH = 12, 4, 96
HEAD = ["first", "second"]


@pytest.fixture(params=[False, True], ids=["inside", "beside"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tower in little: patches by a Conv, three maps of one tensor, a fourth of their sum, a head of two Gemms."""
    rng = np.random.default_rng(0)
    shapes = {
        "kernel": (WIDTH, 3, PATCH, PATCH),
        "q": (WIDTH, WIDTH),
        "k": (WIDTH, WIDTH),
        "v": (WIDTH, WIDTH),
        "out": (WIDTH, WIDTH),
        "one": (64, WIDTH),
        "two": (5, 64),
    }
    weights = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    weights["q"][:, 3] = 0  # an output that is always nothing
    constants = {"order": np.array([0, 3, 1, 2]), "rows": np.array([0, WIDTH, -1]), "middle": np.array([1])}
    node = helper.make_node
    nodes = [
        node("Cast", ["rgb"], ["grey"], to=TensorProto.FLOAT),
        node("Transpose", ["grey"], ["pixels"], perm=[0, 3, 1, 2]),
        node("Conv", ["pixels", "kernel"], ["patches"], "conv", strides=[PATCH, PATCH]),
        node("Reshape", ["patches", "rows"], ["flat"]),
        node("Transpose", ["flat"], ["tokens"], perm=[0, 2, 1]),
        *(node("MatMul", ["tokens", name], [f"{name}_out"], f"product_{name}") for name in "qkv"),
        node("Add", ["q_out", "k_out"], ["qk"]),
        node("Add", ["qk", "v_out"], ["qkv"]),
        node("MatMul", ["qkv", "out"], ["mixed"], "product_out"),
        node("ReduceMean", ["mixed", "middle"], ["pooled"], keepdims=0),
        node("Gemm", ["pooled", "one"], ["hidden"], "first", transB=1),
        node("Gemm", ["hidden", "two"], ["probs"], "second", transB=1),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in {**weights, **constants}.items()]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("rgb", TensorProto.UINT8, ["N", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("probs", TensorProto.FLOAT, ["N", 5])],
        tensors,
    )
    path = tmp_path / "guard.fp32.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path), save_as_external_data=request.param, location=path.name + ".data")
    return path


@pytest.fixture
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)


def run(path: Path, images: NDArray[np.uint8]) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["probs"], {"rgb": image[np.newaxis]})[0] for image in images])


class Calibration:
    """What ONNX Runtime's quantizer asks for its pictures."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        image = next(self._images, None)
        return None if image is None else {"rgb": image[np.newaxis]}


@pytest.fixture
def quiet() -> Iterator[None]:
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    yield
    logging.getLogger().setLevel(level)


def by_onnxruntime(source: Path, path: Path, flavour: Flavour, images: NDArray[np.uint8], chosen: list[str]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    common: dict[str, Any] = {"nodes_to_quantize": chosen, "per_channel": True, "weight_type": QuantType.QInt8}
    if flavour == "int8-dynamic":
        quantize_dynamic(str(source), str(path), extra_options={"MatMulConstBOnly": True}, **common)
        return
    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "MatMulConstBOnly": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": ["MatMul", "Conv"],
    }
    quantize_static(
        str(source),
        str(path),
        Calibration(images),  # type: ignore[arg-type]  # of its kind in all that is called
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        extra_options=options,
        **common,
    )


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_numbers_are_those_of_onnxruntimes_quantizer(
    source: Path, images: NDArray[np.uint8], flavour: Flavour
) -> None:
    chosen = quantizable(source, flavour)[:-2]
    assert chosen == (["conv"] if flavour == "int8" else []) + [f"product_{name}" for name in ("q", "k", "v", "out")]
    ours, theirs = source.with_name(f"guard.{flavour}.onnx"), source.with_name("theirs.onnx")
    ranges = activation_ranges(source, images[:3]) if flavour == "int8" else {}
    write_int8(source, ours, flavour, ranges, chosen, [])
    by_onnxruntime(source, theirs, flavour, images[:3], chosen)
    floats, found, expected = (run(path, images) for path in (source, ours, theirs))
    error = np.abs(expected - floats).max()
    assert error > 0.001 * np.abs(floats).max(), "INT8 changes something"
    assert np.abs(found - expected).max() < 0.05 * error
    kinds, others = ([node.op_type for node in onnx.load(str(path)).graph.node] for path in (ours, theirs))
    for kind in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"):
        assert kinds.count(kind) == others.count(kind), "one for each tensor, not for each that reads it"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_heads_weights_alone_are_small(source: Path, images: NDArray[np.uint8], flavour: Flavour) -> None:
    path = source.with_name(f"guard.{flavour}.onnx")
    write_int8(source, path, flavour, {}, [], HEAD)
    graph = onnx.load(str(path)).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    assert stored["one_int8"].data_type == TensorProto.INT8 and "one" not in stored
    assert stored["two"].data_type == TensorProto.FLOAT, "too small to be worth it"
    assert [node.op_type for node in graph.node].count("DequantizeLinear") == 1
    before, after = run(source, images), run(path, images)
    assert 0 < np.abs(after - before).max() < 0.02 * np.abs(before).max()


def test_what_is_left_out_stays_as_it_was(source: Path, images: NDArray[np.uint8]) -> None:
    path = source.with_name("guard.int8.onnx")
    write_int8(source, path, "int8", activation_ranges(source, images), ["product_k"], [])
    stored = {tensor.name: read_weight(tensor, source.parent) for tensor in onnx.load(str(path)).graph.initializer}
    kept = {tensor.name: read_weight(tensor, source.parent) for tensor in onnx.load(str(source)).graph.initializer}
    for name in ("kernel", "q", "v", "out", "one", "two"):
        np.testing.assert_array_equal(stored[name], kept[name])
    codes, scale = stored["k_int8"], stored["k_scale"]
    assert codes.min() >= -127 and np.abs(codes.astype(int)).max(axis=0).tolist() == [127] * WIDTH
    np.testing.assert_allclose(codes * scale, kept["k"], atol=0.51 * scale.max())


def test_ranges_are_the_largest_that_were_seen(source: Path, images: NDArray[np.uint8]) -> None:
    ranges = activation_ranges(source, images)
    assert set(ranges) == {"pixels", "tokens", "qkv", "pooled", "hidden"}
    assert ranges["pixels"] == images.max()
    assert sorted(path.name for path in source.parent.iterdir() if "ranges" in path.name) == []


def test_weights_stand_beside_where_the_sources_do(source: Path, images: NDArray[np.uint8]) -> None:
    path = source.with_name("guard.int8.onnx")
    data = path.with_name(path.name + ".data")
    data.write_bytes(b"of an earlier try")
    write_int8(source, path, "int8", activation_ranges(source, images), quantizable(source, "int8")[:-2], HEAD)
    assert data.exists() == source.with_name(source.name + ".data").exists()
    whole = sum(each.stat().st_size for each in (path, data) if each.exists())
    assert whole < 0.55 * sum(each.stat().st_size for each in source.parent.glob("guard.fp32.onnx*"))


def test_streamed_weights_come_back(tmp_path: Path) -> None:
    values = {
        "large": np.arange(3000, dtype=np.float32).reshape(3, -1),
        "codes": np.arange(-100, 100, dtype=np.int8).repeat(9),
        "number": np.array(3, np.int64),
    }
    with WeightWriter(tmp_path / "g.onnx", beside=True) as writer:
        tensors = {name: writer.write(name, value) for name, value in values.items()}
    for name, value in values.items():
        found = read_weight(tensors[name], tmp_path)
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)
        place = {entry.key: entry.value for entry in tensors[name].external_data}
        assert (name == "number") == (not place)
        assert int(place.get("offset", 0)) % ALIGNMENT == 0


def test_ranges_hold_one_activation_at_a_time(tmp_path: Path) -> None:
    """Forty products of 11 MB each, which took 440 MB while every range waited for the end."""
    side, products = 960, 40
    identity = numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "identity")
    rows = numpy_helper.from_array(np.array([0, -1, WIDTH]), "rows")
    nodes = [
        helper.make_node("Cast", ["rgb"], ["grey"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["grey", "rows"], ["x0"]),
        *(
            helper.make_node("MatMul", [f"x{number}", "identity"], [f"x{number + 1}"], f"product_{number}")
            for number in range(products)
        ),
        helper.make_node("ReduceMean", [f"x{products}"], ["probs"]),
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("rgb", TensorProto.UINT8, ["N", side, side, 3])],
        [helper.make_tensor_value_info("probs", TensorProto.FLOAT, None)],
        [identity, rows],
    )
    path = tmp_path / "guard.fp32.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    rgb = np.full((1, side, side, 3), 7, np.uint8)
    restart_peak()
    before = peak_rss()
    ranges = activation_ranges(path, rgb)
    assert set(ranges.values()) == {7.0} and len(ranges) == products
    assert peak_rss() - before < 200 * 2**20
