"""The runner contract: what goes in and comes out is checked, whoever computes it."""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.fake_runner import FakeRunner
from runtimes.guard.judge import Guard
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.openvino_runner import OpenVinoRunner
from runtimes.guard.runner import GuardOutput, GuardRunner
from runtimes.guard.select import select_runner
from runtimes.guard.torch_runner import TorchRunner
from safevlm.errors import BundleError, BusyError, InputError, MissingExtraError, SafeVLMError
from safevlm.terminal.printable import is_plain
from tests.runtimes.bundles import (
    CLASSES,
    PREPROCESSING,
    SIZE,
    TOKENS,
    WEIGHTS,
    WIDTH,
    guard_graph,
    listed,
    manifest_of,
    onnx_file,
    write_bundle,
    write_parts,
)

RGB = np.random.default_rng(1).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)


def expected(rgb: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    logits = PREPROCESSING.normalise(rgb).mean(axis=(2, 3)) @ WEIGHTS
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return open_bundle(write_bundle(tmp_path / "b"))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnx_runtime_equals_numpy_at_every_batch(bundle: Bundle, count: int) -> None:
    with OnnxRuntimeRunner(bundle, threads=1) as runner:
        output = runner.infer(RGB[:count])
    assert np.abs(output.probs - expected(RGB[:count])).max() < 1e-5
    assert output.logits.shape == output.probs.shape == (count, len(CLASSES))


@pytest.mark.parametrize("count", [1, 5])
def test_openvino_equals_numpy_at_every_batch(bundle: Bundle, count: int) -> None:
    with OpenVinoRunner(bundle, threads=1) as runner:
        output = runner.infer(RGB[:count])
        again = runner.infer(RGB[:1])
    assert np.abs(output.probs - expected(RGB[:count])).max() < 1e-5, "an earlier answer is not overwritten"
    assert np.array_equal(again.probs, output.probs[:1])
    assert output.logits.shape == output.probs.shape == (count, len(CLASSES))


@pytest.mark.parametrize("kind", [OpenVinoRunner, OnnxRuntimeRunner])
def test_the_real_runtimes_judge_right_or_refuse_under_many_threads(kind: Any, bundle: Bundle) -> None:
    wanted = expected(RGB)
    found: list[tuple[int, Any]] = []

    def ask(first: int) -> None:
        for number in range(40):
            at = (first + number) % len(RGB)
            with contextlib.suppress(BusyError):
                found.append((at, runner.infer(RGB[at : at + 1]).probs[0]))

    with kind(bundle, threads=1) as runner:
        threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found and all(np.abs(probs - wanted[at]).max() < 1e-5 for at, probs in found)
    assert kind.exclusive or len(found) == 160


def test_openvino_says_what_is_missing_or_broken(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    file = bundle.file()
    (bundle.folder / file.path).write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"guard\.fp32\.onnx: OpenVINO .* cannot load it: .*Export the bundle again"):
        OpenVinoRunner(bundle).activate()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"safevlm-edge\[openvino\]"):
        OpenVinoRunner(bundle).activate()


@pytest.mark.parametrize(
    "rgb",
    [
        RGB[0],
        RGB[:, :-1],
        RGB[:0],
        RGB.astype(np.float32),
        RGB.transpose(0, 3, 1, 2),
        np.concatenate([RGB, RGB], axis=3),
    ],
)
def test_an_input_of_another_shape_or_type_is_refused(bundle: Bundle, rgb: np.ndarray[Any, Any]) -> None:
    with (
        OnnxRuntimeRunner(bundle, threads=1) as runner,
        pytest.raises(InputError, match=r"uint8 of shape N x 16 x 16 x 3 .*Preprocessing\.apply"),
    ):
        runner.infer(rgb)


def test_an_input_that_is_not_contiguous_is_judged_right(bundle: Bundle) -> None:
    flipped = RGB[:, ::-1, ::-1]
    with OnnxRuntimeRunner(bundle, threads=1) as runner:
        assert np.abs(runner.infer(flipped).probs - expected(flipped)).max() < 1e-5


def test_a_runner_that_is_not_entered_refuses(bundle: Bundle) -> None:
    runner = OnnxRuntimeRunner(bundle)
    with pytest.raises(SafeVLMError, match="OnnxRuntimeRunner is not active"):
        runner.infer(RGB)
    with runner:
        runner.activate()
        runner.infer(RGB)
    runner.deactivate()
    with pytest.raises(SafeVLMError, match="not active"):
        runner.infer(RGB)


def test_what_onnx_runtime_cannot_load_is_a_bundle_error(tmp_path: Path) -> None:
    broken = listed(tmp_path, "broken.onnx", b"\x08\x07no graph", kind="onnx", precision="fp16")
    named = onnx_file(tmp_path, "named.onnx", "int8", output="scores").model_copy(update={"outputs": (), "inputs": ()})
    bundle = Bundle(tmp_path, manifest_of([onnx_file(tmp_path), broken, named]), "0" * 64)  # not checked
    with pytest.raises(BundleError, match=r"broken\.onnx: ONNX Runtime .* cannot load it: .*Export the bundle again"):
        OnnxRuntimeRunner(bundle, bundle.file("fp16")).activate()
    with pytest.raises(
        BundleError, match=r"does not fit its manifest: the output probs is missing; the outputs are scores"
    ):
        OnnxRuntimeRunner(bundle, bundle.file("int8")).activate()


