"""From a checkpoint to a folder of GGUF files with its guard, checked against the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors.torch import save_file

from calibration.sets.samples import CalibrationOptions
from export.gguf.families import gguf_family_of
from export.gguf.importance import Measured, measure_importance
from export.gguf.language import language_keys, language_tensors, stored_type
from export.gguf.layout import stored_as
from export.gguf.parity import check_finite, guard_parity
from export.gguf.quantizing import (
    PLAIN_TYPES,
    UnfitTensorError,
    check_widths,
    file_type,
    needs_importance,
    quantize_file,
    type_of,
)
from export.gguf.vision import MMPROJ_ARCHITECTURE, vision_tensors
from export.gguf.vision_keys import vision_keys
from export.gguf.vocabulary import vocabulary_keys
from export.gguf.writing import GgufTensor, StoredType, check_numbers, gguf_library, write_gguf
from export.guard.bundle import origin_of
from export.guard.images import parity_images
from runtimes.guard.bundle import sha256_of
from runtimes.language.llamacpp import LlamaCpp
from runtimes.language.llamacpp_language import probe_of, probe_picture
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.checkpoint.family import HEAD_PREFIX
from safevlm.contract.gguf_manifest import GgufFile, GgufHead, GgufManifest, Prompt
from safevlm.errors import CheckpointError, InputError, ParityError, SafeVLMError
from safevlm.files.draft import draft_of, publish
from safevlm.files.storage import check_room, storing
from safevlm.machine import available_memory, now
from safevlm.network.distilled_head import DistilledHead
from safevlm.network.head import GuardHead, build_head
from safevlm.network.prompt_tokens import stated_ends
from safevlm.network.reference import build_vision, guard_sha256
from safevlm.version import VERSION

__all__ = ["GgufOptions", "export_gguf"]

HEAD_FILES = {"exact": "guard.exact.safetensors", "distilled": "guard.distilled.safetensors"}
EMBEDDING_TOLERANCE = 0.03
"""Of the largest value: llama.cpp multiplies in float16 and has GELU in a table."""
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
            raise InputError(f"--mmproj-type {self.mmproj_type} is unknown. Allowed: f16, bf16, f32.")
        if needs_importance(self.type) and self.importance is None:
            raise InputError(
                f"--type {self.type} needs an importance matrix. Give --calibration FILE, or a type of more bits."
            )


def export_gguf(
    checkpoint: Checkpoint, out: Path, options: GgufOptions = GgufOptions(), report: Report = lambda _: None
) -> GgufManifest:
    """Write ``out``: language model, projector, guard heads, manifest; all of it or nothing.

    Tensors are read one at a time. Raises InputError for a type that a width cannot hold, a folder that exists, too
    little room on the disk; CheckpointError for what llama.cpp does not compute, and for numbers that a type does not
    hold: where a quantized type is the only one that does not, ``out`` then holds the model in the type that it would
    have been made from; ParityError when llama.cpp's embeddings or, at 16 bits and more, its exact guard differ from
    the checkpoint's.
    """
    writing = _Writing(checkpoint, options, report)
    writing.check()
    if out.exists():
        raise InputError(f"{out} already exists. Give --out a new folder, or remove this one.")
    with draft_of(out) as draft, storing(out, advice="give --out another place"):
        try:
            manifest = writing.all(draft)
            manifest.write(draft)
            if options.parity_images:
                images = parity_images(writing.preprocessing, options.parity_images, options.images)
                parity = guard_parity(checkpoint, draft, images, options.max_memory, report)
                manifest = manifest.model_copy(update={"parity": parity})
                manifest.write(draft)
        except SafeVLMError as error:
            if writing.unfit is not None:  # the type that is left is no better
                raise writing.unfit from error
            raise
        publish(draft, out)
    if writing.unfit is not None:
        raise CheckpointError(f"{writing.unfit} {out} holds the whole model in {manifest.file('model').type} instead.")
    return manifest


class _Writing:
    """The files of one folder, one after another."""

    def __init__(self, checkpoint: Checkpoint, options: GgufOptions, report: Report) -> None:
        self.checkpoint, self.options, self.report = checkpoint, options, report
        self.family = gguf_family_of(checkpoint)
        self.folder = Path()
        self.type = type_of(options.type)
        self.unfit: UnfitTensorError | None = None
        """Why the model is not in the type that was asked for."""
        grid = options.grid or (None if options.distilled is None else options.distilled.size)
        self.grid = grid if checkpoint.family.free_grid else options.grid
        self.preprocessing = read_processor(checkpoint.processor, family=checkpoint.family.key, grid=grid)
        self.text: Any = build_config(checkpoint).text_config

    def check(self) -> None:
        """Check what can be told before anything is written or measured."""
        checkpoint, distilled = self.checkpoint, self.options.distilled
        gguf = gguf_library()
        self._language_keys(gguf.GGUFWriter(None, self.architecture))
        self._vision_keys(gguf.GGUFWriter(None, MMPROJ_ARCHITECTURE))
        check_widths(self._language_tensors(), self.type)
        vision_tensors(checkpoint, self.options.mmproj_type)
        if distilled is not None:
            distilled.check_fits(checkpoint, guard_sha256(checkpoint))
            if self.options.grid is not None and self.options.grid != distilled.size:
                raise InputError(f"--guard was fitted at {distilled.size}, but --grid is {self.options.grid}.")

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the language model's architecture."""
        return self.family.language.architecture

    def all(self, folder: Path) -> GgufManifest:
        """Write the files into a folder, small ones first: numbers that do not fit are found before the gigabytes."""
        checkpoint, self.folder = self.checkpoint, folder
        self._check_disk()
        heads, head_files = self._heads()
        mmproj = self._write_projector()
        measured = self._importance()
        model = self._language(None if measured is None else measured.matrix)
        last, probe, tokens = self._check_projector(mmproj, model)
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
            ends=tuple(sorted(stated_ends(checkpoint.folder))),
            files=(
                self._file(model, "model", self.type),
                self._file(mmproj, "mmproj", self.options.mmproj_type),
                *(self._file(path, "head", "f32") for path in head_files),
            ),
            heads=heads,
            importance=None if measured is None or self.unfit is not None else measured.record,
        )

    def _check_disk(self) -> None:
        """Refuse a disk that cannot hold the largest that will be there at once: the plain file, and the packed one."""
        needed = sum(tensor.nbytes for tensor in self._language_tensors())
        if self.type not in PLAIN_TYPES:
            needed = int(needed * 1.6)
        needed += sum(tensor.nbytes for tensor in vision_tensors(self.checkpoint, self.options.mmproj_type))
        check_room(self.folder.parent, needed)

    def _language_tensors(self) -> list[GgufTensor]:
        return language_tensors(self.checkpoint, stored_type(self.checkpoint, self.type))

    def _language_keys(self, writer: Any) -> None:
        language_keys(self.checkpoint, writer)
        vocabulary_keys(self.checkpoint, self.text.vocab_size, writer)
        writer.add_file_type(file_type(stored_type(self.checkpoint, self.type)))

    def _vision_keys(self, writer: Any) -> None:
        vision_keys(self.checkpoint, self.preprocessing, writer)
        writer.add_file_type(file_type(self.options.mmproj_type))

    def _importance(self) -> Measured | None:
        if self.options.importance is None or self.type in PLAIN_TYPES:
            return None
        options = self.options.importance
        return measure_importance(self.checkpoint, options, max_memory=self.options.max_memory, report=self.report)

    def _language(self, importance: dict[str, Any] | None) -> Path:
        stored = stored_type(self.checkpoint, self.type)
        plain = self.folder / f"model.{stored}.gguf"
        tensors = self._language_tensors()
        largest = write_gguf(plain, self.architecture, self._language_keys, tensors, self.report)
        if self.type in PLAIN_TYPES:
            return plain
        packed = self.folder / f"model.{self.type}.gguf"
        self.report(f"llama.cpp quantizes to {self.type}")
        try:
            matrices = {tensor.name: tensor.source for tensor in tensors if len(tensor.shape) > 1}
            quantize_file(plain, packed, self.type, importance, matrices, largest)
        except UnfitTensorError as error:
            packed.unlink(missing_ok=True)
            self.unfit, self.type = error, stored
            return plain
        plain.unlink()
        return packed

    def _write_projector(self, *, class_token_last: bool = False) -> Path:
        path = self.folder / f"mmproj.{self.options.mmproj_type}.gguf"
        tensors = vision_tensors(self.checkpoint, self.options.mmproj_type, class_token_last=class_token_last)
        write_gguf(path, MMPROJ_ARCHITECTURE, self._vision_keys, tensors, self.report)
        return path

    def _check_projector(self, path: Path, model: Path) -> tuple[bool, tuple[float, ...], int]:
        """Compare what this llama.cpp computes of the projector's file with torch, and return what it makes of a probe.

        Where there are two ways (LLaVA's class token), the file is left as the one whose embeddings are torch's.
        """
        checkpoint, size = self.checkpoint, self.preprocessing
        rgb = probe_picture(size.height, size.width)
        self.report("vision tower on torch, to compare with")
        with torch.no_grad():
            wanted = build_vision(checkpoint, self.grid)(torch.from_numpy(rgb[None].copy()))[0].numpy()
        check_finite(wanted, f"{checkpoint.name}: the vision tower", "torch", "use another checkpoint")
        off, tokens = float("inf"), len(wanted)
        for last in (False, True) if self.family.vision.class_token else (False,):
            if last:
                self._write_projector(class_token_last=True)
            with LlamaCpp(model, path, image_tokens=tokens, class_token_last=last, context=tokens + 512) as session:
                found = session.encode(rgb)
            wider = f"use a wider --mmproj-type than {self.options.mmproj_type}"
            check_finite(found, f"{checkpoint.name}: the vision tower", "llama.cpp", wider)
            off = float(np.abs(found - wanted).max() / (np.abs(wanted).max() or 1.0))
            if off <= EMBEDDING_TOLERANCE:
                return last, probe_of(found), tokens
        raise ParityError(
            f"{checkpoint.name}: llama.cpp's image embeddings are off by {off:.1%} of the largest value; "
            f"{EMBEDDING_TOLERANCE:.0%} is allowed. This llama.cpp computes the vision tower differently. Install the "
            "llama-cpp-python version in pyproject.toml."
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
        exact_head = build_head(checkpoint)
        for name, value in exact_head.state_dict().items():
            check_numbers(value, torch.float32, stored_as(checkpoint, HEAD_PREFIX + name))
        paths = [self._write_head(HEAD_FILES["exact"], exact_head)]
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
