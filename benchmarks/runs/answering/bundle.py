"""A guard bundle alone (the guard suite), and a bundle with a language model behind it: a gated pair."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from benchmarks.runs.answering.answerer import (
    Description,
    answered,
    checkpoint_artifact,
    class_order,
    decoding_of,
    failed,
    for_row,
    prompt_text,
)
from benchmarks.runs.answering.gguf import gguf_artifact, gguf_runtime
from benchmarks.runs.answering.torch_model import torch_runtime
from benchmarks.runs.record import Artifact, Row, Runtime
from runtimes.gate.open import open_gate
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.exact_parts import ExactParts
from runtimes.guard.judge import Guard
from runtimes.images.tiling import ViewMode
from runtimes.language.language import LanguageRunner
from runtimes.language.llamacpp_language import LlamaCppLanguageRunner
from runtimes.language.torch_language import TorchLanguageRunner
from runtimes.language.writing import Decoding
from safevlm.errors import QuestionError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BundleAnswerer", "GatedAnswerer", "bundle_artifact"]


def bundle_artifact(bundle: Bundle) -> Artifact:
    """Return what a run record says of a bundle; its hash is that of its manifest, which holds its files'."""
    return Artifact(
        name=bundle.folder.name,
        kind="bundle",
        sha256=bundle.digest,
        bytes=sum((bundle.folder / file.path).stat().st_size for file in bundle.manifest.files),
        random_weights=bundle.manifest.source.random_weights,
    )


class BundleAnswerer:
    """Judge the guard suite's images with a bundle."""

    kinds = frozenset({"image"})

    def __init__(
        self,
        bundle: Path,
        classes: Sequence[str],
        *,
        runtime: str = "auto",
        precision: str | None = None,
        batch: int,
        view: ViewMode = "tiles",
    ) -> None:
        self.batch = batch
        self.bundle = open_bundle(bundle)
        self.precision = precision
        self.guard = Guard.open(self.bundle, runtime, precision=precision, batch=batch, view=view)
        self._order = class_order(self.guard.classes, classes, str(bundle))

    def __enter__(self) -> Self:
        self.guard.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.guard.__exit__(kind, error, trace)

    def describe(self) -> Description:
        """Return the bundle, the file that runs, and the threshold fitted for it."""
        file = getattr(self.guard.runner, "file", None)
        artifact = bundle_artifact(self.bundle)
        name = artifact.name if file is None else f"{artifact.name}/{file.path}"
        return Description(
            artifact=artifact.model_copy(update={"name": name}),
            runtime=Runtime(
                name=self.guard.runner.runtime,
                dtype=None if file is None else file.precision,
                batch=self.batch,
                provider=self.guard.runner.provider,
                gpu=self.guard.runner.gpu,
            ),
            preprocessing=self.guard.runner.preprocessing.model_dump(mode="json"),
            threshold=_threshold(self.guard),
            view=self.guard.view,
        )

    def answer(self, rows: Sequence[Row], pictures: Sequence[Image.Image]) -> list[Row]:
        """Judge in one batch."""
        begun = time.perf_counter()
        judgements = self.guard.judge(pictures)
        each_ms = (time.perf_counter() - begun) * 1000 / len(rows)
        found = []
        for row, judgement in zip(rows, judgements, strict=True):
            if judgement.verdict == "error":
                found.append(failed(row, judgement.error or "the guard failed"))
                continue
            probs = np.array([judgement.probs[name] for name in self.guard.classes], np.float32)
            found.append(answered(row, answer=None, probs=probs, order=self._order, ms=each_ms))
        return found


