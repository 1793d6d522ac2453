"""Open a gate: a bundle and what answers, as the commands and the gateway do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.check import BLOCKED
from runtimes.gate.result import GateResult
from runtimes.guard.policy import Policy, read_policy
from runtimes.guard.random_weights import warn_of_random_weights
from safevlm.checkpoint.family import TapSource
from safevlm.errors import InputError
from safevlm.terminal.commandline import leave

if TYPE_CHECKING:
    from runtimes.gate.gate import Gate
    from runtimes.guard.bundle import Bundle
    from runtimes.guard.exact_parts import ExactParts
    from runtimes.images.tiling import ViewMode
    from runtimes.language.language import LanguageRunner
    from runtimes.language.torch_language import Dtype
    from safevlm.checkpoint.checkpoint import Checkpoint

__all__ = ["ended", "open_gate", "open_told"]

_log = logging.getLogger(__name__)


def open_gate(
    bundle: Path | str | Bundle | None,
    model: str | None = None,
    *,
    policy: Policy | None = None,
    runtime: str = "auto",
    precision: str | None = None,
    device: str = "cpu",
    dtype: Dtype = "float32",
    revision: str | None = None,
    tap: TapSource | None = None,
    threads: int | None = None,
    timeout: float = 30.0,
    context: int | None = None,
    gpu_layers: int = 0,
    view: ViewMode = "tiles",
) -> Gate:
    """Open a bundle and what answers: a checkpoint, by default the one that the bundle was made from, or GGUF files.

    On torch pictures are brought to the bundle's size for both. Image embeddings are shared when the bundle gives
    them and was made from the very vision tower that the answers are, by hash. A bundle that is not standalone gates
    by the exact verdict alone, and its parts, vision path and head, run on ``runtime`` where the checkpoint is the one
    that they were made of (see ``runtimes.guard.exact_parts``). Without a bundle, GGUF files (see ``export.gguf``)
    judge by themselves. ``context`` is in tokens; ``gpu_layers`` is llama.cpp's; ``view`` is the standalone guard's,
    see ``runtimes.images.tiling``.
    Raises InputError for neither; those of opening either.
    """
    from runtimes.gate.gate import Gate
    from runtimes.guard.bundle import Bundle, open_bundle
    from runtimes.guard.judge import Guard
    from runtimes.language.gguf_artifact import is_gguf
    from runtimes.language.torch_language import TorchLanguageRunner

    if bundle is None:
        if model is None or not is_gguf(model):
            raise InputError(
                "--bundle is missing. Give the bundle of the guard, or give --model a folder that python -m "
                "export.gguf wrote, which has its own guard."
            )
        return _gguf_alone(model, policy, timeout, threads=threads, context=context, gpu_layers=gpu_layers, view=view)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    manifest = opened.manifest
    language: LanguageRunner
    tower: Callable[[], str]
    if model is not None and is_gguf(model):
        language, tower = _gguf_language(model, threads=threads, context=context, gpu_layers=gpu_layers)
        if not manifest.source.standalone and opened.files("engine"):
            _log.warning("the engines in %s are skipped: llama.cpp runs its own vision path.", opened.folder)
    else:
        checkpoint = _checkpoint(opened, model, revision, tap)
        grid = checkpoint.family.fixed_grid(manifest.preprocessing.height, manifest.preprocessing.width)
        parts = _parts(opened, checkpoint, runtime, precision=precision, threads=threads)
        language = TorchLanguageRunner(
            checkpoint, device=device, dtype=dtype, grid=grid, threads=threads, context=context, parts=parts
        )
        tower = partial(_tower, checkpoint)
    guard, shared = None, False
    if manifest.source.standalone:
        guard = Guard.open(opened, runtime, precision=precision, threads=threads, view=view)
        if any(output.name == "embeddings" for file in manifest.files for output in file.outputs):
            shared = tower() == manifest.source.sha256
    return Gate(guard, language, policy, timeout, digest=opened.digest, share_embeddings=shared)


def _checkpoint(bundle: Bundle, model: str | None, revision: str | None, tap: TapSource | None) -> Checkpoint:
    """Open the checkpoint that answers, by default the one that the bundle was made from."""
    from safevlm.checkpoint.checkpoint import open_checkpoint

    source = bundle.manifest.source
    if model is None:
        model, revision, tap = source.checkpoint, revision or source.revision, tap or bundle.manifest.tap.source
    return open_checkpoint(model, tap=tap, revision=revision)


def _tower(checkpoint: Checkpoint) -> str:
    """Return the hash of a checkpoint's vision tower and guard head."""
    return checkpoint.tensors.sha256([*checkpoint.vision_names(), *checkpoint.head_names()])


