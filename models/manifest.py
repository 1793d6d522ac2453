"""``manifest.json``: what a guard bundle says about itself.

Read with :meth:`Manifest.read`, written with :meth:`Manifest.to_json`. A manifest is checked where it is
made, so a writer cannot produce one that a reader refuses. Paths are relative to the bundle, with ``/``;
hashes are SHA-256 in 64 lower-case hexadecimal digits; probabilities are 0..1; times are milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import BundleError
from models.family import TapSource
from models.json_file import first_problem, replace_file
from models.preprocessing import Preprocessing

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Band",
    "EngineInfo",
    "GuardFile",
    "Head",
    "Latency",
    "Manifest",
    "Parity",
    "Source",
    "Tap",
    "TensorSpec",
    "Thresholds",
]

SCHEMA_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"
MAX_BYTES = 16 * 2**20
"""A manifest is a few kilobytes; more than this is not one."""


def _inside(path: str) -> str:
    """Return ``path`` if it is relative, normal and stays in its folder."""
    pure = PurePosixPath(path)
    normal = not pure.is_absolute() and ".." not in pure.parts and str(pure) == path and path != "."
    if not normal or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(f"path {path!r} is not a plain relative path inside the bundle, such as 'guard.fp32.onnx'")
    return path


def _unique(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError(f"a name appears twice: {', '.join(names)}")
    return names


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
BundlePath = Annotated[str, AfterValidator(_inside)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Milliseconds = Annotated[float, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorSpec(_Frozen):
    """An input or output of a graph; ``"N"`` in the shape is the batch."""

    name: str
    shape: tuple[Positive | Literal["N"], ...]
    dtype: str


class Parity(_Frozen):
    """How a file's answers compare with the reference path, over so many images.

    ``max_rel_embedding_delta`` is of image embeddings, where the file gives them: the largest difference over
    the largest value. A file that gives nothing else has neither probabilities nor labels.
    """

    images: Count
    max_abs_prob_delta: float | None = Field(default=None, ge=0)
    label_flips: Count | None = None
    max_rel_embedding_delta: float | None = Field(default=None, ge=0)
    reference: str


class Latency(_Frozen):
    """Time for one batch, measured on the named machine with the named runtime."""

    median_ms: Milliseconds
    p95_ms: Milliseconds
    batch: Positive
    runtime: str
    machine: str


class EngineInfo(_Frozen):
    """What a TensorRT engine was built with, and the only GPU and version it runs on."""

    tensorrt_version: str
    gpu_name: str
    compute_capability: str
    min_batch: Positive
    opt_batch: Positive
    max_batch: Positive
    options: Mapping[str, str | int | float | bool | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> EngineInfo:
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise ValueError(f"batch sizes must rise: {self.min_batch}, {self.opt_batch}, {self.max_batch}")
        return self


class GuardFile(_Frozen):
    """One file of the bundle. Weights beside a graph (``onnx_data``) have neither inputs nor outputs."""

    path: BundlePath
    sha256: Sha256
    bytes: Count
    kind: Literal["onnx", "onnx_data", "engine"]
    role: Literal["guard", "vision", "head"] = "guard"
    """``guard``: pixels to probabilities. Where ``standalone`` is false the two exact parts instead: ``vision``,
    pixels to image embeddings, and ``head``, the language model's hidden states over them to probabilities."""
    precision: str
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    parity: Parity | None = None
    latency: Latency | None = None
    engine: EngineInfo | None = None
    target: str | None = None
    """What a file is made for, where it is not made for all."""
    note: str | None = None
    quantization: Mapping[str, Any] | None = None
    """How an INT8 file was made and judged."""

    @property
    def one_at_a_time(self) -> bool:
        """Whether an image's answer depends on what is run with it, so that it must be run alone."""
        return self.precision == "int8-dynamic"

    @model_validator(mode="after")
    def _check(self) -> GuardFile:
        if (self.kind == "engine") != (self.engine is not None):
            raise ValueError(f"{self.path}: 'engine' describes a file of kind 'engine' and no other")
        return self


class Source(_Frozen):
    """The checkpoint a guard was made from; ``sha256`` covers the tensors that were used."""

    checkpoint: str
    revision: str | None = None
    sha256: Sha256
    family: str
    standalone: bool = True
    random_weights: bool = False
    """Whether they are random: verdicts mean nothing then, sizes and times what they mean else."""

    @property
    def model_option(self) -> str:
        """The ``--model`` that opens the checkpoint again; for a folder, whose path is not kept, its name stands."""
        return f"--model {self.checkpoint}" + (f" --revision {self.revision}" if self.revision else "")


class Head(_Frozen):
    """The head in the bundle: the checkpoint's own (``exact``), or one ``distilled`` from its verdicts.

    ``reads`` is where its features come from: a distilled head reads the projector whatever the tap.
    """

    kind: Literal["exact", "distilled"]
    reads: TapSource
    pooling: str
    widths: tuple[Positive, ...]
    sha256: Sha256 | None = None
    """Of the guard file that a distilled head was read from."""


class Tap(_Frozen):
    """Where the checkpoint's own guard takes its features, and how that was learned."""

    source: TapSource
    pooling: str
    tokens: str
    learned: str
    evidence: str = ""