class GatedAnswerer:
    """Answer through the gate: the bundle's guard first, then the language model. What it blocks is refused.

    A bundle of a guard's exact parts gates by the exact verdict, between prefill and answer.
    """

    kinds = frozenset({"pair", "question"})
    batch = 1

    def __init__(
        self,
        bundle: Path,
        model: str | None,
        classes: Sequence[str],
        *,
        max_new_tokens: int,
        revision: str | None = None,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        runtime: str = "auto",
        precision: str | None = None,
        view: ViewMode = "tiles",
        decoding: Decoding | None = None,
    ) -> None:
        self.bundle = open_bundle(bundle)
        self.max_new_tokens = max_new_tokens
        self.decoding = decoding or Decoding()
        self.gate = open_gate(
            self.bundle,
            model,
            runtime=runtime,
            precision=precision,
            device=device,
            dtype=dtype,
            revision=revision,
            view=view,
        )
        self._classes = self.bundle.manifest.classes
        self._order = class_order(self._classes, classes, str(bundle))

    def __enter__(self) -> Self:
        self.gate.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gate.__exit__(kind, error, trace)

    def describe(self) -> Description:
        """Return both parts; the language model's prompt, the guard's threshold."""
        bundle, answers = bundle_artifact(self.bundle), _described(self.gate.language)
        model, guard = answers.artifact, self.gate.guard
        runner = None if guard is None else guard.runner
        parts = _parts(self.gate.language)
        judges = parts.runtimes if runner is None else runner.runtime
        return Description(
            artifact=model.model_copy(
                update={
                    "name": f"{bundle.name} + {model.name}",
                    "kind": "gated",
                    "sha256": f"{bundle.sha256}+{model.sha256}",
                    "bytes": (bundle.bytes or 0) + (model.bytes or 0),
                    "random_weights": bundle.random_weights or model.random_weights,
                }
            ),
            runtime=answers.runtime.model_copy(
                update={
                    "name": " + ".join(name for name in (judges, answers.runtime.name) if name),
                    "provider": answers.runtime.provider if runner is None else runner.provider,
                    "gpu": answers.runtime.gpu or (parts if runner is None else runner).gpu,
                }
            ),
            prompt=answers.prompt,
            preprocessing=answers.preprocessing,
            decoding=decoding_of(self.decoding, self.max_new_tokens),
            threshold=None if guard is None else _threshold(guard),
            view=None if guard is None else guard.view,
        )

    def answer(self, rows: Sequence[Row], pictures: Sequence[Image.Image]) -> list[Row]:
        """Ask the gate about each row; probabilities are the standalone guard's, without one the exact verdict's."""
        return [self._one(row, picture) for row, picture in zip(rows, pictures, strict=True)]

    def _one(self, row: Row, picture: Image.Image) -> Row:
        try:
            result = self.gate.ask(
                picture, row.query or "", max_new_tokens=self.max_new_tokens, decoding=for_row(self.decoding, row)
            )
        except QuestionError as error:
            return failed(row, str(error))
        if result.error is not None:
            return failed(row, f"{result.error_in}: {result.error}")
        stage = result.stage if result.verdict == "block" else None
        probs = None
        stated = result.exact_probs if self.gate.guard is None else result.probs
        if stated is not None:
            probs = np.array([stated[name] for name in self._classes], np.float32)
        return answered(row, answer=result.answer, probs=probs, order=self._order, ms=result.ms["total"], blocked=stage)


def _described(language: LanguageRunner | None) -> Description:
    """Return what is known of the part that answers; it is active."""
    if isinstance(language, LlamaCppLanguageRunner):
        manifest = language.artifact.manifest
        return Description(
            artifact=gguf_artifact(language.artifact),
            runtime=gguf_runtime(),
            prompt=prompt_text(manifest.prompt.format()),
            preprocessing=manifest.preprocessing.model_dump(mode="json"),
        )
    from safevlm.checkpoint.checkpoint import Checkpoint

    assert isinstance(language, TorchLanguageRunner) and isinstance(language.model, Checkpoint)
    assert language.preprocessing is not None
    return Description(
        artifact=checkpoint_artifact(language.model),
        runtime=torch_runtime(language.device, language.dtype, 1),
        prompt=prompt_text(language.model.family.prompt),
        preprocessing=language.preprocessing.model_dump(mode="json"),
    )


def _parts(language: LanguageRunner | None) -> ExactParts:
    """Return the parts of a guard behind the language model; none where the model itself has them."""
    return language.parts if isinstance(language, TorchLanguageRunner) else ExactParts()


def _threshold(guard: Guard) -> float | None:
    """Return the pooled p(unsafe) from which the guard blocks, where one was fitted."""
    return None if guard.thresholds is None else guard.thresholds.pooled.block