def _parts(
    bundle: Bundle, checkpoint: Checkpoint, runtime: str, *, precision: str | None, threads: int | None
) -> ExactParts:
    """Return what runs the bundle's parts; nothing where they are of another checkpoint, or of a standalone guard."""
    from runtimes.guard.exact_parts import ExactParts, select_parts

    source = bundle.manifest.source
    if source.standalone:
        return ExactParts()
    parts = select_parts(bundle, runtime, precision=precision, threads=threads)
    if not parts.runners:
        return parts
    if checkpoint.tap.source == bundle.manifest.tap.source and _tower(checkpoint) == source.sha256:
        return parts
    if runtime != "auto":
        raise InputError(
            f"--runtime {runtime}: the parts in {bundle.folder} belong to {source.checkpoint}, but another "
            "checkpoint answers. Leave --runtime out, or give the checkpoint that the bundle was exported from."
        )
    _log.warning("the engines in %s are skipped: they belong to another checkpoint than the one here.", bundle.folder)
    return ExactParts()


def _gguf_language(
    model: str, *, threads: int | None, context: int | None, gpu_layers: int
) -> tuple[LanguageRunner, Callable[[], str]]:
    from runtimes.language.llamacpp_language import LlamaCppLanguageRunner

    language = LlamaCppLanguageRunner(model, threads=threads, context=context, gpu_layers=gpu_layers)
    return language, lambda: language.artifact.manifest.source.sha256


def _gguf_alone(
    model: str,
    policy: Policy | None,
    timeout: float,
    *,
    threads: int | None,
    context: int | None,
    gpu_layers: int,
    view: ViewMode,
) -> Gate:
    """Return a gate whose guard and language model share one llama.cpp."""
    from runtimes.gate.gate import Gate
    from runtimes.guard.judge import Guard
    from runtimes.guard.llamacpp_guard import LlamaCppGuardRunner, has_standalone_guard
    from runtimes.language.gguf_artifact import open_gguf
    from runtimes.language.llamacpp_language import LlamaCppLanguageRunner, open_session

    artifact = open_gguf(model)
    session = open_session(artifact, threads=threads, context=context, gpu_layers=gpu_layers)
    language = LlamaCppLanguageRunner(artifact, session=session)
    guard = None
    if has_standalone_guard(artifact):
        guard = Guard(LlamaCppGuardRunner(artifact, session), artifact.manifest.classes, view=view)
    return Gate(guard, language, policy, timeout, digest=artifact.digest)


def open_told(bundle: Path | None, model: str | None, policy: Path | None, **options: Any) -> Gate:
    """Open a gate as a command does, the policy from its file, with a line on standard error for random weights.

    ``options`` and errors are those of :func:`open_gate`, and of :func:`runtimes.guard.policy.read_policy`.
    """
    from runtimes.guard.bundle import open_bundle

    opened = None if bundle is None else open_bundle(bundle)
    gate = open_gate(opened, model, policy=None if policy is None else read_policy(policy), **options)
    warn_of_random_weights(opened, gate.language)
    return gate


def ended(gate: Gate, result: GateResult) -> int:
    """Return a command's exit code; where a call of guard or language model still runs, leave the process with it."""
    code = 0 if result.verdict == "allow" else BLOCKED
    if gate.stuck:
        leave(code)
    return code