class Band(_Frozen):
    """Block at p(unsafe) >= ``block``, allow below ``allow``, unsure between; fitted on so many unsafe images."""

    block: float = Field(ge=0)
    allow: float = Field(ge=0)
    n_unsafe: Positive

    @model_validator(mode="after")
    def _check(self) -> Band:
        if self.allow > self.block:
            raise ValueError(f"allow ({self.allow}) must not be above block ({self.block})")
        return self


class Thresholds(_Frozen):
    """One file's band on p(unsafe), and what it promises.

    At most the share ``alpha`` of unsafe images is allowed: in expectation (``conformal_risk_control``), or with
    probability 1 - ``delta`` over the images it was fitted on (``learn_then_test``). At most ``max_fpr`` of safe
    images is blocked, in the same sense. ``per_class`` replaces ``pooled`` for images whose most probable harm
    is that class. Rates are those found on the ``n`` images of the labels file with this hash.
    """

    file: BundlePath
    file_sha256: Sha256
    method: Literal["conformal_risk_control", "learn_then_test"]
    alpha: float = Field(gt=0, lt=1)
    delta: float | None = Field(default=None, gt=0, lt=1)
    max_fpr: float = Field(gt=0, lt=1)
    n: Positive
    n_unsafe: Positive
    fitted_on: str
    """ISO 8601."""
    labels_sha256: Sha256
    pooled: Band
    per_class: Mapping[str, Band] = Field(default_factory=dict)
    miss_rate: Probability
    fpr: Probability
    unsure_rate: Probability

    def band(self, harm: str) -> Band:
        """Return the band for an image whose most probable harm is the class ``harm``."""
        return self.per_class.get(harm, self.pooled)


class Manifest(_Frozen):
    """Everything a reader needs to run a guard and to know where it came from."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    tool_version: str
    source: Source
    tap: Tap
    head: Head
    classes: Annotated[tuple[str, ...], Field(min_length=2), AfterValidator(_unique)]
    preprocessing: Preprocessing
    files: tuple[GuardFile, ...] = Field(min_length=1)
    default_file: BundlePath
    thresholds: tuple[Thresholds, ...] | None = None
    """One for each file that they were fitted on; ``null`` until then."""
    fidelity: Mapping[str, Any] | None = None
    """How faithful a distilled head is to the exact guard; ``null`` for an exact one."""

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        _unique(tuple(file.path for file in self.files))
        runnable = [file.path for file in self.files if file.kind != "onnx_data"]
        if self.default_file not in runnable:
            raise ValueError(f"default_file {self.default_file!r} is not among {', '.join(runnable)}")
        hashes = {file.path: file.sha256 for file in self.files}
        fitted = self.thresholds or ()
        _unique(tuple(entry.file for entry in fitted))
        for entry in fitted:
            strangers = set(entry.per_class) - set(self.classes)
            if strangers:
                raise ValueError(f"thresholds for classes that do not exist: {', '.join(sorted(strangers))}")
            if hashes.get(entry.file) != entry.file_sha256:
                raise ValueError(
                    f"thresholds for {entry.file} were fitted on another file than the bundle's; fit them again "
                    "with python -m calibration.thresholds"
                )
        return self

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read ``manifest.json`` (or the folder with it); BundleError says what is wrong and where."""
        path = path / MANIFEST_NAME if path.is_dir() else path
        return cls.from_bytes(_content(path), where=str(path))

    @classmethod
    def from_bytes(cls, content: bytes, *, where: str) -> Manifest:
        """Check the text of a manifest; ``where`` names it in messages."""
        stated = _object(content, where)
        version = stated.get("schema_version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise BundleError(
                f"{where}: schema_version {version!r} is unknown; this release reads {SCHEMA_VERSION}. "
                "Install the release that wrote the bundle, or export it again with this one."
            )
        try:
            return cls.model_validate(stated)
        except ValidationError as error:
            raise BundleError(f"{where}: {first_problem(error)}. Copy the bundle again, or export it anew.") from error

    def thresholds_of(self, path: str) -> Thresholds | None:
        """Return the thresholds fitted on the file at ``path``, if any were."""
        return next((entry for entry in self.thresholds or () if entry.file == path), None)

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``, replacing an older one in a single step."""
        replace_file(folder / MANIFEST_NAME, self.to_json().encode())

    def to_json(self) -> str:
        """Return the text of ``manifest.json``: indented, with a newline at its end."""
        return self.model_dump_json(indent=2) + "\n"


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise BundleError(
            f"{path} is missing. A guard bundle is a folder with a {MANIFEST_NAME}, as "
            "`python -m export.onnx --model M --out DIR` writes it."
        ) from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(content) > MAX_BYTES:
        raise BundleError(f"{path} is larger than {MAX_BYTES} bytes; a manifest is a few kilobytes of JSON.")
    return content


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        stated = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is not valid JSON ({error}). Copy the bundle again, or export it anew.") from error
    if not isinstance(stated, dict):
        raise BundleError(f"{where} holds {type(stated).__name__}, not a JSON object. Export the bundle anew.")
    return stated
