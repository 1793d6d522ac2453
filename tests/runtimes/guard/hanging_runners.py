"""Every runner of this project on a runtime whose steps can be made to hang or to fail: for ``test_activation``.

TensorRT, OpenVINO and torch are stand-ins that keep a call's image in memory which they use again, as the real ones
do or may; ONNX Runtime and llama.cpp are the real ones, stopped before and after their own calls.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from runtimes.guard.activation import Activated
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.fake_runner import FakeRunner
from runtimes.guard.runner import GuardRunner
from runtimes.language.gguf_artifact import open_gguf
from runtimes.language.language import LanguageRunner
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import SafeVLMError
from tests.runtimes.bundles import CLASSES, PREPROCESSING, SIZE, WEIGHTS, engine_file, write_bundle
from tests.runtimes.guard.fake_tensorrt import install

__all__ = ["SECONDS", "SUBJECTS", "Hang", "Place", "Subject", "busy", "open_subject", "same"]

SECONDS = 600.0
"""Longest wait for what must happen: it ends a test that would hang, and decides nothing."""
QUESTION = "Where is the square?"
NEW_TOKENS = 4
BATCH = 5
"""More than the TensorRT stand-in takes at once, so that a call has parts."""


class StepError(Exception):
    """A step of a runtime failed as it was told to."""


class Hang:
    """Told each step of a runtime: the armed one blocks until it is released, or fails."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: tuple[str, int, bool] | None = None
        self.reached, self.released = threading.Event(), threading.Event()

    def arm(self, step: str, nth: int = 0, *, fails: bool = False) -> None:
        """Let the n-th such step from now on hang, or fail."""
        with self._lock:
            self._armed = (step, nth, fails)
            self.reached, self.released = threading.Event(), threading.Event()

    def __call__(self, step: str) -> None:
        with self._lock:
            if self._armed is None or self._armed[0] != step:
                return
            name, nth, fails = self._armed
            self._armed = (name, nth - 1, fails) if nth else None
            if nth:
                return
            reached, released = self.reached, self.released
        reached.set()
        if fails:
            raise StepError(f"{step} failed")
        assert released.wait(SECONDS)

    def wrap(self, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let a function of a library be two steps: before and after what it does."""
        done = getattr(owner, name)

        def stepped(*given: Any, **named: Any) -> Any:
            self(f"before {name}")
            found = done(*given, **named)
            self(f"after {name}")
            return found

        monkeypatch.setattr(owner, name, stepped)


@dataclass(kw_only=True)
class Subject:
    """A runner, not yet active, and what it should say of the n-th image."""

    runner: Activated
    images: list[Any]
    held: Callable[[], int] = lambda: 0
    """How many of the runtime's resources are held that must be freed by hand."""
    right: list[tuple[Any, ...]] = field(default_factory=list)

    def ask(self, at: int) -> tuple[Any, ...]:
        """Return everything that the runner says of an image."""
        return asked(self.runner, self.images[at])

    def outcome(self, at: int) -> tuple[Any, ...] | Exception:
        """Return what it says, or why it does not."""
        try:
            return self.ask(at)
        except (SafeVLMError, StepError) as error:
            return error


def asked(runner: Any, rgb: Any) -> tuple[Any, ...]:
    if isinstance(runner, GuardRunner):
        batch = np.stack([rgb, 255 - rgb] * BATCH)[:BATCH]
        found = runner.infer(batch, embeddings=runner.gives_embeddings)
        first, second, third, *_ = found.logits
        assert np.allclose(first, third, atol=1e-3) and not np.allclose(first, second, atol=1e-3), "rows are mixed up"
        return found.probs, found.logits, found.embeddings
    if isinstance(runner, LanguageRunner):
        prefilled = runner.prefill(rgb, QUESTION)
        return prefilled.exact_probs, "".join(runner.stream(prefilled.handle, NEW_TOKENS))
    with runner.using() as llama:
        return (llama.encode(rgb),)


def same(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    """Compare what two calls said; up to rounding, which a runtime's threads may order otherwise."""
    return all(
        one == other if one is None or isinstance(one, str) else np.allclose(one, other, atol=1e-4)
        for one, other in zip(found, wanted, strict=True)
    )


@contextmanager
def busy(runner: Activated) -> Iterator[None]:
    """Let a call of a runner be under way, as one that hangs."""
    call = runner._call()
    call.__enter__()
    try:
        yield
    finally:
        with suppress(SafeVLMError):  # the runner was deactivated meanwhile
            call.__exit__(None, None, None)


# -- the runtimes ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a stand-in is made with."""

    hang: Hang
    monkeypatch: pytest.MonkeyPatch
    folder: Path
    gguf_folder: Callable[[str], Path]

    def bundle(self, **engine: Any) -> Bundle:
        return open_bundle(write_bundle(self.folder, engine_file(self.folder, **engine)))


def coloured(count: int = 8) -> list[Any]:
    """Return images of one colour each and some noise: no two have nearly the same verdict."""
    rng = np.random.default_rng(7)
    colours = rng.permutation(np.linspace(0, 200, 3 * count)).reshape(count, 1, 1, 3)
    return list((colours + rng.integers(0, 40, (count, SIZE, SIZE, 3))).astype(np.uint8))


def drawn(preprocessing: Preprocessing) -> list[Any]:
    """Return four images of different classes, as the tiny checkpoints know them."""
    by_label = {each.scene.label: each for each in build_suite("test", pairs=100, questions=0).pictures}
    return [preprocessing.apply(draw(by_label[label].scene)) for label in sorted(by_label)[:4]]


def judged(rgb: Any) -> tuple[Any, Any]:
    """Return what the guard of ``bundles`` says, in numpy."""
    logits = (rgb.reshape(len(rgb), -1, 3).mean(axis=1) / 127.5 - 1) @ WEIGHTS
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32), logits.astype(np.float32)


def tensorrt(place: Place) -> Subject:
    cuda, _ = install(place.monkeypatch, place.hang)
    from runtimes.guard.tensorrt_runner import TensorRTRunner

    return Subject(runner=TensorRTRunner(place.bundle()), images=coloured(), held=lambda: len(cuda.held))


class _Request:
    """OpenVINO's infer request: one memory for the input, one for each output."""

    def __init__(self, hang: Hang) -> None:
        self.hang = hang
        self.input = np.zeros((1, SIZE, SIZE, 3), np.uint8)
        self.outputs = {name: np.zeros((1, len(CLASSES)), np.float32) for name in ("probs", "logits")}

    def infer(self, given: list[Any]) -> dict[str, Any]:
        self.input[:] = given[0]
        self.hang("input")
        probs, logits = judged(self.input)
        self.outputs["probs"][:], self.outputs["logits"][:] = probs, logits
        self.hang("output")
        return self.outputs


def openvino(place: Place) -> Subject:
    import openvino as library

    compiled = SimpleNamespace(create_infer_request=lambda: _Request(place.hang))
    core = SimpleNamespace(
        read_model=library.Core().read_model,
        compile_model=lambda model, device, settings: compiled,
    )
    place.monkeypatch.setattr(library, "Core", lambda: core)
    from runtimes.guard.openvino_runner import OpenVinoRunner

    return Subject(runner=OpenVinoRunner(place.bundle()), images=coloured())


def onnxruntime(place: Place) -> Subject:
    import onnxruntime as library

    place.hang.wrap(library.InferenceSession, "run", place.monkeypatch)
    from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner

    return Subject(runner=OnnxRuntimeRunner(place.bundle(), threads=1), images=coloured())


class _Scratch(torch.nn.Module):
    """A guard whose layers keep what they work on, as a module may."""

    preprocessing = PREPROCESSING

    def __init__(self, hang: Hang) -> None:
        super().__init__()
        self.hang = hang
        self.pixels = np.zeros((BATCH, SIZE, SIZE, 3), np.uint8)

    def forward(self, rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.pixels[:] = rgb.numpy()
        self.hang("forward")
        probs, logits = judged(self.pixels)
        self.hang("forwarded")
        return torch.from_numpy(probs), torch.from_numpy(logits)


def torch_guard(place: Place) -> Subject:
    stub: Any = ModuleType("safevlm.network.reference")
    stub.build_reference_guard = lambda checkpoint, grid: _Scratch(place.hang)
    place.monkeypatch.setitem(sys.modules, "safevlm.network.reference", stub)
    from runtimes.guard.torch_runner import TorchRunner

    return Subject(runner=TorchRunner("checkpoint"), images=coloured())


def reference(place: Place) -> Subject:
    from benchmarks.speed import reference_runner

    place.monkeypatch.setattr(reference_runner, "build_guard", lambda subject: (_Scratch(place.hang), 0, ""))
    subject: Any = None
    return Subject(runner=reference_runner.ReferenceRunner(subject, "cpu"), images=coloured())


class _HangingFake(FakeRunner):
    """The fake with steps."""

    hang: Hang

    def _logits(self, rgb: Any, judged: int) -> Any:
        self.hang("before")
        found = super()._logits(rgb, judged)
        self.hang("after")
        return found


def fake(place: Place) -> Subject:
    runner = _HangingFake(PREPROCESSING, len(CLASSES))
    runner.hang = place.hang
    return Subject(runner=runner, images=coloured())


def torch_language(place: Place) -> Subject:
    from runtimes.language.torch_language import TorchLanguageRunner
    from safevlm.checkpoint.checkpoint import open_checkpoint
    from safevlm.network.safe_vlm import SafeVLM

    for name in ("image_features", "language_forward", "token_logits"):
        place.hang.wrap(SafeVLM, name, place.monkeypatch)
    checkpoint = open_checkpoint("tiny-safegem")
    size = read_processor(checkpoint.processor, family=checkpoint.family.key)
    return Subject(runner=TorchLanguageRunner(checkpoint), images=drawn(size))


def exact_guard(place: Place) -> Subject:
    from runtimes.language.exact_guard import ExactGuardRunner

    language: Any = torch_language(place).runner
    size = read_processor(language.model.processor, family=language.model.family.key)
    return Subject(runner=ExactGuardRunner(language, size, language.model.classes), images=drawn(size))


LLAMA_STEPS = ("llama_decode", "llama_get_logits_ith", "llama_memory_seq_rm")
MTMD_STEPS = ("mtmd_tokenize", "mtmd_encode_chunk", "mtmd_get_output_embd", "mtmd_helper_decode_image_chunk")


def _llamacpp(place: Place, name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return a folder, its session, and a subject's images and what counts its models in memory."""
    from runtimes.language.llamacpp import llama_libraries
    from runtimes.language.llamacpp_language import open_session

    artifact = open_gguf(place.gguf_folder(name), verify=False)
    llama, mtmd = llama_libraries()
    held = [0]
    for owner, names in ((llama, LLAMA_STEPS), (mtmd, MTMD_STEPS)):
        for each in names:
            place.hang.wrap(owner, each, place.monkeypatch)
    load, free = llama.llama_model_load_from_file, llama.llama_model_free

    def counted(given: Callable[..., Any], by: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            held[0] += by
            return given(*arguments)

        return call

    place.monkeypatch.setattr(llama, "llama_model_load_from_file", counted(load, 1))
    place.monkeypatch.setattr(llama, "llama_model_free", counted(free, -1))
    more = {"images": drawn(artifact.manifest.preprocessing), "held": lambda: held[0]}
    return artifact, open_session(artifact, threads=1), more


def llamacpp_guard(place: Place) -> Subject:
    from runtimes.guard.llamacpp_guard import LlamaCppGuardRunner

    artifact, session, more = _llamacpp(place, "tiny-safegem")
    return Subject(runner=LlamaCppGuardRunner(artifact, session), **more)


def llamacpp_language(place: Place) -> Subject:
    from runtimes.language.llamacpp_language import LlamaCppLanguageRunner

    artifact, session, more = _llamacpp(place, "tiny-safellava")
    return Subject(runner=LlamaCppLanguageRunner(artifact, session=session), **more)


def llamacpp_session(place: Place) -> Subject:
    _, session, more = _llamacpp(place, "tiny-safegem")
    return Subject(runner=session, **more)


SUBJECTS: dict[str, tuple[Callable[[Place], Subject], tuple[str, ...]]] = {
    "TensorRTRunner": (tensorrt, ("copy in", "execute", "copy out", "synchronize")),
    "OpenVinoRunner": (openvino, ("input", "output")),
    "OnnxRuntimeRunner": (onnxruntime, ("before run", "after run")),
    "TorchRunner": (torch_guard, ("forward", "forwarded")),
    "ReferenceRunner": (reference, ("forward", "forwarded")),
    "FakeRunner": (fake, ("before", "after")),
    "TorchLanguageRunner": (torch_language, ("before language_forward", "after token_logits")),
    "ExactGuardRunner": (exact_guard, ("before image_features", "after image_features")),
    "LlamaCppGuardRunner": (llamacpp_guard, ("before mtmd_encode_chunk", "after mtmd_encode_chunk")),
    "LlamaCppLanguageRunner": (
        llamacpp_language,
        (
            "after mtmd_encode_chunk",
            "before mtmd_helper_decode_image_chunk",
            "after mtmd_helper_decode_image_chunk",
            "before llama_decode",
            "after llama_decode",
            "before llama_get_logits_ith",
        ),
    ),
    "LlamaSession": (llamacpp_session, ("before mtmd_encode_chunk", "before mtmd_get_output_embd")),
}
"""By class: what makes one, and the steps at which it may hang or fail."""


@contextmanager
def open_subject(name: str, place: Place) -> Iterator[Subject]:
    """Hold a runner that is active, with its right answers: as it gives them one after the other."""
    subject = SUBJECTS[name][0](place)
    with subject.runner:
        subject.right = [subject.ask(at) for at in range(len(subject.images))]
        for at, one in enumerate(subject.right):
            assert not any(same(one, other) for other in subject.right[:at]), "images must be told apart"
        yield subject
