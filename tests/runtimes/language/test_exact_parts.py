"""A guard behind the language model with its parts on other runtimes: the same verdicts, and no part run twice."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.runs.answering.bundle import GatedAnswerer
from benchmarks.runs.record import Row
from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from export.onnx import ExportOptions, export_guard
from runtimes.chat import open_chat
from runtimes.gate.gate import Gate
from runtimes.gate.open import open_gate
from runtimes.gateway.app import Gateway
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.exact_parts import select_parts
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.tensorrt_runner import TensorRTRunner
from runtimes.language.torch_language import TorchLanguageRunner
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.contract.manifest import GuardFile, Manifest
from safevlm.errors import BundleError, InputError, SafeVLMError
from tests.runtimes.bundles import RTX, engine_file
from tests.runtimes.gateway.servers import SAFE, UNSAFE, data_url, messages, png, serving
from tests.runtimes.guard.fake_tensorrt import FakeRtxEngine, FakeRtxRuntime, install_rtx
from tests.runtimes.guard.hanging_runners import busy
from tests.safevlm.checkpoint.passes import Passes

NAME = "tiny-safellava"
QUESTION = "Where is the square?"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of a guard's exact parts, not to be changed."""
    out = tmp_path_factory.mktemp("parts") / "bundle"
    export_guard(open_checkpoint(NAME), out, ExportOptions(parity_images=2))
    return out


@pytest.fixture(scope="module")
def images() -> list[Any]:
    by_label = {each.scene.label: each for each in build_suite("test", pairs=100, questions=0).pictures}
    return [draw(by_label[label].scene) for label in sorted(by_label)[:3]]


@pytest.fixture(scope="module")
def exact(exported: Path, images: list[Any]) -> list[dict[str, float]]:
    """Return what the checkpoint alone says of the images."""
    return verdicts(exported, images, runtime="torch")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class PartEngine(FakeRtxEngine):
    """An engine that answers as the ONNX file that it was built of."""

    def __init__(self, bundle: Bundle, file: GuardFile) -> None:
        self.specs = {each.name: each for each in (*file.inputs, *file.outputs)}
        self.names = tuple(self.specs)
        self.input_type = np.dtype(file.inputs[0].dtype).type
        self.onnx = OnnxRuntimeRunner(bundle, file, 1, providers=["CPUExecutionProvider"])
        self.onnx.activate()
        self.answer = self.onnx.run_file
        self.loaded_kernels = []
        super().__init__()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(map(int, each.shape[1:])) for name, each in self.specs.items()}


@pytest.fixture
def engines(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, PartEngine]]:
    """Return the bundle with an engine of each part, and these engines."""
    folder = tmp_path / "bundle"
    shutil.copytree(exported, folder)
    install_rtx(monkeypatch)
    bundle, made, entries = open_bundle(folder), {}, []
    for file in bundle.files("onnx"):
        made[file.role] = PartEngine(bundle, file)
        content = f"plan of a {file.role}".encode()
        entry = engine_file(folder, role=file.role, precision="fp32", content=content, **RTX)
        entries.append(entry.model_copy(update={"inputs": file.inputs, "outputs": file.outputs}))
    manifest = bundle.manifest
    Manifest.model_validate(
        {**{name: getattr(manifest, name) for name in Manifest.model_fields}, "files": (*manifest.files, *entries)}
    ).write(folder)

    def deserialize(self: Any, content: bytes) -> Any:
        return made[content.decode().rpartition(" ")[2]]

    monkeypatch.setattr(FakeRtxRuntime, "deserialize_cuda_engine", deserialize)
    return folder, made


def verdicts(bundle: Path, images: list[Any], **options: Any) -> list[dict[str, float]]:
    with open_gate(bundle, threads=1, **options) as gate:
        found = [gate.ask(image, QUESTION, max_new_tokens=2) for image in images]
    assert {result.stage for result in found} == {"exact"}, [result.error for result in found]
    return [dict(result.exact_probs or {}) for result in found]