def test_onnx_runtime_missing_names_its_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'onnxruntime'.*pip install"):
        OnnxRuntimeRunner(bundle).activate()


def test_an_answer_that_is_no_probability_is_refused(tmp_path: Path) -> None:
    graph = onnx_file(tmp_path, "nan.onnx", "fp16", weights=np.full((3, 3), np.inf, np.float32))
    bundle = open_bundle(write_bundle(tmp_path, graph))
    with (
        OnnxRuntimeRunner(bundle, bundle.file("fp16"), 1) as runner,
        pytest.raises(SafeVLMError, match="not finite numbers for 2 of 2 images: no verdict"),
    ):
        runner.infer(RGB[:2])


def test_a_runtime_that_fails_on_an_image_is_reported_and_not_a_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = guard_graph(output="softmax")
    sizes = {"petabytes": np.array([2**50], np.int64), "nothing": np.float32(0)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(each), name) for name, each in sizes.items())
    model.graph.node.extend(
        [
            helper.make_node("ConstantOfShape", ["petabytes"], ["large"], name="\x1b[2J"),
            helper.make_node("ReduceMax", ["large"], ["greatest"], keepdims=0),
            helper.make_node("Mul", ["greatest", "nothing"], ["zero"]),
            helper.make_node("Add", ["softmax", "zero"], ["probs"]),
        ]
    )
    model.graph.output[0].name = "probs"
    file = listed(tmp_path, "hungry.onnx", model.SerializeToString(), kind="onnx", precision="fp16")
    bundle = open_bundle(write_bundle(tmp_path, file))
    with OnnxRuntimeRunner(bundle, bundle.file("fp16"), 1) as runner:
        with pytest.raises(SafeVLMError, match=r"onnxruntime could not run the guard: .*ConstantOfShape") as caught:
            runner.infer(RGB[:2])
        judged = Guard(runner, CLASSES).judge([Image.fromarray(RGB[0])])
    assert [each.verdict for each in judged] == ["error"]
    assert is_plain(str(caught.value)) and capfd.readouterr() == ("", "")


class Stated(GuardRunner):
    """Answer with what it is given."""

    runtime = "stated"

    def __init__(self, probs: np.ndarray[Any, Any], logits: np.ndarray[Any, Any] | None = None) -> None:
        super().__init__()
        self.preprocessing = PREPROCESSING
        self.class_count = 3
        self.output = GuardOutput(probs=probs, logits=np.zeros((2, 3), np.float32) if logits is None else logits)
        self.closed = 0

    def _activate(self) -> None:
        if self.output.probs.size == 0:
            raise BundleError("nothing to load")

    def _run(self, rgb: Any) -> GuardOutput:
        return self.output

    def _deactivate(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    ("probs", "logits", "message"),
    [
        (np.full((2, 3), 0.5, np.float32), None, "not probabilities .sums 1.5"),
        (np.array([[1.5, -0.5, 0]] * 2, np.float32), None, "minimum -0.5"),
        (np.full((1, 3), 1 / 3, np.float32), None, r"probs of float32 \(1, 3\), not float32 \(2, 3\)"),
        (np.full((2, 4), 1 / 4, np.float32), None, r"\(2, 4\)"),
        (np.full((2, 3), 1 / 3), None, "probs of float64"),
        (
            np.full((2, 3), 1 / 3, np.float32),
            np.full((2, 3), np.nan, np.float32),
            "logits that are not finite",
        ),
    ],
)
def test_every_answer_is_checked(probs: Any, logits: Any, message: str) -> None:
    with Stated(probs, logits) as runner, pytest.raises(SafeVLMError, match=message):
        runner.infer(RGB[:2])
    assert runner.closed == 1


def test_an_activation_that_fails_gives_back_what_it_took() -> None:
    runner = Stated(np.zeros((0, 3), np.float32))
    with pytest.raises(BundleError, match="nothing to load"):
        runner.activate()
    assert runner.closed == 1


def test_the_fake_is_deterministic_and_looks_at_each_picture_alone() -> None:
    with FakeRunner(PREPROCESSING, 3) as runner:
        whole = runner.infer(RGB).probs
        assert np.allclose(whole, np.concatenate([runner.infer(RGB[i : i + 1]).probs for i in range(5)]), atol=1e-6)
        assert runner.judged == 10 and len({*whole[:, 0]}) == 5


def test_the_fake_gives_the_probabilities_it_was_told() -> None:
    rows = np.array([[0.9, 0.1, 0], [0.2, 0.3, 0.5]], np.float32)
    with FakeRunner(PREPROCESSING, 3, probs=rows) as runner:
        assert np.allclose(runner.infer(RGB[:3]).probs, rows[[0, 1, 0]], atol=1e-6)
        assert np.allclose(runner.infer(RGB[:1]).probs, rows[[1]], atol=1e-6)
    with (
        FakeRunner(PREPROCESSING, 3, probs=[0.5, 0.5]) as runner,
        pytest.raises(SafeVLMError, match="2 values for 3"),
    ):
        runner.infer(RGB)


