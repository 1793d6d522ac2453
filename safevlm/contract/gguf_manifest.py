"""``gguf.json``: what a folder of GGUF files says of the Safe-VLM that they are, guard heads included.

llama.cpp's own files hold neither a guard head nor its classes; this manifest and the heads beside it do. Paths are
relative to the folder; hashes are SHA-256.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from safevlm.checkpoint.family import PromptFormat
from safevlm.contract.manifest import Parity, Source, Tap
from safevlm.contract.manifest_fields import BundlePath, Classes, Count, Frozen, Name, Positive, Sha256, Width, unique
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import BundleError
from safevlm.files.json_file import first_problem, parse_json, replace_file, validate_json
from safevlm.files.regular_file import read_regular
from safevlm.terminal.printable import shortened

__all__ = [
    "COPY_AGAIN",
    "GGUF_MANIFEST_NAME",
    "GgufFile",
    "GgufHead",
    "GgufManifest",
    "Importance",
    "Prompt",
    "gguf_manifest_bytes",
]

GGUF_MANIFEST_NAME = "gguf.json"
MAX_BYTES = 16 * 2**20
COPY_AGAIN = "Copy the folder again, or write it again with python -m export.gguf."


class GgufFile(Frozen):
    """A file of the folder: the language ``model``, its multimodal projector ``mmproj``, or a guard's ``head``."""

    path: BundlePath
    role: Literal["model", "mmproj", "head"]
    type: Name
    """llama.cpp's word, such as ``f16`` or ``q4_k_m``; of a head its dtype."""
    sha256: Sha256
    bytes: Count


class GgufHead(Frozen):
    """A guard head, read from ``file`` (safetensors, ``img_safety_head.mlp.*``).

    ``exact`` is the checkpoint's own, on what its tap says; ``distilled`` imitates it on the projector's output.
    """

    file: BundlePath
    kind: Literal["exact", "distilled"]
    reads: Literal["projector", "language_model"]
    pooling: Literal["mean", "mean_max_std"]
    widths: tuple[Width, ...] = Field(min_length=2, max_length=64)
    fidelity: Mapping[str, Any] | None = None
    """Of a distilled head, on held-out images."""

    @property
    def features(self) -> float:
        """Width of the image features that are pooled to its input."""
        return self.widths[0] / (3 if self.pooling == "mean_max_std" else 1)


class Prompt(Frozen):
    """One user turn with one image; see :class:`safevlm.checkpoint.family.PromptFormat`."""

    before_image: str
    image_token: str
    after_image: str
    after_question: str
    end_of_turn: str
    before_text: str

    def format(self) -> PromptFormat:
        """Return it as the family's own."""
        return PromptFormat(**self.model_dump())


class Importance(Frozen):
    """What the importance matrix was measured on: samples by the hash of their set, tokens that were counted."""

    samples: Positive
    samples_sha256: Sha256
    source_sha256: Sha256 | None
    tokens: Positive
    leaked: bool


class GgufManifest(Frozen):
    """Everything a device needs to run the files and to know where they come from."""

    schema_version: Literal[1] = 1
    created: str
    tool_version: str
    source: Source
    language_sha256: Sha256
    """Of the language model's tensors as the checkpoint stores them."""
    source_quantization: str | None = None
    """How the checkpoint was quantized before; its numbers were dequantized."""
    tap: Tap
    classes: Classes
    preprocessing: Preprocessing
    image_tokens: Annotated[int, Field(gt=0, le=65_536)]
    class_token_last: bool = False
    """Whether the projector file is written for a llama.cpp that puts LLaVA's class token behind the patches."""
    probe: tuple[float, ...] = Field(min_length=16, max_length=16)
    """Of the projector's output for a test image: first and last image token, 8 numbers each."""
    context_length: Width
    prompt: Prompt
    ends: tuple[Count, ...] = Field(default=(), max_length=64)
    """Token ids that end an answer by the checkpoint's generation settings, besides the prompt's own end."""
    files: tuple[GgufFile, ...] = Field(max_length=100)
    heads: tuple[GgufHead, ...] = Field(min_length=1, max_length=2)
    importance: Importance | None = None
    parity: Parity | None = None
    """Of the exact guard on llama.cpp, against the checkpoint on torch."""

    @model_validator(mode="after")
    def _check(self) -> GgufManifest:
        roles = [file.role for file in self.files]
        if roles.count("model") != 1 or roles.count("mmproj") != 1:
            raise ValueError("the files must include exactly one model and one mmproj")
        unique(tuple(file.path for file in self.files))
        for head in self.heads:
            if head.file not in {file.path for file in self.files if file.role == "head"}:
                raise ValueError(f"the head {head.file} is not listed among the files")
            if head.widths[-1] != len(self.classes):
                raise ValueError(
                    f"the head {head.file} has {head.widths[-1]} outputs, but there are {len(self.classes)} classes"
                )
        if [head.kind for head in self.heads].count("exact") != 1:
            raise ValueError("exactly one exact head is needed")
        if len({head.features for head in self.heads}) != 1:
            raise ValueError(f"the heads read features of different widths: {[head.widths[0] for head in self.heads]}")
        return self

    @property
    def random_weights(self) -> bool:
        """Whether the checkpoint's weights are random: good for sizes and times alone."""
        return self.source.random_weights

    def file(self, role: Literal["model", "mmproj"]) -> GgufFile:
        """Return the file of a role that there is one of."""
        return next(file for file in self.files if file.role == role)

    def head(self, kind: Literal["exact", "distilled"]) -> GgufHead | None:
        """Return the head of a kind, if there is one."""
        return next((head for head in self.heads if head.kind == kind), None)

    @classmethod
    def read(cls, folder: Path) -> GgufManifest:
        """Read ``gguf.json`` of a folder; BundleError says what is wrong and where."""
        return cls.from_bytes(gguf_manifest_bytes(folder), where=str(folder / GGUF_MANIFEST_NAME))

    @classmethod
    def from_bytes(cls, content: bytes, *, where: str) -> GgufManifest:
        """Check the text of a ``gguf.json``; ``where`` names it in messages."""
        try:
            stated = parse_json(content)
        except ValueError as error:
            raise BundleError(f"{where}: {first_problem(error)}. {COPY_AGAIN}") from error
        version = stated.get("schema_version") if isinstance(stated, dict) else None
        if version != 1 or type(version) is not int:
            raise BundleError(
                f"{where}: schema_version {shortened(repr(version))} is unknown; this release reads 1. {COPY_AGAIN}"
            )
        if "random_weights" in stated and isinstance(stated.get("source"), dict):  # it stood beside the source once
            stated["source"].setdefault("random_weights", stated.pop("random_weights"))
        try:
            return validate_json(cls, json.dumps(stated))
        except ValueError as error:
            raise BundleError(f"{where}: {first_problem(error)}. {COPY_AGAIN}") from error

    def write(self, folder: Path) -> None:
        """Write ``gguf.json`` into ``folder`` in one step."""
        replace_file(folder / GGUF_MANIFEST_NAME, (self.model_dump_json(indent=2) + "\n").encode())


def gguf_manifest_bytes(folder: Path) -> bytes:
    """Return the text of a folder's ``gguf.json``. Raises BundleError when it is missing or cannot be read."""
    path = folder / GGUF_MANIFEST_NAME
    try:
        return read_regular(path, MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(
            f"{path} is missing, and the guard of these files is unknown without it. Write a complete folder: python "
            "-m export.gguf --model M --out DIR."
        ) from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}. {COPY_AGAIN}") from error
