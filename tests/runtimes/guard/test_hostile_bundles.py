"""A bundle or GGUF folder that somebody else wrote opens, or is refused with one line, before anything is run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from runtimes.check import main as check
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.onnx_file import CHILDREN, NUMBERS, TEXTS, read_onnx
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.openvino_runner import OpenVinoRunner
from runtimes.guard.policy import read_policy
from runtimes.language.gguf_artifact import open_gguf
from safevlm.contract.gguf_manifest import GgufManifest
from safevlm.contract.manifest import Manifest
from safevlm.errors import BundleError, InputError
from safevlm.terminal.printable import is_plain
from tests.runtimes.bundles import GREEN, fitted, guard_graph, listed, manifest_of, onnx_file, picture
from tests.runtimes.mutations import mutated

WORLD = Path(__file__).parents[2] / "fixtures" / "world" / "hostile"
CHANGES = [line.split("\t") for line in (WORLD / "manifests.txt").read_text().splitlines()]
PROFILE = settings(deadline=None, derandomize=True, max_examples=200, database=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    file = onnx_file(folder)
    manifest_of([file], thresholds=(fitted(file, 0.7, 0.2),)).write(folder)
    return folder


def changed(content: Any, path: str, value: Any) -> bytes:
    at = content
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        at = at[part]
    at[last] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_manifest_that_claims_too_much_is_refused(change: str, message: str, folder: Path) -> None:
    path, _, value = change.partition(" = ")
    manifest = folder / "manifest.json"
    manifest.write_bytes(changed(json.loads(manifest.read_text()), path, json.loads(value)))
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(folder)
    assert is_plain(str(caught.value)) and len(str(caught.value)) < 1_000


def test_classes_that_the_graph_does_not_have_are_refused_at_opening(tmp_path: Path) -> None:
    """Also where the manifest states nothing of the graph, or the wrong thing consistently."""
    graph = onnx_file(tmp_path)
    bare = graph.model_copy(update={"inputs": (), "outputs": ()})
    four = graph.model_copy(
        update={"outputs": tuple(each.model_copy(update={"shape": ("N", 4)}) for each in graph.outputs)}
    )
    for file in (bare, four):
        manifest = manifest_of([file], classes=("safe", "a", "b", "c"))
        manifest.write(tmp_path)
        with pytest.raises(BundleError, match="there are 4 classes, but the output probs has shape N x 3"):
            open_bundle(tmp_path)
        unchecked = Bundle(tmp_path, manifest, "")
        for runner in (OnnxRuntimeRunner(unchecked), OpenVinoRunner(unchecked)):
            with pytest.raises(BundleError, match="does not fit its manifest: there are 4 classes"):
                runner.activate()


def test_a_key_that_appears_twice_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"block": 0.7', '"block": 0.7, "block": 1'))
    with pytest.raises(BundleError, match="the key 'block' appears twice"):
        open_bundle(folder)


Spoil = Callable[[onnx.ModelProto], None]


def external(tensor: TensorProto, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def outside(location: str) -> Spoil:
    return lambda model: external(next(each for each in model.graph.initializer if each.name == "weights"), location)


def in_a_branch(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "hidden")
    external(tensor, "elsewhere")
    branch = helper.make_graph([helper.make_node("Constant", [], ["x"], value=tensor)], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch))


def in_a_function(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "hidden")
    external(tensor, "elsewhere")
    node = helper.make_node("Constant", [], ["x"], value=tensor)
    model.functions.append(helper.make_function("local", "f", [], ["x"], [node], [helper.make_opsetid("", 20)]))


def with_node(op: str, domain: str) -> Spoil:
    return lambda model: model.graph.node.append(helper.make_node(op, ["logits"], ["more"], domain=domain))


def fixed_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def rgb_as_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 16, 16, 3), np.uint8), "rgb"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (outside("weights.bin"), r"keeps weights in 'weights\.bin', which the manifest does not list"),
        (outside("/etc/passwd"), "keeps weights in '/etc/passwd'"),
        (outside("../guard.fp32.onnx"), r"keeps weights in '\.\./guard"),
        (outside("*/_ORT_MEM_ADDR_/*"), "keeps weights in"),
        (outside("\x1b[2J"), r"keeps weights in '\\x1b\[2J'"),
        (in_a_branch, "keeps weights in 'elsewhere'"),
        (in_a_function, "keeps weights in 'elsewhere'"),
        (with_node("Evil", "com.example"), r"needs the operators 'com\.example'"),
        (with_node("EPContext", "com.microsoft"), "needs the operators 'EPContext'"),
        (with_node("Loop", ""), "needs the operators 'Loop'"),
        (with_node("RandomNormalLike", ""), "needs the operators 'RandomNormalLike'"),
        (fixed_batch, "not those that the manifest states"),
        (rgb_as_weight, "the input must be rgb"),
    ],
)
def test_a_graph_that_loads_or_runs_something_else_is_refused(spoil: Spoil, message: str, tmp_path: Path) -> None:
    model = guard_graph()
    spoil(model)
    stated = onnx_file(tmp_path)
    file = listed(tmp_path, stated.path, model.SerializeToString(), **stated.model_dump(include=KEPT))
    manifest_of([file]).write(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(36))
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(tmp_path)
    assert is_plain(str(caught.value))


KEPT = {"kind", "precision", "inputs", "outputs"}


def test_weights_that_are_listed_are_taken(tmp_path: Path) -> None:
    wide = {"weights": np.zeros((3, 300), np.float32)}  # the only weight that is large enough to lie outside
    names = ("safe", *map(str, range(299)))
    stated = onnx_file(tmp_path, **wide).model_dump(include=KEPT)
    onnx.save(
        guard_graph(**wide), tmp_path / "g.onnx", save_as_external_data=True, location="g.data", size_threshold=99
    )
    file = listed(tmp_path, "g.onnx", (tmp_path / "g.onnx").read_bytes(), **stated)
    data = listed(tmp_path, "g.data", (tmp_path / "g.data").read_bytes(), kind="onnx_data", precision="fp32")
    manifest_of([file, data], classes=names).write(tmp_path)
    with OnnxRuntimeRunner(open_bundle(tmp_path)) as runner:
        assert runner.infer(np.zeros((2, 16, 16, 3), np.uint8)).probs.shape == (2, 300)
    manifest_of([file], classes=names).write(tmp_path)
    with pytest.raises(BundleError, match=r"keeps weights in 'g\.data'"):
        open_bundle(tmp_path)


def test_the_tables_of_the_onnx_format_are_onnx_own() -> None:
    """Every message of onnx that leads to a tensor or node is followed, under its own number."""
    described = dict(messages(onnx.ModelProto.DESCRIPTOR))
    leads = {"TensorProto", "NodeProto"}
    while more := {name for name, each in described.items() if leads & inner(each)} - leads:
        leads |= more
    for name, each in described.items():
        wanted = {field.number for field in each.fields if field.message_type and field.message_type.name in leads}
        if name in leads:
            assert wanted <= CHILDREN[name].keys(), name
        for number, kind in CHILDREN.get(name, {}).items():
            assert kind.endswith(each.fields_by_number[number].message_type.name), (name, number)
        for number, text in {**TEXTS.get(name, {}), **NUMBERS.get(name, {})}.items():
            assert each.fields_by_number[number].name == text
    assert {*CHILDREN, *TEXTS, *NUMBERS} <= described.keys()


def messages(descriptor: Any, seen: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any]]:
    todo, done = [descriptor], set()
    while todo:
        each = todo.pop()
        name = each.full_name.removeprefix("onnx.")
        if name not in done:
            done.add(name)
            yield name, each
            todo += [field.message_type for field in each.fields if field.message_type is not None]


def inner(descriptor: Any) -> set[str]:
    return {field.message_type.name for field in descriptor.fields if field.message_type is not None}


@PROFILE
@given(data=st.data())
def test_a_damaged_graph_is_read_as_onnx_reads_it_or_refused(data: st.DataObject, tmp_path_factory: Any) -> None:
    content = bytearray(guard_graph().SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        facts = read_onnx(path)
    except BundleError as error:
        assert is_plain(str(error))
        return
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # whatever protobuf raises: what it cannot read, a runtime cannot either
        return
    places = {
        entry.value
        for tensor in [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute)]
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert places <= facts.external
    assert [each.name for each in facts.outputs] == [each.name for each in model.graph.output]


def test_links_and_special_files_in_a_bundle_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").rename(tmp_path / "elsewhere.json")
    (folder / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        open_bundle(folder)
    (folder / "manifest.json").unlink()
    (tmp_path / "elsewhere.json").rename(folder / "manifest.json")
    open_bundle(folder)
    (folder / "guard.fp32.onnx").unlink()
    os.mkfifo(folder / "guard.fp32.onnx")
    with pytest.raises(BundleError, match="a FIFO"):
        open_bundle(folder)


def test_links_out_of_a_gguf_folder_are_refused(gguf_folder: Callable[[str], Path], tmp_path: Path) -> None:
    made = gguf_folder("tiny-safegem")
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        open_gguf(tmp_path)
    (tmp_path / "gguf.json").unlink()
    (tmp_path / "gguf.json").write_bytes((made / "gguf.json").read_bytes())
    with pytest.raises(BundleError, match="leads out of the bundle"):
        open_gguf(tmp_path)
    (tmp_path / "gguf.json").unlink()
    os.mkfifo(tmp_path / "gguf.json")
    with pytest.raises(BundleError, match=r"gguf\.json cannot be read: a FIFO"):
        open_gguf(tmp_path)


GGUF_CHANGES = [
    ("classes", ["safe"] * 20, "appears twice"),
    ("image_tokens", 10**9, "less than or equal to"),
    ("image_tokens", 4.0, "valid integer"),
    ("heads.0.widths.0", 7, "different widths|F32|is missing"),
    ("schema_version", True, "schema_version True is unknown"),
    ("files.0.path", "../model.gguf", "plain relative path"),
]


@pytest.mark.parametrize(("path", "value", "message"), GGUF_CHANGES)
def test_a_gguf_manifest_is_checked_as_a_bundles_is(
    path: str, value: Any, message: str, gguf_folder: Callable[[str], Path]
) -> None:
    content = json.loads((gguf_folder("tiny-safegem") / "gguf.json").read_text())
    if path == "heads.0.widths.0":
        content["heads"].append(
            {**content["heads"][0], "kind": "distilled", "widths": list(content["heads"][0]["widths"])}
        )
    with pytest.raises(BundleError, match=message):
        GgufManifest.from_bytes(changed(content, path, value), where="gguf.json")


@PROFILE
@given(data=st.data())
def test_a_manifest_is_an_object_or_a_line(data: st.DataObject, tmp_path_factory: Any) -> None:
    base = tmp_path_factory.getbasetemp() / "properties"
    if not base.exists():
        base.mkdir()
        file = onnx_file(base)
        manifest_of([file], thresholds=(fitted(file, 0.7, 0.2),)).write(base)
    text = data.draw(mutated(json.loads((base / "manifest.json").read_text())))
    try:
        manifest = Manifest.from_bytes(text, where="manifest.json")
    except BundleError as error:
        assert is_plain(str(error)) and len(str(error)) < 2_000
        return
    assert Manifest.from_bytes(manifest.to_json().encode(), where="again") == manifest
    for band in [entry.pooled for entry in manifest.thresholds or ()]:
        assert 0 <= band.allow <= band.block <= 1


@pytest.mark.parametrize(
    "text",
    [
        '{"guard": {"block": 2, "allow": 0}}',
        '{"exact": {"block": 1.0000001, "allow": 0.1}}',
        '{"exact": {"block": 1, "allow": 1}}',
        '{"guard": {"block": true, "allow": 0}}',
        '{"guard": {"block": "0.5", "allow": 0}}',
        '{"guard": {"block": 1e999, "allow": 0}}',
        '{"guard": {"block": 0.5, "block": 1, "allow": 0}}',
        '{"classes": {"\\u001b[2J": "allow", "x": 3}}',
        '{"confirm": 1}',
    ],
)
def test_a_policy_that_never_blocks_or_means_two_things_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_policy(path)
    assert is_plain(str(caught.value))


def test_a_policy_in_toml_is_read_as_strictly(tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    path = tmp_path / "policy.toml"
    path.write_text('[classes]\nweapon = "allow"\n[guard]\nblock = 1\nallow = 0.5\n')
    assert read_policy(path).classes == {"weapon": "allow"}
    for text in ("[guard]\nblock = 2\nallow = 0\n", "[guard]\nblock = nan\nallow = 0\n", "confirm = 1\nconfirm = 2\n"):
        path.write_text(text)
        with pytest.raises(InputError):
            read_policy(path)


def test_the_command_ends_with_2_and_a_plain_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safevlm.terminal.commandline import run

    image = picture(folder / "green.png", GREEN)
    manifest = folder / "manifest.json"
    honest = manifest.read_text()
    for name, text in [("x" * 5_000, honest), ("bundle", honest.replace('"weapon"', '"wea\\u001b[2J\\u202epon"'))]:
        manifest.write_text(text)
        with pytest.raises(SystemExit) as ended:
            run(check, [str(folder.with_name(name)), str(image)])
        printed = capsys.readouterr()
        assert ended.value.code == 2 and printed.out == "" and is_plain(printed.err.rstrip("\n"))