def apart(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> float:
    return max(abs(one[name] - other[name]) for one, other in zip(found, wanted, strict=True) for name in other)


def language(gate: Gate) -> TorchLanguageRunner:
    assert isinstance(gate.language, TorchLanguageRunner)
    return gate.language


def test_the_onnx_files_give_the_checkpoints_own_verdicts(
    exported: Path, images: list[Any], exact: list[dict[str, float]]
) -> None:
    assert apart(verdicts(exported, images, runtime="onnxruntime"), exact) < 1e-4
    with open_gate(exported, runtime="onnxruntime", threads=1) as gate:
        assert language(gate).parts.runtimes == "onnxruntime"
        vlm: Any = language(gate)._vlm
        with Passes(vlm) as passes:
            gate.ask(images[0], QUESTION, max_new_tokens=1)
    assert (passes.tower, passes.head, passes.prefills) == (0, 0, 1)


def test_auto_takes_engines_of_both_parts(
    engines: tuple[Path, dict[str, PartEngine]], images: list[Any], exact: list[dict[str, float]]
) -> None:
    folder, made = engines
    assert apart(verdicts(folder, images), exact) < 1e-4
    with open_chat(folder, threads=1) as chat:
        before = {role: engine.runs for role, engine in made.items()}
        chat.ask(images[0], QUESTION, max_new_tokens=1)
        assert {role: engine.runs - before[role] for role, engine in made.items()} == {"vision": 1, "head": 1}
        assert language(chat).parts.runtimes == "tensorrt"


@pytest.mark.parametrize("role", ["vision", "head"])
def test_a_part_that_differs_is_left_to_the_checkpoint_with_one_line(
    engines: tuple[Path, dict[str, PartEngine]],
    images: list[Any],
    exact: list[dict[str, float]],
    caplog: pytest.LogCaptureFixture,
    role: str,
) -> None:
    folder, made = engines
    right = made[role].answer
    made[role].answer = lambda inputs: {name: values[::-1] * 1.5 for name, values in right(inputs).items()}
    with caplog.at_level(logging.WARNING), open_gate(folder, threads=1) as gate:
        parts = language(gate).parts
    assert (parts.vision is None, parts.head is None) == (role == "vision", role == "head")
    (line,) = [line for line in caplog.messages if line.startswith("torch runs")]
    assert f"engines/{role}.fp32.plan: on Orin it differs" in line
    assert apart(verdicts(folder, images), exact) < 1e-4
    with pytest.raises(BundleError, match="it differs from ONNX Runtime"):
        open_gate(folder, runtime="tensorrt")


def test_a_part_that_is_busy_or_breaks_blocks(engines: tuple[Path, dict[str, PartEngine]], images: list[Any]) -> None:
    folder, made = engines
    with open_gate(folder, threads=1) as gate:
        for part in language(gate).parts.runners:
            with busy(part):
                blocked = gate.ask(images[0], QUESTION, max_new_tokens=1)
            assert (blocked.verdict, blocked.stage, blocked.answer) == ("block", "error", None)
        for engine in made.values():
            engine.context.idle = True
            blocked = gate.ask(images[0], QUESTION, max_new_tokens=1)
            assert blocked.verdict == "block" and "not finite" in (blocked.error or "")
            engine.context.idle = False
        assert gate.ask(images[0], QUESTION, max_new_tokens=1).stage == "exact"


def test_a_part_that_cannot_be_given_back_keeps_the_other_one_from_nothing(
    engines: tuple[Path, dict[str, PartEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = select_parts(open_bundle(engines[0]), "tensorrt")
    parts.activate()
    assert parts.gpu == "Orin"

    def broken() -> None:
        raise SafeVLMError("CUDA: cudaFree failed")

    for runner in parts.runners:
        with monkeypatch.context() as patched:
            patched.setattr(runner, "_deactivate", broken)
            with pytest.raises(SafeVLMError, match="cudaFree"):
                parts.deactivate()
        for each in parts.runners:
            with pytest.raises(SafeVLMError, match="is not active"):
                each.run_file(np.zeros(1))
        parts.activate()
    parts.deactivate()


def test_parts_of_another_checkpoint_are_not_used(
    engines: tuple[Path, dict[str, PartEngine]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = engines
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["source"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert not language(open_gate(folder)).parts.runners
    assert any("they belong to another checkpoint" in line for line in caplog.messages)
    with pytest.raises(InputError, match=r"--runtime onnxruntime: the parts in .* another checkpoint answers"):
        open_gate(folder, runtime="onnxruntime")


def test_one_line_says_why_no_engine_runs(
    engines: tuple[Path, dict[str, PartEngine]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    assert not language(open_gate(engines[0])).parts.runners
    (line,) = caplog.messages
    assert line.startswith("torch runs the checkpoint's own vision tower and guard head (judging with TensorRT needs")


def test_what_cannot_be_had_is_told(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = open_bundle(exported)
    assert not select_parts(bundle).runners and not caplog.messages, "there is no engine to say anything of"
    with pytest.raises(BundleError, match="has no engine file"):
        select_parts(bundle, "tensorrt")
    with pytest.raises(InputError, match="no vision file of precision fp16; it has: fp32"):
        select_parts(bundle, "onnxruntime", precision="fp16")
    with pytest.raises(InputError, match=r"runtime openvino runs only standalone guards.*Use auto, tensorrt"):
        select_parts(bundle, "openvino")


def test_a_run_records_what_the_parts_ran_on(
    engines: tuple[Path, dict[str, PartEngine]], images: list[Any], exact: list[dict[str, float]]
) -> None:
    folder, _ = engines
    classes = open_bundle(folder).manifest.classes
    rows = [Row(id=str(at), kind="pair", query=QUESTION) for at in range(len(images))]
    with GatedAnswerer(folder, NAME, classes, max_new_tokens=2) as answerer:
        description, found = answerer.describe(), answerer.answer(rows, images)
    assert description.runtime.name == "tensorrt + torch" and description.threshold is None
    assert description.runtime.gpu == "Orin", "the language model is on the CPU, and its guard is not"
    probs = [dict(zip(classes, row.probs or (), strict=True)) for row in found]
    assert apart(probs, exact) < 1e-4
    assert [row.blocked for row in found] == ["exact" if one["safe"] <= 0.5 else None for one in exact]


def test_the_gateway_judges_with_the_model_in_its_process(engines: tuple[Path, dict[str, PartEngine]]) -> None:
    folder, made = engines
    gateway = Gateway.open(folder)
    with serving(gateway) as url, httpx.Client(base_url=url, timeout=600) as client:
        before = made["vision"].runs
        answers = []
        for image in (SAFE, UNSAFE):
            body = {"model": "safe-vlm", "max_tokens": 2, "messages": messages(data_url(png(image)), text=QUESTION)}
            answers.append(client.post("/v1/chat/completions", json=body).json())
        assert made["vision"].runs > before
    finishes = [answer["choices"][0]["finish_reason"] for answer in answers]
    assert finishes[0] in ("stop", "length") and finishes[1] == "content_filter"


def test_a_runner_of_engines_serves_both_parts(engines: tuple[Path, dict[str, PartEngine]]) -> None:
    parts = select_parts(open_bundle(engines[0]), precision="fp32")
    assert [type(each) for each in parts.runners] == [TensorRTRunner, TensorRTRunner]
