"""From a checkpoint to a folder of GGUF files with its guard, checked against the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors.torch import save_file

from calibration.samples import CalibrationOptions
from export.bundle import origin_of
from export.gguf.importance import Measured, measure_importance
from export.gguf.language import ARCHITECTURES, language_keys, language_tensors, stored_type
from export.gguf.quantizing import PLAIN_TYPES, check_widths, file_type, needs_importance, quantize_file, type_of
from export.gguf.vision import MMPROJ_ARCHITECTURE, vision_keys, vision_tensors
from export.gguf.vocabulary import vocabulary_keys
from export.gguf.writing import StoredType, write_gguf
from export.images import parity_images
from models.checkpoint import Checkpoint
from models.distilled_head import DistilledHead
from models.draft import draft_of, publish
from models.errors import InputError, ParityError
from models.family import HEAD_PREFIX
from models.gguf_manifest import GgufFile, GgufHead, GgufManifest, Prompt
from models.machine import now
from models.manifest import Parity
from models.preprocessing import Preprocessing
from models.reference import GuardHead, build_head, build_vision, guard_sha256
from models.storage import check_room, storing
from models.transformers_config import build_config
from models.version import VERSION
from quantize.drift import exact_probs
from quantize.estimate import available_memory
from runtimes.bundle import sha256_of
from runtimes.gguf_artifact import open_gguf
from runtimes.llamacpp import LlamaCpp
from runtimes.llamacpp_language import LlamaCppLanguageRunner, probe_of, probe_picture

__all__ = ["GgufOptions", "export_gguf"]

HEAD_FILES = {"exact": "guard.exact.safetensors", "distilled": "guard.distilled.safetensors"}
EMBEDDING_TOLERANCE = 0.03
"""Of the largest value: llama.cpp multiplies in float16 and has GELU in a table."""
PROBABILITY_TOLERANCE = 0.02
MEMORY_SHARE = 0.5
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class GgufOptions:
    """What is written: ``type`` of the language model, ``mmproj_type`` of the projector.

    ``importance`` says what an importance matrix is measured on, None for none; ``distilled`` is a head for the
    projector's output; ``grid`` the input's (height, width) for Qwen2.5-VL. ``parity_images`` are compared with the
    checkpoint (none: not at all), from the folder ``images`` or drawn. ``max_memory`` bounds activations, in bytes.
    """

    type: str = "q4_k_m"
    mmproj_type: StoredType = "f16"
    importance: CalibrationOptions | None = None
    distilled: DistilledHead | None = None
    grid: tuple[int, int] | None = None
    images: Path | None = None
    parity_images: int = 8
    max_memory: int = field(default_factory=lambda: int(MEMORY_SHARE * available_memory()))

    def __post_init__(self) -> None:
        type_of(self.type)
        if self.mmproj_type not in ("f16", "f32", "bf16"):
            raise InputError(f"--mmproj-type {self.mmproj_type}: f16, bf16 and f32 are allowed.")
        if needs_importance(self.type) and self.importance is None:
            raise InputError(
                f"--type {self.type} needs an importance matrix: give --calibration FILE, or a type of more bits."
            )


def export_gguf(
    checkpoint: Checkpoint, out: Path, options: GgufOptions = GgufOptions(), report: Report = lambda _: None
) -> GgufManifest:
    """Write ``out``: language model, projector, guard heads, manifest; all of it or nothing.

    Tensors are read one at a time. Errors: InputError for a type that a width cannot hold, a folder that exists, too
    little room on the disk; CheckpointError for what llama.cpp does not compute; ParityError when llama.cpp's
    embeddings or, at 16 bits and more, its exact guard differ from the checkpoint's.
    """
    options = _settled(checkpoint, options)
    if out.exists():
        raise InputError(f"{out} exists. Give --out a folder that does not, or remove this one.")
    with draft_of(out) as draft, storing(out, advice="give --out another place"):
        manifest = _Writing(checkpoint, draft, options, report).all()
        manifest.write(draft)
        if options.parity_images:
            parity = _parity(checkpoint, draft, options, report)
            manifest = manifest.model_copy(update={"parity": parity})
            manifest.write(draft)
        publish(draft, out)
    return manifest


def _settled(checkpoint: Checkpoint, options: GgufOptions) -> GgufOptions:
    """Check what can be told before anything is written."""
    name = type_of(options.type)
    matrices = stored_type(checkpoint, name)
    check_widths(language_tensors(checkpoint, matrices), name)
    vision_tensors(checkpoint, options.mmproj_type)
    if options.distilled is not None:
        options.distilled.check_fits(checkpoint, guard_sha256(checkpoint))
        if options.grid is not None and options.grid != options.distilled.size:
            raise InputError(f"--guard was fitted at {options.distilled.size}, --grid asks for {options.grid}.")
    return options


class _Writing:
    """The files of one folder, one after another."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, options: GgufOptions, report: Report) -> None:
        self.checkpoint, self.folder, self.options, self.report = checkpoint, folder, options, report
        self.type = type_of(options.type)
        grid = options.grid or (None if options.distilled is None else options.distilled.size)
        if checkpoint.family.key != "qwen2_5_vl":
            grid = options.grid
        self.grid = grid
        self.preprocessing = Preprocessing.from_processor(checkpoint.processor, family=checkpoint.family.key, grid=grid)
        self.text: Any = build_config(checkpoint).text_config

    def all(self) -> GgufManifest:
        checkpoint = self.checkpoint
        self._check_disk()
        measured = self._importance()
        model = self._language(None if measured is None else measured.matrix)
        heads, head_files = self._heads()
        mmproj, last, probe, tokens = self._projector(model)
        source, tap = origin_of(checkpoint, standalone=any(head.reads == "projector" for head in heads))
        return GgufManifest(
            created=now(),
            tool_version=VERSION,
            source=source,
            language_sha256=checkpoint.tensors.sha256(checkpoint.language_names()),
            source_quantization=None if checkpoint.quantization is None else checkpoint.quantization.method,
            tap=tap,
            classes=checkpoint.classes,
            preprocessing=self.preprocessing,
            image_tokens=tokens,
            class_token_last=last,
            probe=probe,
            context_length=self.text.max_position_embeddings,
            prompt=Prompt(**vars(checkpoint.family.prompt)),
            files=(
                self._file(model, "model", self.type),
                self._file(mmproj, "mmproj", self.options.mmproj_type),
                *(self._file(path, "head", "f32") for path in head_files),
            ),
            heads=heads,
            importance=None if measured is None else measured.record,
        )

    def _check_disk(self) -> None:
        """Refuse a disk that cannot hold the largest that will be there at once: 16 bits, and the packed file."""
        matrices = language_tensors(self.checkpoint, stored_type(self.checkpoint, self.type))
        needed = sum(tensor.nbytes for tensor in matrices)
        if self.type not in PLAIN_TYPES:
            needed = int(needed * 1.6)
        needed += sum(tensor.nbytes for tensor in vision_tensors(self.checkpoint, self.options.mmproj_type))
        check_room(self.folder.parent, needed)

    def _importance(self) -> Measured | None:
        if self.options.importance is None or self.type in PLAIN_TYPES:
            return None
        options = self.options.importance
        return measure_importance(self.checkpoint, options, max_memory=self.options.max_memory, report=self.report)

    def _language(self, importance: dict[str, Any] | None) -> Path:
        stored = stored_type(self.checkpoint, self.type)
        plain = self.folder / f"model.{stored}.gguf"

        def keys(writer: Any) -> None:
            language_keys(self.checkpoint, writer)
            vocabulary_keys(self.checkpoint, self.text.vocab_size, writer)
            writer.add_file_type(file_type(stored))

        architecture = ARCHITECTURES[self.checkpoint.family.key].name
        write_gguf(plain, architecture, keys, language_tensors(self.checkpoint, stored), self.report)
        if self.type in PLAIN_TYPES:
            return plain
        packed = self.folder / f"model.{self.type}.gguf"
        self.report(f"llama.cpp quantizes to {self.type}")
        quantize_file(plain, packed, self.type, importance)
        plain.unlink()
        return packed

    def _projector(self, model: Path) -> tuple[Path, bool, tuple[float, ...], int]:
        """Write the projector as this llama.cpp computes it, and return what it makes of the probe.

        Where there are two ways (LLaVA's class token), the one whose embeddings are the checkpoint's is kept.
        """
        checkpoint, size = self.checkpoint, self.preprocessing
        path = self.folder / f"mmproj.{self.options.mmproj_type}.gguf"
        rgb = probe_picture(size.height, size.width)
        self.report("vision tower on torch, to compare with")
        with torch.no_grad():
            wanted = build_vision(checkpoint, self.grid)(torch.from_numpy(rgb[None].copy()))[0].numpy()
        off = float("inf")

        def keys(writer: Any) -> None:
            vision_keys(checkpoint, size, writer)
            writer.add_file_type(file_type(self.options.mmproj_type))

        for last in (False, True) if checkpoint.family.key == "llava" else (False,):
            tensors = vision_tensors(checkpoint, self.options.mmproj_type, class_token_last=last)
            write_gguf(path, MMPROJ_ARCHITECTURE, keys, tensors, self.report)
            tokens = len(wanted)
            with LlamaCpp(model, path, image_tokens=tokens, class_token_last=last, context=tokens + 512) as session:
                found = session.encode(rgb)
            off = float(np.abs(found - wanted).max() / np.abs(wanted).max())
            if off <= EMBEDDING_TOLERANCE:
                return path, last, probe_of(found), tokens
        raise ParityError(
            f"{checkpoint.name}: llama.cpp's image embeddings are off by {off:.1%} of the largest value; "
            f"{EMBEDDING_TOLERANCE:.0%} is allowed. This llama.cpp computes another tower: install the version of "
            "llama-cpp-python that pyproject.toml names."
        )

    def _heads(self) -> tuple[tuple[GgufHead, ...], list[Path]]:
        checkpoint, distilled = self.checkpoint, self.options.distilled
        exact = GgufHead(
            file=HEAD_FILES["exact"],
            kind="exact",
            reads=checkpoint.tap.source,
            pooling=cast(Literal["mean"], checkpoint.tap.pooling),
            widths=checkpoint.head.widths,
        )
        paths = [self._write_head(HEAD_FILES["exact"], build_head(checkpoint))]
        if distilled is None:
            return (exact,), paths
        paths.append(self._write_head(HEAD_FILES["distilled"], distilled.head))
        other = GgufHead(
            file=HEAD_FILES["distilled"],
            kind="distilled",
            reads="projector",
            pooling=distilled.pooling,
            widths=distilled.widths,
            fidelity=distilled.fidelity,
        )
        return (exact, other), paths

    def _write_head(self, name: str, head: GuardHead) -> Path:
        path = self.folder / name
        tensors = {HEAD_PREFIX + key: value.float().contiguous() for key, value in head.state_dict().items()}
        save_file(tensors, path)
        return path

    def _file(self, path: Path, role: Literal["model", "mmproj", "head"], kind: str) -> GgufFile:
        self.report(f"hashing {path.name}")
        return GgufFile(path=path.name, role=role, type=kind, sha256=sha256_of(path), bytes=path.stat().st_size)


