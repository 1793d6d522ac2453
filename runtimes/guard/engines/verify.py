"""Compare an engine on this device with the bundle's own ONNX file, on images that the manifest's seed draws.

Shapes: n images, T image tokens, D width of the language model, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.guard.bundle import Bundle
from runtimes.guard.engines.library import Library
from runtimes.guard.engines.loaded import OUTPUTS, LoadedEngine
from runtimes.guard.engines.proof import Compared, Proof, keep_proof, known_proof
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from safevlm.contract.graph_fit import Role
from safevlm.contract.manifest import GuardFile, Parity
from safevlm.contract.parity import ENGINE_TOLERANCES, judge_of
from safevlm.errors import EngineRefusedError, SafeVLMError
from safevlm.images.drawn import drawn_images

__all__ = ["IMAGES", "is_proven", "prove"]

IMAGES = 8
EVERY_BATCH = 16
"""Batch sizes up to this one are all tried: kernels differ between them."""
ADVICE = "Build it again, or judge with ONNX Runtime (--runtime onnxruntime)."

_log = logging.getLogger(__name__)


def is_proven(library: Library, bundle: Bundle, file: GuardFile) -> bool:
    """Say whether a proof is kept that an engine answers as its ONNX file here."""
    try:
        proof = known_proof(_subject(library, bundle, file, _sources(bundle, file)))
    except EngineRefusedError:
        return False
    return proof is not None and proof.holds


def prove(library: Library, bundle: Bundle, file: GuardFile, engine: LoadedEngine, *, again: bool = False) -> Proof:
    """Return the proof that a loaded engine answers as its ONNX file: a kept one, or by comparing, with ``again`` anew.

    Raises EngineRefusedError, saying by how much, for an engine that does not, and for one that cannot be compared.
    """
    sources = _sources(bundle, file)
    subject = _subject(library, bundle, file, sources)
    if (sorted(engine.outputs), engine.most) != (sorted(subject.outputs), subject.largest_batch):
        raise EngineRefusedError(
            f"{file.path}: it gives {', '.join(sorted(engine.outputs))} of {engine.most} images at once, but its "
            f"manifest says {', '.join(subject.outputs)} of {subject.largest_batch}",
            ADVICE,
        )
    proof = None if again else known_proof(subject)
    if proof is None:
        _log.warning("%s: comparing its answers with ONNX Runtime's, once on this device", file.path)
        try:
            proof = Proof(compared=subject, parity=_parity(bundle, sources, engine, subject))
        except SafeVLMError as error:
            raise EngineRefusedError(
                f"{file.path}: it could not be compared with {sources[0].path} ({str(error).rstrip('.')})", ADVICE
            ) from error
        keep_proof(proof)
    if not proof.holds:
        raise EngineRefusedError(
            f"{file.path}: on {library.gpu.name} it differs from ONNX Runtime with {sources[0].path}: {proof.figures}",
            f"{ADVICE} `python -m runtimes.check {bundle.folder} --verify` compares once more.",
        )
    return proof


def _subject(library: Library, bundle: Bundle, file: GuardFile, sources: list[GuardFile]) -> Compared:
    """Return what is compared with what, as the manifest states it."""
    assert file.engine is not None  # it is an engine's entry
    outputs = {output.name for output in file.outputs} or set(OUTPUTS[file.role])
    return Compared(
        engine_sha256=file.sha256,
        precision=file.precision,
        reference_sha256=tuple(each for source in sources for each in _hashes(bundle, source)),
        outputs=tuple(sorted(outputs)),
        seed=file.engine.parity_seed or 0,
        images=IMAGES,
        largest_batch=file.engine.max_batch,
        module=library.module,
        version=library.version,
        gpu_name=library.gpu.name,
        compute_capability=library.gpu.compute_capability,
        driver=library.driver,
    )


def _sources(bundle: Bundle, file: GuardFile) -> list[GuardFile]:
    """Return the ONNX file that answers right, and for a head the one that makes what it reads."""
    judge = _onnx_file(bundle, file, file.role, judge_of(file.precision))
    return [judge] if file.role != "head" else [judge, _onnx_file(bundle, file, "vision", "fp32")]


def _onnx_file(bundle: Bundle, file: GuardFile, role: Role, precision: str) -> GuardFile:
    """Raises EngineRefusedError where the bundle has no such file."""
    if file.precision not in ENGINE_TOLERANCES:
        raise EngineRefusedError(f"{file.path}: no tolerance is known for precision {file.precision!r}", ADVICE)
    found = next((each for each in bundle.files("onnx", role) if each.precision == precision), None)
    if found is None:
        raise EngineRefusedError(
            f"{file.path}: there is no {role} file of precision {precision} to compare it with",
            "Copy the whole bundle, or export it again.",
        )
    return found


def _hashes(bundle: Bundle, file: GuardFile) -> Iterator[str]:
    """Yield the SHA-256 of an ONNX file and of the weights beside it."""
    yield file.sha256
    yield from (each.sha256 for each in bundle.files("onnx_data") if each.path == f"{file.path}.data")


def _parity(bundle: Bundle, sources: list[GuardFile], engine: LoadedEngine, subject: Compared) -> Parity:
    """Run both; every batch size that the engine may be asked for judges every image."""
    inputs: npt.NDArray[Any] = drawn_images(bundle.manifest.preprocessing, subject.seed, subject.images)
    judge, *before = sources
    for source in before:
        inputs = _answers(bundle, source, inputs)["embeddings"]
    right = _answers(bundle, judge, inputs)
    if missing := sorted(set(engine.outputs) - right.keys()):
        raise SafeVLMError(f"{judge.path} gives no {missing[0]}")
    scale = float(np.abs(right.get("embeddings", np.ones(1))).max())
    if scale == 0:
        raise SafeVLMError(f"{judge.path} gives image embeddings that are all zero")
    delta, moved, flipped = 0.0, 0.0, set[int]()
    for rows in _batches(engine.least, engine.most, len(inputs)):
        found = engine.run(inputs[rows], engine.outputs)
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise SafeVLMError(f"a batch of {len(rows)} images gave {name} that are not finite numbers")
        if "probs" in found:
            delta = max(delta, _distance(found["probs"], right["probs"][rows]))
            changed = found["probs"].argmax(axis=1) != right["probs"][rows].argmax(axis=1)
            flipped |= set(rows[changed].tolist())
        if "embeddings" in found:
            moved = max(moved, _distance(found["embeddings"], right["embeddings"][rows]) / scale)
    return Parity(
        images=len(inputs),
        max_abs_prob_delta=min(delta, 1.0) if "probs" in engine.outputs else None,
        label_flips=len(flipped) if "probs" in engine.outputs else None,
        max_rel_embedding_delta=moved if "embeddings" in engine.outputs else None,
        reference=f"ONNX Runtime on the CPU with {judge.path}",
    )


def _distance(found: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    return float(np.abs(found.astype(np.float64) - right).max())


def _answers(bundle: Bundle, file: GuardFile, inputs: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.float32]]:
    """Return all that an ONNX file gives, on the CPU (a GPU might use TensorFloat-32), one image at a time."""
    with OnnxRuntimeRunner(bundle, file, providers=["CPUExecutionProvider"]) as runner:
        rows = [runner.run_file(inputs[at : at + 1]) for at in range(len(inputs))]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _batches(least: int, most: int, images: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the images of each batch: of every size in turn all images, the last batch filled with the first again."""
    sizes = [size for size in range(least, most + 1) if size <= EVERY_BATCH or size & (size - 1) == 0 or size == most]
    for size in sizes:
        for start in range(0, images, size):
            yield np.arange(start, start + size) % images
