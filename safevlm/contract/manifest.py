"""``manifest.json``: what a guard bundle says about itself.

Read with :meth:`Manifest.read`, written with :meth:`Manifest.to_json`. A manifest is checked where it is
made, so a writer cannot produce one that a reader refuses. Paths are relative to the bundle, with ``/``;
hashes are SHA-256 in 64 lower-case hexadecimal digits; probabilities are 0..1; times are milliseconds.
"""

from __future__ import annotations

import errno
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from safevlm.checkpoint.family import TapSource
from safevlm.contract.class_claims import Uncertified
from safevlm.contract.graph_fit import Role, TensorSpec, misfit
from safevlm.contract.manifest_fields import (
    Batch,
    BelowOne,
    BundlePath,
    Classes,
    Count,
    Frozen,
    Milliseconds,
    Name,
    Positive,
    Probability,
    Sha256,
    ViewMode,
    Width,
    unique,
)
from safevlm.contract.preprocessing import Preprocessing
from safevlm.contract.under import UnderCorruption, broken_promise
from safevlm.errors import BundleError
from safevlm.files.json_file import first_problem, parse_json, replace_file, validate_json
from safevlm.files.regular_file import is_folder, read_regular
from safevlm.terminal.printable import shortened

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
    "Uncertified",
    "manifest_bytes",
]

SCHEMA_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"
MAX_BYTES = 16 * 2**20
"""A manifest is a few kilobytes; more than this is not one."""


class Parity(Frozen):
    """How a file's answers compare with the reference path, over so many images.

    ``max_rel_embedding_delta`` is of image embeddings, where the file gives them: the largest difference over
    the largest value. A file that gives nothing else has neither probabilities nor labels.
    """

    images: Count
    max_abs_prob_delta: Probability | None = None
    label_flips: Count | None = None
    max_rel_embedding_delta: float | None = Field(default=None, ge=0)
    reference: str

    @model_validator(mode="after")
    def _check(self) -> Parity:
        if self.label_flips is not None and self.label_flips > self.images:
            raise ValueError(f"label_flips ({self.label_flips}) must not exceed images ({self.images})")
        return self


class Latency(Frozen):
    """Time for one batch, measured on the named machine with the named runtime."""

    median_ms: Milliseconds
    p95_ms: Milliseconds
    batch: Batch
    runtime: str
    provider: Name | None = None
    """What the runtime computed with, such as ``CUDAExecutionProvider``; None in bundles that do not say it."""
    machine: str