def _parity(checkpoint: Checkpoint, folder: Path, options: GgufOptions, report: Report) -> Parity:
    """Ask the exact guard of the files and of the checkpoint about pictures."""
    artifact = open_gguf(folder, verify=False)
    size = artifact.manifest.preprocessing
    rgb = parity_images(size, options.parity_images, options.images)
    grid = (size.height, size.width) if checkpoint.family.key == "qwen2_5_vl" else None
    wanted = exact_probs(
        checkpoint, torch.from_numpy(rgb), grid=grid, max_bytes=options.max_memory, report=report
    ).numpy()
    found = []
    with LlamaCppLanguageRunner(artifact, context=artifact.manifest.image_tokens + 512) as runner:
        for number, picture in enumerate(rgb):
            report(f"llama.cpp's guard, picture {number + 1} of {len(rgb)}")
            found.append(runner.prefill(picture, "").exact_probs)
    off = float(np.abs(np.stack([row for row in found if row is not None]) - wanted).max())
    flips = sum(
        int(row.argmax() != other.argmax()) for row, other in zip(found, wanted, strict=True) if row is not None
    )
    if options.type in PLAIN_TYPES and not off <= PROBABILITY_TOLERANCE:
        raise ParityError(
            f"{checkpoint.name}: the exact guard's probabilities differ by {off:.3f} on llama.cpp at {options.type}; "
            f"{PROBABILITY_TOLERANCE} is allowed. This is a fault of the export, or of this llama.cpp."
        )
    return Parity(
        images=len(rgb), max_abs_prob_delta=off, label_flips=flips, reference=f"{checkpoint.name} on torch, float32"
    )
