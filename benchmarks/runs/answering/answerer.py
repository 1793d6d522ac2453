"""The contract of everything that answers a suite: unanswered rows in, the same rows answered out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.runs.record import Artifact, Row, Runtime
from runtimes.language.writing import Decoding
from safevlm.checkpoint.family import PromptFormat
from safevlm.contract.manifest_fields import ViewMode
from safevlm.errors import CheckpointError, InputError
from safevlm.files.json_file import read_json_object

if TYPE_CHECKING:
    from typing_extensions import Self

    from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.weights.shards import GUARD_FILE

__all__ = [
    "Answerer",
    "Description",
    "answered",
    "checkpoint_artifact",
    "class_order",
    "decoding_of",
    "failed",
    "for_row",
    "prompt_text",
]

COMPRESSION_NAME = "compression.json"
SHORT_NAMES = {
    "gender": "gender_discrimination",
    "race": "race_discrimination",
    "religion": "religion_discrimination",
}
"""How some sources write classes 1 to 3."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a run record says of who answers; the fields are its own."""

    artifact: Artifact
    runtime: Runtime
    prompt: str | None = None
    preprocessing: Mapping[str, Any] | None = None
    decoding: Mapping[str, Any] | None = None
    threshold: float | None = None
    view: ViewMode | None = None


def decoding_of(decoding: Decoding, max_new_tokens: int) -> dict[str, Any]:
    """Return what a run record says of how answers are written."""
    if decoding.temperature == 0:
        return {"sampling": "greedy", "max_new_tokens": max_new_tokens}
    sampled = {"sampling": "temperature", "temperature": decoding.temperature, "seed": decoding.seed}
    return {**sampled, "max_new_tokens": max_new_tokens}


def for_row(decoding: Decoding, row: Row) -> Decoding:
    """Return the decoding with the row's own seed: a row's answer then does not depend on the rows before it."""
    if decoding.temperature == 0:
        return decoding
    drawn = hashlib.sha256(f"{decoding.seed}\0{row.id}".encode()).digest()
    return replace(decoding, seed=int.from_bytes(drawn[:4], "big") >> 1)


class Answerer(Protocol):
    """Answers rows; a context manager that holds the model while it is entered."""

    batch: int
    """How many rows it takes at once."""
    kinds: frozenset[str]
    """Kinds of rows that it can answer."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def describe(self) -> Description:
        """Return what is answered by; asked while it is entered."""

    def answer(self, rows: Sequence[Row], pictures: Sequence[Image.Image]) -> list[Row]:
        """Return the rows, in order, with what became of each; what fails for one row is its ``error``."""


def answered(
    row: Row,
    *,
    answer: str | None,
    probs: npt.NDArray[np.float32] | None,
    order: Sequence[int],
    ms: float | None = None,
    blocked: str | None = None,
) -> Row:
    """Return a row with an answer and the guard's C probabilities brought into the suite's order."""
    if probs is not None and not bool(np.isfinite(probs).all()):
        return failed(row, f"the guard's probabilities are not finite: {probs.tolist()}")
    ordered = None if probs is None else tuple(min(1.0, max(0.0, float(probs[i]))) for i in order)
    return row.model_copy(update={"answer": answer, "probs": ordered, "ms": ms, "blocked": blocked})


def failed(row: Row, why: str) -> Row:
    """Return a row that could not be answered; it is unscored."""
    return row.model_copy(update={"error": why})


def class_order(classes: Sequence[str], wanted: Sequence[str], where: str) -> list[int]:
    """Return where each of the suite's classes stands among a guard's.

    Raises InputError when the guard has other classes.
    """
    own = [SHORT_NAMES.get(name, name) for name in classes]
    if sorted(own) != sorted(SHORT_NAMES.get(name, name) for name in wanted):
        differ = sorted(set(own) ^ set(wanted))
        raise InputError(
            f"{where}: the classes of its guard differ from the suite's ({', '.join(differ[:6])}). Use a suite "
            "made for it."
        )
    return [own.index(SHORT_NAMES.get(name, name)) for name in wanted]


def prompt_text(prompt: PromptFormat) -> str:
    """Return a prompt's format as one text, ``{image}`` and ``{question}`` where they go."""
    return f"{prompt.before_image}{{image}}{prompt.after_image}{{question}}{prompt.after_question}"


def checkpoint_artifact(checkpoint: Checkpoint) -> Artifact:
    """Return what a run record says of a checkpoint; all tensors are hashed, which takes as long as reading them."""
    quantization = checkpoint.quantization
    kind = "checkpoint" if quantization is None else ("gptq" if quantization.method == "gptq" else "int8")
    record = _compression(checkpoint.folder)
    names = [*checkpoint.vision_names(), *checkpoint.language_names(), *checkpoint.head_names()]
    files = [*checkpoint.folder.iterdir(), checkpoint.folder / GUARD_FILE]
    weights = [path for path in files if path.suffix == ".safetensors" and path.is_file()]
    return Artifact(
        name=checkpoint.name,
        kind=kind,  # type: ignore[arg-type]
        sha256=checkpoint.tensors.sha256(names),
        revision=checkpoint.revision,
        bytes=sum(path.stat().st_size for path in weights),
        leaked=bool(record.get("anomalous", False)),
        random_weights=checkpoint.random_weights,
        compression=_shortened(record) if record else None,
    )


def _compression(folder: Path) -> dict[str, Any]:
    path = folder / COMPRESSION_NAME
    if not path.exists():
        return {}
    record = read_json_object(path, needed_for="what is known of a compressed checkpoint")
    if not isinstance(record.get("anomalous"), bool):
        raise CheckpointError(
            f"{path}: 'anomalous' must be true or false. Restore the file that was written with the checkpoint."
        )
    return record


def _shortened(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a reader of a report wants to know, not every linear's error."""
    calibration, summary = record.get("calibration", {}), record.get("summary", {})
    short = {
        "source": record.get("source", {}).get("name"),
        "method": record.get("method"),
        "bits_per_weight": summary.get("bits_per_weight"),
        "calibration": {key: calibration.get(key) for key in ("source", "sha256", "samples", "seed")},
        "leakage": record.get("leakage"),
    }
    return json.loads(json.dumps(short, default=str))  # type: ignore[no-any-return]