class EngineInfo(Frozen):
    """What a TensorRT engine was built with, and where it runs.

    An engine built on a GPU names it; one built ahead of time by TensorRT-RTX names its ``targets`` (``sm89``), and was
    never run: ``verified`` is false, and a reader first compares it with the bundle's ONNX file on its own GPU.
    Engines written before there were modules do not say their operating system and machine, and were verified.
    """

    module: Literal["tensorrt", "tensorrt_rtx"] = "tensorrt"
    tensorrt_version: Name
    gpu_name: Name | None = None
    compute_capability: Name | None = None
    targets: tuple[Name, ...] = Field(default=(), max_length=64)
    operating_system: Name | None = None
    """``platform.system()`` in lower case."""
    machine: Name | None = None
    """``platform.machine()``."""
    verified: bool = True
    parity_seed: int | None = Field(default=None, ge=0)
    """Draws the images that a reader compares it on."""
    min_batch: Batch
    opt_batch: Batch
    max_batch: Batch
    options: Mapping[str, str | int | float | bool | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> EngineInfo:
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise ValueError(f"batch sizes must rise: {self.min_batch}, {self.opt_batch}, {self.max_batch}")
        on_gpu = self.gpu_name is not None and self.compute_capability is not None
        if on_gpu == bool(self.targets):
            raise ValueError("an engine states the GPU that it was built on, or its targets")
        if not self.verified and self.parity_seed is None:
            raise ValueError("an engine that was never run states the seed of its parity images")
        return self


class GuardFile(Frozen):
    """One file of the bundle. Weights beside a graph (``onnx_data``) have neither inputs nor outputs."""

    path: BundlePath
    sha256: Sha256
    bytes: Count
    kind: Literal["onnx", "onnx_data", "engine"]
    role: Role = "guard"
    """``guard``, or, where ``standalone`` is false, the two exact parts ``vision`` and ``head``."""
    precision: Name
    inputs: tuple[TensorSpec, ...] = Field(default=(), max_length=16)
    outputs: tuple[TensorSpec, ...] = Field(default=(), max_length=16)
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
            raise ValueError(f"{self.path}: 'engine' is for files of kind 'engine', which must have it")
        if self.kind == "onnx" and not self.path.endswith(".onnx"):  # by another ending, runtimes read another format
            raise ValueError(f"{self.path}: the name of a file of kind 'onnx' must end in .onnx")
        return self


class Source(Frozen):
    """The checkpoint a guard was made from; ``sha256`` covers the tensors that were used."""

    checkpoint: str
    revision: str | None = None
    sha256: Sha256
    family: Name
    standalone: bool = True
    head_sha256: Sha256 | None = None
    """Of the exact head's numbers, as vLLM's guard states it; None of bundles that do not say it."""
    random_weights: bool = False
    """Whether they are random: verdicts mean nothing then, sizes and times what they mean else."""

    @property
    def model_option(self) -> str:
        """The ``--model`` that opens the checkpoint again; for a folder, whose path is not kept, its name stands."""
        named = f"--model {shlex.quote(self.checkpoint)}"
        return named + (f" --revision {shlex.quote(self.revision)}" if self.revision else "")


class Head(Frozen):
    """The head in the bundle: the checkpoint's own (``exact``), or one ``distilled`` from its verdicts.

    ``reads`` is where its features come from: a distilled head reads the projector whatever the tap.
    """

    kind: Literal["exact", "distilled"]
    reads: TapSource
    pooling: Name
    widths: tuple[Width, ...] = Field(min_length=2, max_length=64)
    sha256: Sha256 | None = None
    """Of the guard file that a distilled head was read from."""


class Tap(Frozen):
    """Where the checkpoint's own guard takes its features, and how that was learned."""

    source: TapSource
    pooling: Name
    tokens: str
    learned: str
    evidence: str = ""


class Band(Frozen):
    """Block at p(unsafe) >= ``block``, allow below ``allow``, unsure between; fitted on so many unsafe images."""

    block: Probability
    allow: BelowOne
    n_unsafe: Positive

    @model_validator(mode="after")
    def _check(self) -> Band:
        if self.allow > self.block:
            raise ValueError(f"allow ({self.allow}) must not be above block ({self.block})")
        return self


class Thresholds(Frozen):
    """One file's band on p(unsafe), and what it promises.

    At most the share ``alpha`` of unsafe images is allowed: in expectation (``conformal_risk_control``), or with
    probability 1 - ``delta`` over the images it was fitted on (``learn_then_test``). At most ``max_fpr`` of safe
    images is blocked, in the same sense. ``per_class`` replaces ``pooled`` for images whose most probable harm
    is that class. Rates are those found on the ``n`` images of the labels file with this hash. ``view`` is how large
    images were judged (see ``runtimes.images.tiling``): the promise is for that. ``under`` lists the corruptions, each
    at one strength, under which the promise on misses holds as well, each by itself; others are not covered.
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
    view: ViewMode = "whole"
    """Of thresholds that do not say it, which are from before there were tiles, ``whole``."""
    provider: Name | None = None
    """What the runtime computed with, as :attr:`Latency.provider`; None of thresholds that do not say it."""
    under: tuple[UnderCorruption, ...] = Field(default=(), max_length=1_000)
    uncertified: Mapping[str, Uncertified] | None = None
    """Harmful classes of which the images prove less than of all harm; None of thresholds that do not say it."""

    @model_validator(mode="after")
    def _check(self) -> Thresholds:
        if self.n_unsafe > self.n:
            raise ValueError(f"n_unsafe ({self.n_unsafe}) must not exceed n ({self.n})")
        if self.method == "learn_then_test" and self.delta is None:
            raise ValueError("learn_then_test needs a delta")
        if self.method == "conformal_risk_control" and (self.miss_rate > self.alpha or self.fpr > self.max_fpr):
            raise ValueError(
                f"a rate of {self.miss_rate} misses and {self.fpr} false blocks breaks the promise of at most "
                f"{self.alpha} and {self.max_fpr}"
            )
        broken = broken_promise(self.under, self.alpha)
        if self.method == "conformal_risk_control" and broken is not None:
            raise ValueError(f"{broken} breaks the promise of at most {self.alpha}")
        return self

    def band(self, harm: str) -> Band:
        """Return the band for an image whose most probable harm is the class ``harm``."""
        return self.per_class.get(harm, self.pooled)


class Manifest(Frozen):
    """Everything a reader needs to run a guard and to know where it came from."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    tool_version: str
    source: Source
    tap: Tap
    head: Head
    classes: Classes
    preprocessing: Preprocessing
    files: tuple[GuardFile, ...] = Field(min_length=1, max_length=1_000)
    default_file: BundlePath
    thresholds: tuple[Thresholds, ...] | None = None
    """One for each file that they were fitted on; ``null`` until then."""
    fidelity: Mapping[str, Any] | None = None
    """How faithful a distilled head is to the exact guard; ``null`` for an exact one."""

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        unique(tuple(file.path for file in self.files))
        runnable = [file.path for file in self.files if file.kind != "onnx_data"]
        if self.default_file not in runnable:
            raise ValueError(f"default_file {self.default_file!r} is not among {', '.join(runnable)}")
        self._check_shapes()
        hashes = {file.path: file.sha256 for file in self.files if file.kind != "onnx_data"}
        fitted = self.thresholds or ()
        unique(tuple(entry.file for entry in fitted))
        for entry in fitted:
            strangers = {*entry.per_class, *(entry.uncertified or ())} - set(self.classes)
            if strangers:
                named = ", ".join(map(shortened, sorted(strangers)[:5]))
                raise ValueError(f"thresholds for classes that do not exist: {named}")
            if hashes.get(entry.file) != entry.file_sha256:
                raise ValueError(
                    f"thresholds for {entry.file} were fitted on a different version of that file; fit them again "
                    "with python -m calibration.thresholds"
                )
        return self

    def _check_shapes(self) -> None:
        """Compare what is stated of the head and the files with the classes and the preprocessing."""
        if self.head.widths[-1] != len(self.classes):
            raise ValueError(f"the head has {self.head.widths[-1]} outputs, but there are {len(self.classes)} classes")
        for file in self.files:
            if file.kind == "onnx_data" or not (file.inputs or file.outputs):
                continue
            problem = misfit(file.role, file.inputs, file.outputs, self.preprocessing, len(self.classes))
            if problem is not None:
                raise ValueError(f"{file.path}: {problem}")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read ``manifest.json`` (or the folder with it); BundleError says what is wrong and where."""
        path = path / MANIFEST_NAME if is_folder(path) else path
        return cls.from_bytes(manifest_bytes(path), where=str(path))

    @classmethod
    def from_bytes(cls, content: bytes, *, where: str) -> Manifest:
        """Check the text of a manifest; ``where`` names it in messages."""
        stated = _object(content, where)
        version = stated.get("schema_version")
        if version != SCHEMA_VERSION or type(version) is not int:
            raise BundleError(
                f"{where}: schema_version {shortened(repr(version))} is unknown; this release reads {SCHEMA_VERSION}. "
                "Install the release that wrote the bundle, or export it again with this one."
            )
        try:
            return validate_json(cls, content)
        except ValueError as error:
            raise BundleError(f"{where}: {first_problem(error)}. Copy the bundle again, or export it again.") from error

    def thresholds_of(self, path: str) -> Thresholds | None:
        """Return the thresholds fitted on the file at ``path``, if any were."""
        return next((entry for entry in self.thresholds or () if entry.file == path), None)

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``, replacing an older one in a single step."""
        replace_file(folder / MANIFEST_NAME, self.to_json().encode())

    def to_json(self) -> str:
        """Return the text of ``manifest.json``: indented, with a newline at its end."""
        return self.model_dump_json(indent=2) + "\n"


def manifest_bytes(path: Path) -> bytes:
    """Return the text of a bundle's manifest. Raises BundleError when it is missing, no regular file or too large."""
    try:
        return read_regular(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise BundleError(
            f"{path} is missing. A guard bundle is a folder with a {MANIFEST_NAME}, as "
            "`python -m export.onnx --model M --out DIR` writes it."
        ) from error
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise BundleError(
                f"{path} is larger than {MAX_BYTES} bytes; a manifest is a few kilobytes of JSON."
            ) from error
        raise BundleError(f"{path} cannot be read: {error.strerror or error}.") from error


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        stated = parse_json(content)
    except ValueError as error:
        raise BundleError(f"{where} is not valid JSON ({error}). Copy the bundle again, or export it again.") from error
    if not isinstance(stated, dict):
        raise BundleError(f"{where} must hold a JSON object, not {type(stated).__name__}. Export the bundle again.")
    return stated
