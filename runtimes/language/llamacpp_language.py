"""The language model on llama.cpp: a folder that ``export.gguf`` wrote, answer and exact verdict from one prefill.

A guard on the projector's output reads the image embeddings that mtmd makes; one behind the language model reads the
hidden states of the image tokens in the prefill that the answer needs, or, where a system text or earlier turns stand
before the image, in one of the image behind the usual prefix. Image and prefix stay in memory, so a second question
about the same image costs its own tokens alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.language.gguf_artifact import GgufArtifact, open_gguf
from runtimes.language.head import head_logits, pooled, softmax
from runtimes.language.language import LanguageRunner, Prefilled
from runtimes.language.llamacpp import LlamaCpp
from runtimes.language.llamacpp_session import LlamaSession
from runtimes.language.question import MOST_CONTEXT, Reader
from runtimes.language.writing import Writing
from safevlm.checkpoint.families import FAMILIES
from safevlm.contract.gguf_manifest import GgufManifest
from safevlm.errors import BundleError, InputError
from safevlm.network.dialogue import ChatFormat, Question, Turn, as_turns
from safevlm.network.text_stream import TextStream

__all__ = ["LlamaCppLanguageRunner", "open_session", "probe_picture"]

PROBE_TOLERANCE = 0.05
"""Of the probe's largest value: other weights are off by as much as it is, another CPU by a thousandth."""
Floats = npt.NDArray[np.float32]


def open_session(
    artifact: GgufArtifact, *, context: int | None = None, threads: int | None = None, gpu_layers: int = 0
) -> LlamaSession:
    """Return llama.cpp for a folder, not loaded yet; what shares it, shares one model in memory.

    ``context`` is in tokens, by default the model's own, 4,096 at most.
    """
    manifest = artifact.manifest
    return LlamaSession(
        lambda: LlamaCpp(
            artifact.path(manifest.file("model")),
            artifact.path(manifest.file("mmproj")),
            image_tokens=manifest.image_tokens,
            class_token_last=manifest.class_token_last,
            context=context or min(manifest.context_length, MOST_CONTEXT),
            threads=threads,
            gpu_layers=gpu_layers,
        )
    )


class LlamaCppLanguageRunner(LanguageRunner):
    """Run a folder of GGUF files, or its language model's file. ``session`` shares one that a guard uses, too.

    Entering raises BundleError when llama.cpp cannot load a file, or computes another projector's embeddings.
    """

    runtime = "llama.cpp"
    takes_embeddings = True

    def __init__(
        self,
        model: GgufArtifact | Path | str,
        *,
        context: int | None = None,
        threads: int | None = None,
        gpu_layers: int = 0,
        session: LlamaSession | None = None,
    ) -> None:
        super().__init__()
        self.artifact = model if isinstance(model, GgufArtifact) else open_gguf(model)
        manifest = self.artifact.manifest
        self.session = session or open_session(self.artifact, context=context, threads=threads, gpu_layers=gpu_layers)
        self.preprocessing = manifest.preprocessing
        self.classes = manifest.classes
        self.random_weights = manifest.random_weights
        exact = manifest.head("exact")
        assert exact is not None  # the manifest's own check
        self._exact = exact
        self._chat = chat_of(manifest, self.artifact.folder)
        self._holds = False
        self._questions: Reader | None = None
        self._weights = self.artifact.weights(exact)

    def _activate(self) -> None:
        self.session.activate()
        self._holds = True
        check_probe(self.artifact, self.session)
        prompt = self.artifact.manifest.prompt
        with self.session.using() as llama:
            self._before = llama.tokens(prompt.before_image)
            end = llama.tokens(prompt.end_of_turn)
            self._stops = {llama.end_of_sequence, *(end if len(end) == 1 else []), *self.artifact.manifest.ends}
            control, longest = llama.vocabulary()
            self._questions = Reader(
                chat=self._chat,
                tokens=self._tokens,
                name=lambda token: control[token],
                control=control,
                count=self._count,
                image_tokens=self.artifact.manifest.image_tokens,
                longest=longest,
                context=llama.context,
            )

    def _tokens(self, text: str) -> list[int]:
        with self.session.using() as llama:
            return llama.tokens(text)

    def _count(self, turns: Sequence[Turn]) -> int:
        around = self._chat.around(turns)
        return len(self._tokens(around.before)) + self.artifact.manifest.image_tokens + len(self._tokens(around.after))

    def _reader(self) -> Reader:
        self._check_active()  # outside of a call: nothing of the model is run
        assert self._questions is not None
        return self._questions

    def _deactivate(self) -> None:
        if self._holds:
            self.session.deactivate()
        self._holds, self._questions = False, None

    def _prefill(self, rgb: npt.NDArray[np.uint8], question: Question, embeddings: Floats | None) -> Prefilled:
        around = self._chat.around(as_turns(question))
        image = hashlib.sha256(rgb.tobytes() + repr(rgb.shape).encode()).digest()
        with self.session.prompting() as llama:
            before, after = llama.tokens(around.before), llama.tokens(around.after)
            prefix = llama.prefix
            known = isinstance(prefix, _Prefix) and prefix.runner is self and prefix.image == image
            if not (known and prefix.before == before):
                prefix = self._read_image(llama, rgb, image, before, embeddings, prefix.probs if known else None)
            llama.keep(prefix.positions)
            llama.handle = [llama.read_text(after)]
            tokens = len(before) + self.artifact.manifest.image_tokens + len(after)
            return Prefilled(prefix.probs.copy(), llama.handle, tokens)

    def _read_image(
        self,
        llama: LlamaCpp,
        rgb: npt.NDArray[np.uint8],
        image: bytes,
        before: list[int],
        embeddings: Floats | None,
        probs: Floats | None,
    ) -> _Prefix:
        """Read a prefix and the image, and the exact verdict where it is not known; an error leaves no prefix."""
        if embeddings is None:
            embeddings = llama.encode(rgb)
        tapped = self._exact.reads == "language_model" and probs is None
        states = None
        if tapped and before != self._before:  # the guard is calibrated on the usual prefix alone
            llama.keep(0)
            llama.read_text(self._before)
            states, tapped = llama.read_image(rgb, embeddings, tapped=True), False
        llama.keep(0)
        llama.read_text(before)
        found = llama.read_image(rgb, embeddings, tapped=tapped)
        if probs is None:
            states = found if states is None else states
            features = embeddings if states is None else states
            probs = softmax(head_logits(self._weights, pooled(features, self._exact.pooling)))
        read = _Prefix(self, image, before, probs, llama.position)
        llama.prefix = read
        return read

    def _generate(self, handle: Any, max_new_tokens: int) -> str:
        return "".join(self._stream(handle, max_new_tokens, Writing()))

    def _stream(self, handle: Any, max_new_tokens: int, writing: Writing) -> Iterator[str]:
        with self.session.prompting() as llama:
            if handle is None or handle is not llama.handle:
                raise InputError("this prefill was answered already, or a later one replaced it; prefill again")
            llama.handle = None
            logits, text = handle[0], TextStream(llama.text, writing.decoding.stop)
            for step in range(max_new_tokens):
                token = writing.choose(logits)
                if token in self._stops:
                    writing.ended = True
                    break
                writing.tokens += 1
                if piece := text.add(token):
                    yield piece
                if text.stopped:
                    break
                if step + 1 == max_new_tokens or llama.position >= llama.context:
                    break
                logits = llama.read_text([token])
            if piece := text.end():
                yield piece
            writing.ended = writing.ended or text.stopped


