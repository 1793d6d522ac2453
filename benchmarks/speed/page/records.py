"""Reads the records that ``benchmarks.speed`` and ``benchmarks.true_shapes`` write, and refuses what is none.

A record may hold more than is read here: what other versions add is kept in ``speed.json``, and not shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.report.files import not_numbers
from safevlm.errors import InputError
from safevlm.files.json_file import first_problem, parse_json
from safevlm.files.regular_file import read_regular

__all__ = [
    "CaseRow",
    "CaseSpeed",
    "GateRecord",
    "GatewayRecord",
    "GuardRecord",
    "GuardRow",
    "Loaded",
    "Machine",
    "QuantizeRecord",
    "Record",
    "StepRow",
    "TrueShapesRecord",
    "read_records",
]

MAX_BYTES = 50_000_000
"""A thousand times a usual record."""
MOST = 1e18
"""Larger figures are no measurement."""
Amount = Annotated[float, Field(ge=0, le=MOST)]
Signed = Annotated[float, Field(ge=-MOST, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Pair = Annotated[list[Amount], Field(min_length=2, max_length=2)]
SignedPair = Annotated[list[Signed], Field(min_length=2, max_length=2)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class Machine(_Part):
    """Where it was measured; ``memory_bytes`` is the machine's own."""

    name: str
    cores: Count | None = None
    memory_bytes: Count | None = None
    system: str | None = None


class Record(_Part):
    """What all records have."""

    schema_version: Literal[1] = 1
    benchmark: str
    created: str
    machine: Machine | str
    command: str | None = None
    versions: dict[str, str | None] = {}
    how_measured: dict[str, str] = {}


class _Subject(_Part):
    name: str
    random: bool
    weights: str
    layers: Count | None = None
    tap: str | None = None
    revision: str | None = None
    height: Count
    width: Count


class _GuardSubject(_Subject):
    classes: Count | None = None
    parameters: Count


class _GuardSettings(_Part):
    threads: Count
    rounds: Count
    repeats: Count | None = None
    seconds: Amount | None = None


class _Latency(_Part):
    median_ms: Amount
    p95_ms: Amount
    spread_ms: Amount | None
    ms_per_image: Amount
    rounds_ms: list[Amount]
    runs: Count


class GuardRow(_Part):
    """One peer at one batch size. ``version`` and ``versions`` are of the peer itself, where it states them.

    ``ours`` says whether this project made it; older records do not tell.
    """

    peer: str
    precision: str
    device: str
    batch: Count
    ours: bool | None = None
    status: Literal["measured", "unavailable", "failed"]
    reason: str | None = None
    version: str | None = None
    versions: dict[str, str | None] | None = None
    latency: _Latency | None = None
    ratio_to_torch_eager: Amount | None = None
    max_abs_prob_delta: Amount | None = None
    peak_rss_bytes: Count | None = None
    size_bytes: Count | None = None


class GuardRecord(Record):
    """Of ``benchmarks.speed guard``."""

    subject: _GuardSubject
    settings: _GuardSettings
    rows: list[GuardRow]


class _GateSubject(_Subject):
    prompt_tokens: Count | None = None
    language_layers: Count | None = None
    head: str | None = None


class _GateSettings(_Part):
    threads: Count
    rounds: Count
    repeats: Count
    max_new_tokens: Count


class _GateRow(_Part):
    way: str
    course: str
    median_ms: Amount
    spread_ms: Amount | None
    added_ms: Signed | None
    passes: dict[str, Count]
    runs: Count


class GateRecord(Record):
    """Of ``benchmarks.speed gate``."""

    subject: _GateSubject
    settings: _GateSettings
    rows: list[_GateRow]


class _GatewaySettings(_Part):
    rounds: Count
    requests: Count


class GatewayRecord(Record):
    """Of ``benchmarks.speed gateway``; pairs are p50 and p95."""

    bundle: str
    image: str
    settings: _GatewaySettings
    direct_ms: Pair
    gateway_ms: Pair
    overhead_ms: SignedPair
    blocks_alone: Amount
    blocks_together: Amount
    clients: Count
    first_token: dict[str, Amount]


class CaseRow(_Part):
    """One quantizer's outcome."""

    peer: str
    version: str | None = None
    seconds: Amount | None = None
    peak_rss_bytes: Count | None = None
    error: Amount | None = None
    problem: str | None = None


class CaseSpeed(_Part):
    """One model that was quantized by all."""

    case: str
    samples: Count
    length: Count
    bits: Count
    group_size: Count
    threads: Count
    rounds: Count
    rows: list[CaseRow]


class QuantizeRecord(Record):
    """Of ``benchmarks.speed quantize``."""

    cases: list[CaseSpeed]


class StepRow(_Part):
    """One command at a real shape; ``most_bytes`` is the memory that is promised, if any is."""

    shape: str
    layers: Count | None
    sparse: bool
    step: str
    problem: str | None
    most_bytes: Count | None
    command: str
    code: int
    seconds: Amount
    peak_bytes: Count
    read_bytes: Count
    written_bytes: Count


class TrueShapesRecord(Record):
    """Of ``benchmarks.true_shapes``."""

    weights: str
    rows: list[StepRow]


KINDS: Mapping[str, type[Record]] = {
    "guard": GuardRecord,
    "gate": GateRecord,
    "gateway": GatewayRecord,
    "quantize": QuantizeRecord,
    "true_shapes": TrueShapesRecord,
}
AGAIN = "Give a file that benchmarks.speed wrote with --out, or true_shapes.json, as it was written."


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A record with its file, and ``content``: all that the file states."""

    path: Path
    record: Record
    content: Mapping[str, Any]


def read_records(paths: Sequence[Path]) -> tuple[Loaded, ...]:
    """Return the records in the files' order. Errors: InputError for a file that is none, with its first problem."""
    return tuple(_read(path) for path in paths)


def _read(path: Path) -> Loaded:
    content = _content(path)
    kind = content.get("benchmark")
    if not isinstance(kind, str) or kind not in KINDS:
        told = "is missing" if "benchmark" not in content else f"is {json.dumps(kind)[:80]}"
        raise InputError(f"{path}: 'benchmark' {told}, but records of {', '.join(KINDS)} can be shown. {AGAIN}")
    bad = next(not_numbers(content, "record"), None)
    if bad is not None:
        raise InputError(f"{path}: {bad} is no number that JSON allows. {AGAIN}")
    try:
        record = KINDS[kind].model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: no whole record of {kind}: {first_problem(error)}. {AGAIN}") from error
    return Loaded(path=path, record=record, content=content)


def _content(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_regular(path, MAX_BYTES), rows=True)  # NaN is refused with its place
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file. {AGAIN}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}). {AGAIN}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}). {AGAIN}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, but a record is an object. {AGAIN}")
    return value
