"""The proof that an engine answered as its ONNX file on this device, kept in the user's cache and never in the bundle.

A proof holds figures, not a word for them: whoever reads it decides by the tolerance whether they suffice. One that is
damaged, of another engine, file, GPU, driver or version, or that somebody else may have written is no proof.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from runtimes.guard.engines.library import EngineModule
from safevlm.contract.manifest import Parity
from safevlm.contract.manifest_fields import Batch, Frozen, Name, Sha256
from safevlm.contract.parity import ENGINE_TOLERANCES, within
from safevlm.errors import StorageError
from safevlm.files.json_file import validate_json
from safevlm.files.user_cache import keep_newest, read_own, user_cache, write_own

__all__ = ["Compared", "Proof", "keep_proof", "known_proof"]

MAX_BYTES = 2**16
MOST_FILES = 1_000
FOLDER = "engine-proofs"

_log = logging.getLogger(__name__)


class Compared(Frozen):
    """What was compared with what, where."""

    engine_sha256: Sha256
    precision: Name
    reference_sha256: tuple[Sha256, ...]
    """Of the ONNX files that gave the right answers, with their weights."""
    outputs: tuple[Name, ...]
    seed: int
    images: Batch
    largest_batch: Batch
    module: EngineModule
    version: Name
    gpu_name: Name
    compute_capability: Name
    driver: Name


class Proof(Frozen):
    """The figures of one comparison; they may be bad ones, which need not be found again at each start."""

    schema_version: Literal[1] = 1
    compared: Compared
    parity: Parity

    @model_validator(mode="after")
    def _check(self) -> Proof:
        parity = self.parity
        figures = {
            "probs": (parity.max_abs_prob_delta, parity.label_flips),
            "embeddings": (parity.max_rel_embedding_delta,),
        }
        stated = [figure for name in self.compared.outputs for figure in figures.get(name, ())]
        if not stated or None in stated or parity.images != self.compared.images:
            raise ValueError("a figure of what was compared is missing")
        return self

    @property
    def holds(self) -> bool:
        """Whether the engine may judge: its figures are within what its precision may cause."""
        tolerance = ENGINE_TOLERANCES.get(self.compared.precision)
        return tolerance is not None and within(self.parity, tolerance)

    @property
    def figures(self) -> str:
        """The figures in words."""
        parity, tolerance = self.parity, ENGINE_TOLERANCES.get(self.compared.precision)
        parts = [f"{parity.images} images"]
        if parity.max_abs_prob_delta is not None:
            allowed = "" if tolerance is None else f" (at most {tolerance.probability:.0e} is allowed)"
            parts += [f"max |Δp| {parity.max_abs_prob_delta:.2e}{allowed}", f"{parity.label_flips} labels changed"]
        if parity.max_rel_embedding_delta is not None:
            allowed = "" if tolerance is None else f" (at most {tolerance.embedding:.0e} is allowed)"
            parts.append(f"image embeddings by {parity.max_rel_embedding_delta:.2e} of their largest value{allowed}")
        return ", ".join(parts)


def known_proof(subject: Compared) -> Proof | None:
    """Return the proof of this very comparison, where there is one in the user's cache."""
    try:
        proof = validate_json(Proof, read_own(_place(subject), MAX_BYTES))
    except (FileNotFoundError, StorageError):
        return None
    except (OSError, ValueError) as error:
        _log.warning("a proof in the user's cache is skipped, so the engine is verified again: %s", error)
        return None
    return proof if proof.compared == subject else None


def keep_proof(proof: Proof) -> None:
    """Put a proof into the user's cache; where it cannot be kept, the engine is verified at each start, which is told.

    An older one of the same comparison is replaced.
    """
    try:
        place = _place(proof.compared)
        write_own(place, proof.model_dump_json(indent=2).encode())
        keep_newest(place.parent, "*.json", MOST_FILES)
    except StorageError as error:
        _log.warning("the proof of an engine cannot be saved, so it is verified at each start: %s", error)


def _place(subject: Compared) -> Path:
    """Raises StorageError for a user without a home."""
    return user_cache() / FOLDER / f"{hashlib.sha256(subject.model_dump_json().encode()).hexdigest()}.json"
