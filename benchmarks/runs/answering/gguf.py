"""GGUF files on llama.cpp: answer and exact verdict from one prefill, a row at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from PIL import Image

from benchmarks.runs.answering.answerer import (
    Description,
    answered,
    class_order,
    decoding_of,
    failed,
    for_row,
    prompt_text,
)
from benchmarks.runs.record import Artifact, Row, Runtime
from runtimes.language.gguf_artifact import GgufArtifact
from runtimes.language.llamacpp_language import LlamaCppLanguageRunner
from runtimes.language.writing import Decoding, Writing
from safevlm.errors import SafeVLMError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GgufAnswerer", "gguf_artifact", "gguf_runtime"]


def gguf_artifact(artifact: GgufArtifact) -> Artifact:
    """Return what a run record says of a folder of GGUF files; its hash is that of its manifest."""
    manifest = artifact.manifest
    importance = manifest.importance
    return Artifact(
        name=f"{manifest.source.checkpoint} {manifest.file('model').type}",
        kind="gguf",
        sha256=artifact.digest,
        revision=manifest.source.revision,
        bytes=sum(file.bytes for file in manifest.files),
        leaked=importance is not None and importance.leaked,
        random_weights=manifest.random_weights,
        compression={
            "source": manifest.source.checkpoint,
            "method": {
                "name": "llama.cpp",
                "type": manifest.file("model").type,
                "mmproj": manifest.file("mmproj").type,
            },
            "calibration": {}
            if importance is None
            else {"sha256": importance.samples_sha256, "samples": importance.samples},
        },
    )


def gguf_runtime() -> Runtime:
    """Return the runtime's name and version; ``device`` is where layers that are not offloaded run."""
    return Runtime(name="llama.cpp", version=f"llama-cpp-python {version('llama-cpp-python')}", device="cpu", batch=1)


class GgufAnswerer:
    """Answer with a folder of GGUF files; rows of kind ``image`` are asked of its exact guard alone."""

    kinds = frozenset({"pair", "question", "image"})
    batch = 1

    def __init__(
        self,
        model: str | Path,
        classes: Sequence[str],
        *,
        max_new_tokens: int,
        threads: int | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        self.decoding = decoding or Decoding()
        self.runner = LlamaCppLanguageRunner(model, threads=threads)
        self.max_new_tokens = max_new_tokens
        self._order = class_order(self.runner.artifact.manifest.classes, classes, str(model))

    def __enter__(self) -> Self:
        self.runner.activate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.deactivate()

    def describe(self) -> Description:
        """Return the files, llama.cpp, the family's prompt, how answers are written."""
        manifest = self.runner.artifact.manifest
        return Description(
            artifact=gguf_artifact(self.runner.artifact),
            runtime=gguf_runtime(),
            prompt=prompt_text(manifest.prompt.format()),
            preprocessing=manifest.preprocessing.model_dump(mode="json"),
            decoding=decoding_of(self.decoding, self.max_new_tokens),
        )

    def answer(self, rows: Sequence[Row], pictures: Sequence[Image.Image]) -> list[Row]:
        """Answer row by row."""
        return [self._one(row, picture) for row, picture in zip(rows, pictures, strict=True)]

    def _one(self, row: Row, picture: Image.Image) -> Row:
        begun = time.perf_counter()
        try:
            if row.kind != "image":
                self.runner.check_question(row.query or "", self.max_new_tokens)
            rgb = self.runner.artifact.manifest.preprocessing.apply(picture)
            prefilled = self.runner.prefill(rgb, row.query or "")
            writing = Writing(decoding=for_row(self.decoding, row))
            pieces = () if row.kind == "image" else self.runner.stream(prefilled.handle, self.max_new_tokens, writing)
            text = None if row.kind == "image" else "".join(pieces)
        except SafeVLMError as error:
            return failed(row, str(error))
        ms = (time.perf_counter() - begun) * 1000
        return answered(row, answer=text, probs=prefilled.exact_probs, order=self._order, ms=ms)