@dataclass(frozen=True, eq=False)
class _Prefix:
    """What is known of a prompt's beginning up to its image: kept with the memory that holds it, never beside it."""

    runner: LlamaCppLanguageRunner
    image: bytes
    """SHA-256 of the pixels."""
    before: list[int]
    """Token ids before the image."""
    probs: Floats
    """The exact verdict: of the image behind the usual prefix, whatever this one is."""
    positions: int


def chat_of(manifest: GgufManifest, folder: Path) -> ChatFormat:
    """Return the chat format of a folder's family. Raises BundleError where it is not the one that the prompt is of."""
    family = FAMILIES.get(manifest.source.family)
    if family is None or family.prompt != manifest.prompt.format():
        raise BundleError(
            f"{folder}: the prompt in gguf.json differs from this release's prompt of the family "
            f"{manifest.source.family!r}. Write the files again with this release: python -m export.gguf "
            f"{manifest.source.model_option} --out DIR."
        )
    return family.chat


def probe_picture(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return an image of gradients, H × W × 3, the same everywhere: what a projector makes of it tells it apart."""
    down, across = np.mgrid[0:height, 0:width]
    channels = (255 * across // max(1, width - 1), 255 * down // max(1, height - 1), (7 * across + 13 * down) % 256)
    return np.stack(channels, axis=-1).astype(np.uint8)


def probe_of(embeddings_TD: Floats) -> tuple[float, ...]:
    """Return the few numbers of a probe's embeddings that a manifest keeps."""
    return tuple(float(value) for value in (*embeddings_TD[0, :8], *embeddings_TD[-1, :8]))


def check_probe(artifact: GgufArtifact, session: LlamaSession) -> None:
    """Raise BundleError unless llama.cpp's projector gives what it gave when the files were written."""
    manifest = artifact.manifest
    size = manifest.preprocessing
    wanted = np.array(manifest.probe)
    with session.using() as llama:
        found = np.array(probe_of(llama.encode(probe_picture(size.height, size.width))))
    off = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not off <= PROBE_TOLERANCE:
        raise BundleError(
            f"{artifact.folder}: the installed llama.cpp computes different image embeddings than the one that wrote "
            f"these files (off by {off:.0%} on a test image). Write them again here: python -m export.gguf "
            f"{manifest.source.model_option} --out DIR."
        )
