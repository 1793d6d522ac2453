"""What a section of the speed page is made of, and how its figures read. Texts are made harmless by the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report.drawing import Plot
from benchmarks.report.text import MINUS, count, moment
from benchmarks.speed.page.records import Machine, Record

__all__ = [
    "NOTHING",
    "Column",
    "Section",
    "Table",
    "facts_of",
    "machine_of",
    "mebibytes",
    "milliseconds",
    "number",
    "rounds_told",
    "seconds",
    "share",
    "signed",
    "spread_of",
    "versions_of",
]

NOTHING = "–"
MEBIBYTE, GIBIBYTE = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class Column:
    """The head of a column; ``unit`` stands small below its name."""

    name: str
    unit: str = ""
    number: bool = True


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of texts, as many as there are columns; the first of a row is its head."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One record; ``missing`` says what was not measured and why, ``terms`` how the rest was."""

    name: str
    kind: str
    title: str
    warnings: Sequence[str]
    facts: Sequence[tuple[str, str]]
    command: str
    plots: Sequence[Plot]
    tables: Sequence[Table]
    missing: Sequence[str]
    terms: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]


def facts_of(record: Record, *more: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the machine's facts, then ``more``, then when it was measured."""
    machine = record.machine if isinstance(record.machine, Machine) else Machine(name=record.machine)
    facts = [("Machine", machine.name)]
    if machine.memory_bytes is not None:
        facts.append(("Memory of the machine", f"{machine.memory_bytes / GIBIBYTE:.1f} GiB"))
    if machine.system:
        facts.append(("System", machine.system))
    return (*facts, *more, ("Measured", moment(record.created)))


def machine_of(record: Record) -> str:
    """Return the machine's name."""
    return record.machine.name if isinstance(record.machine, Machine) else record.machine


def versions_of(record: Record) -> tuple[tuple[str, str], ...]:
    """Return names and versions; what was not installed says so."""
    return tuple((name, version or "not installed") for name, version in record.versions.items())


def number(value: float | None, digits: int = 2) -> str:
    """Return ``1,234.50``, below 1 with three decimals, of what is not negative; a dash for None."""
    if value is None:
        return NOTHING
    if 0 < value < 0.0005:
        return "< 0.001"
    return f"{value:.3f}" if 0 < value < 0.9995 else f"{value:,.{digits}f}"


def milliseconds(value: float | None) -> str:
    """Return ``12.34 ms``."""
    return NOTHING if value is None else f"{number(value)} ms"


def seconds(value: float) -> str:
    """Return ``12.3 s``."""
    return f"{number(value, 1)} s"


def mebibytes(value: int | None, digits: int = 0) -> str:
    """Return bytes as MiB, without the unit."""
    return NOTHING if value is None else number(value / MEBIBYTE, digits)


def signed(value: float | None) -> str:
    """Return ``+1.50`` or ``−0.25``."""
    return NOTHING if value is None else f"{value:+,.2f}".replace("-", MINUS)


def share(value: float | None, whole: float | None) -> str:
    """Return how many times ``whole`` a value is."""
    return NOTHING if value is None or not whole else number(value / whole)


def spread_of(rounds: Sequence[float]) -> tuple[float, float] | None:
    """Return the lowest and highest of several rounds, None of fewer than two."""
    return (min(rounds), max(rounds)) if len(rounds) > 1 else None


def rounds_told(rounds: int, repeats: int | None) -> str:
    """Return ``3 rounds of at most 30 runs``."""
    return count(rounds, "round") + ("" if repeats is None else f" of at most {count(repeats, 'run')}")
