"""A guard on llama.cpp's own image embeddings: no second vision tower on the device, and none run twice."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from runtimes.guard.runner import GuardOutput, GuardRunner
from runtimes.language.gguf_artifact import GgufArtifact
from runtimes.language.head import head_logits, pooled, softmax
from runtimes.language.llamacpp_language import check_probe
from runtimes.language.llamacpp_session import LlamaSession
from safevlm.errors import BundleError

__all__ = ["LlamaCppGuardRunner", "has_standalone_guard"]


def has_standalone_guard(artifact: GgufArtifact) -> bool:
    """Say whether a folder has a head that reads the projector: the exact one, or a distilled one."""
    return any(head.reads == "projector" for head in artifact.manifest.heads)


class LlamaCppGuardRunner(GuardRunner):
    """Judge with the head that reads the projector: the exact one where its tap is there, else the distilled one.

    Raises BundleError for a folder without one.
    """

    runtime = "llama.cpp"
    gives_embeddings = True

    def __init__(self, artifact: GgufArtifact, session: LlamaSession) -> None:
        super().__init__()
        manifest = artifact.manifest
        heads = sorted(
            (head for head in manifest.heads if head.reads == "projector"), key=lambda head: head.kind != "exact"
        )
        if not heads:
            raise BundleError(
                f"{artifact.folder} has no guard head that reads the projector: its guard is behind the language "
                "model. Distil one (python -m calibration.distill) and write the folder again with --guard FILE."
            )
        self.artifact, self.session, self.head = artifact, session, heads[0]
        self.preprocessing = manifest.preprocessing
        self.class_count = len(manifest.classes)
        self._weights = artifact.weights(self.head)
        self._holds = False

    def _activate(self) -> None:
        self.session.activate()
        self._holds = True
        check_probe(self.artifact, self.session)

    def _deactivate(self) -> None:
        if self._holds:
            self.session.deactivate()
        self._holds = False

    def _run(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        return self._run_sharing(rgb)

    def _run_sharing(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        with self.session.using() as llama:
            embeddings = np.stack([llama.encode(picture) for picture in rgb])
        logits = np.stack([head_logits(self._weights, pooled(each, self.head.pooling)) for each in embeddings])
        return GuardOutput(probs=np.stack([softmax(row) for row in logits]), logits=logits, embeddings=embeddings)