def test_the_fake_fails_as_told() -> None:
    with (
        FakeRunner(PREPROCESSING, 3, failure=TimeoutError("slow")) as runner,
        pytest.raises(TimeoutError, match="slow"),
    ):
        runner.infer(RGB)
    with FakeRunner(PREPROCESSING, 3, not_a_number=True) as runner, pytest.raises(SafeVLMError, match="not finite"):
        runner.infer(RGB)


def test_the_torch_runner_runs_the_reference_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Reference(torch.nn.Module):
        preprocessing = PREPROCESSING

        def forward(self, rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert rgb.dtype == torch.uint8 and not self.training and torch.is_inference_mode_enabled()
            normal = torch.from_numpy(PREPROCESSING.normalise(rgb.numpy()))
            logits = normal.mean(dim=(2, 3)) @ torch.from_numpy(WEIGHTS)
            return logits.softmax(-1), logits

    asked = []

    def build(checkpoint: str, *, grid: tuple[int, int]) -> Reference:
        asked.append((checkpoint, grid))
        return Reference()

    stub = ModuleType("safevlm.network.reference")
    stub.build_reference_guard = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "safevlm.network.reference", stub)
    with TorchRunner("checkpoint", grid=(SIZE, SIZE)) as runner:
        assert np.abs(runner.infer(RGB).probs - expected(RGB)).max() < 1e-5
        assert runner.preprocessing == PREPROCESSING
    assert asked == [("checkpoint", (SIZE, SIZE))]


def test_runners_are_chosen_by_name(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(select_runner(bundle), OnnxRuntimeRunner)
    chosen = select_runner(bundle, "onnxruntime", precision="fp32", threads=3)
    assert isinstance(chosen, OnnxRuntimeRunner) and chosen.threads == 3
    with pytest.raises(InputError, match="unknown runtime 'vulkan'; allowed: auto, onnxruntime, openvino, ten"):
        select_runner(bundle, "vulkan")
    with pytest.raises(InputError, match="threads must be at least 1"):
        select_runner(bundle, threads=0)
    with pytest.raises(InputError, match="leave --precision out"):
        select_runner(bundle, "torch", precision="fp32")
    asked: dict[str, Any] = {}

    def opened(model: str, **named: Any) -> str:
        asked.update(model=model, **named)
        return "opened"

    monkeypatch.setitem(sys.modules, "safevlm.checkpoint.checkpoint", SimpleNamespace(open_checkpoint=opened))
    runner = select_runner(bundle, "torch")
    assert isinstance(runner, TorchRunner) and runner.checkpoint == "opened" and runner.grid == (SIZE, SIZE)
    assert asked == {"model": "tiny-safegem", "tap": "projector", "revision": None}


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_the_torch_runner_takes_real_checkpoints(family: str, tmp_path: Path) -> None:
    from safevlm.checkpoint.checkpoint import open_checkpoint
    from tests.safevlm.checkpoint.random_checkpoints import write_checkpoint

    checkpoint = open_checkpoint(str(write_checkpoint(family, "hf", tmp_path).folder), tap="projector")
    with TorchRunner(checkpoint) as runner:
        size = runner.preprocessing
        grid = (size.height, size.width)
        rgb = np.random.default_rng(0).integers(0, 256, (2, *grid, 3), dtype=np.uint8)
        output = runner.infer(rgb)
    assert output.probs.shape == (2, len(checkpoint.classes))
    with TorchRunner(checkpoint, grid=grid) as runner:
        assert np.array_equal(runner.infer(rgb).probs, output.probs)


def test_a_part_is_run_as_its_file_stands_and_takes_nothing_else(tmp_path: Path) -> None:
    bundle = open_bundle(write_parts(tmp_path))
    vision, head = (OnnxRuntimeRunner(bundle, bundle.files("onnx", role)[0], 1) for role in ("vision", "head"))
    rgb = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    with vision, head:
        hidden = vision.run_file(rgb)["embeddings"]
        assert hidden.shape == (3, TOKENS, WIDTH)
        assert np.allclose(head.run_file(hidden)["probs"].sum(axis=1), 1, atol=1e-5)
        for wrong in (rgb[0], rgb[:0], rgb[:, 1:], rgb.astype(np.float32)):
            with pytest.raises(InputError, match="a guard takes uint8"):
                vision.run_file(wrong)
        for wrong in (hidden[0], hidden[:0], hidden.astype(np.float64), hidden * np.nan, rgb):
            with pytest.raises(InputError, match="a guard's head takes finite hidden states"):
                head.run_file(wrong)
        with pytest.raises(SafeVLMError, match="could not run the guard"):
            head.run_file(hidden[:, :, :1])
        with pytest.raises(SafeVLMError, match=r"returned embeddings .* not finite"):
            vision._run_file = lambda inputs: {"embeddings": hidden * np.inf}  # type: ignore[method-assign]
            vision.run_file(rgb)
