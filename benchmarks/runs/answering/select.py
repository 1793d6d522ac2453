"""Which answerer the options of ``benchmarks.run`` ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.runs.answering.answerer import Answerer
from runtimes.images.tiling import ViewMode
from runtimes.language.gguf_artifact import is_gguf
from runtimes.language.writing import Decoding
from safevlm.errors import InputError, MissingExtraError

__all__ = ["Request", "open_answerer"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Who shall answer, and how; the names are the command's options."""

    model: str | None = None
    bundle: Path | None = None
    server: str | None = None
    max_new_tokens: int
    batch: int = 16
    revision: str | None = None
    grid: tuple[int, int] | None = None
    runtime: str = "auto"
    precision: str | None = None
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int | None = None
    concurrency: int = 4
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    view: ViewMode = "tiles"
    temperature: float = 0.0
    seed: int | None = None

    @property
    def decoding(self) -> Decoding:
        """How answers are written. Raises InputError for a temperature without a seed, or the other way round."""
        if (self.temperature > 0) != (self.seed is not None):
            raise InputError(
                "sampled decoding needs both --temperature above 0 and --seed, which sets one run apart from the next."
            )
        return Decoding(temperature=self.temperature, seed=self.seed)


def open_answerer(request: Request, classes: Sequence[str]) -> Answerer:
    """Return who answers, not entered yet; only the libraries that it needs are loaded.

    Raises InputError when nothing, or too much, is asked for, and those of opening a checkpoint or bundle.
    """
    if request.server is not None:
        return _server(request)
    if request.model is None and request.bundle is None:
        raise InputError("nothing to run. Give --model, --bundle, both (a gated pair), or --server with --model.")
    if request.threads is not None:
        import torch

        torch.set_num_threads(request.threads)
    if request.bundle is not None:
        return _bundled(request, request.bundle, classes)
    assert request.model is not None
    if is_gguf(request.model):
        from benchmarks.runs.answering.gguf import GgufAnswerer

        if request.grid is not None or request.revision is not None:
            raise InputError("--grid and --revision are fixed in GGUF files. Leave them out, or write the files again.")
        return GgufAnswerer(
            request.model,
            classes,
            max_new_tokens=request.max_new_tokens,
            threads=request.threads,
            decoding=request.decoding,
        )
    from benchmarks.runs.answering.torch_model import TorchAnswerer
    from safevlm.checkpoint.checkpoint import open_checkpoint

    return TorchAnswerer(
        open_checkpoint(request.model, revision=request.revision),
        classes,
        max_new_tokens=request.max_new_tokens,
        batch=request.batch,
        device=request.device,
        dtype=request.dtype,
        grid=request.grid,
        decoding=request.decoding,
    )


def _server(request: Request) -> Answerer:
    if request.bundle is not None or request.model is None:
        raise InputError("--server needs --model, the name that the server knows it by, and takes no --bundle.")
    try:
        from benchmarks.runs.answering.server import ServerAnswerer
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        raise MissingExtraError("httpx", "report", "asking a server") from error
    assert request.server is not None
    return ServerAnswerer(
        request.server,
        request.model,
        max_new_tokens=request.max_new_tokens,
        concurrency=request.concurrency,
        api_key_env=request.api_key_env,
        timeout=request.timeout,
        decoding=request.decoding,
    )


def _bundled(request: Request, bundle: Path, classes: Sequence[str]) -> Answerer:
    from benchmarks.runs.answering.bundle import BundleAnswerer, GatedAnswerer

    if request.model is None:
        if request.temperature or request.seed is not None:
            raise InputError(
                "a guard bundle alone writes no answers. Leave out --temperature and --seed, or add --model."
            )
        return BundleAnswerer(
            bundle,
            classes,
            runtime=request.runtime,
            precision=request.precision,
            batch=request.batch,
            view=request.view,
        )
    return GatedAnswerer(
        bundle,
        request.model,
        classes,
        max_new_tokens=request.max_new_tokens,
        revision=request.revision,
        device=request.device,
        dtype=request.dtype,
        runtime=request.runtime,
        precision=request.precision,
        view=request.view,
        decoding=request.decoding,
    )
