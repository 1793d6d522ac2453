"""The sections of the speed page, one a record."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.report.drawing import Plot
from benchmarks.report.text import count
from benchmarks.speed.page.gate_sections import gate_section, gateway_section
from benchmarks.speed.page.guard_section import guard_section
from benchmarks.speed.page.parts import (
    NOTHING,
    Column,
    Section,
    Table,
    facts_of,
    mebibytes,
    number,
    seconds,
    share,
    versions_of,
)
from benchmarks.speed.page.plots import Bar, bar_plot
from benchmarks.speed.page.records import (
    CaseSpeed,
    GateRecord,
    GatewayRecord,
    GuardRecord,
    QuantizeRecord,
    Record,
    StepRow,
    TrueShapesRecord,
)

__all__ = ["section_of"]

GIBIBYTE, MEBIBYTE = 2**30, 2**20
OURS = "ours"
WATCHED = (
    ("seconds", "from the start of the command to its end, interpreter and imports included"),
    ("peak memory", "most resident memory (Linux: VmHWM) of the command's process, mapped file pages included"),
    ("read, written", "bytes that system calls moved (rchar, wchar); pages of a mapped file are not among them"),
    ("promised", "the most memory that the step may take; a step that takes more is listed with its reason"),
)


def section_of(record: Record, name: str) -> Section:
    """Return a record's section; ``name`` is its anchor. Errors: MissingExtraError without matplotlib."""
    if isinstance(record, GuardRecord):
        return guard_section(record, name)
    if isinstance(record, GateRecord):
        return gate_section(record, name)
    if isinstance(record, GatewayRecord):
        return gateway_section(record, name)
    if isinstance(record, QuantizeRecord):
        return _quantize(record, name)
    assert isinstance(record, TrueShapesRecord)
    return _true_shapes(record, name)


# -- quantize -------------------------------------------------------------------------------------------


def _quantize(record: QuantizeRecord, name: str) -> Section:
    threads = dict.fromkeys(count(case.threads) for case in record.cases)
    return Section(
        name=name,
        kind="Quantize",
        title=f"GPTQ of {count(len(record.cases), 'model')}",
        warnings=["random weights, the same for all: times, memory and error of the method, not of a model"],
        facts=facts_of(record, ("Threads", ", ".join(threads) or NOTHING)),
        command=record.command or "",
        plots=tuple(plot for place, case in enumerate(record.cases) for plot in _case_plots(case, f"{name}-{place}")),
        tables=[_case_table(case) for case in record.cases],
        missing=[
            f"{row.peer}, {case.case}: {row.problem}"
            for case in record.cases
            for row in case.rows
            if row.problem is not None
        ],
        terms=tuple(record.how_measured.items()),
        versions=versions_of(record),
    )


def _case_table(case: CaseSpeed) -> Table:
    ours = next((row for row in case.rows if row.peer == OURS), None)
    base = (ours.seconds, ours.peak_rss_bytes) if ours is not None else (None, None)
    return Table(
        caption=f"{case.case}: {case.bits} bits, groups of {case.group_size}, {count(case.samples, 'sample')} of "
        f"{count(case.length, 'token')}, {count(case.threads, 'thread')}, best of {count(case.rounds, 'round')}",
        columns=(
            Column(name="Quantizer", number=False),
            Column(name="Version", number=False),
            Column(name="Time", unit="s"),
            Column(name="Time", unit="× ours"),
            Column(name="Peak memory", unit="MiB"),
            Column(name="Peak memory", unit="× ours"),
            Column(name="Error", unit="of the output"),
        ),
        rows=[
            (
                row.peer,
                row.version or NOTHING,
                number(row.seconds, 1),
                share(row.seconds, base[0]),
                mebibytes(row.peak_rss_bytes),
                share(row.peak_rss_bytes, base[1]),
                NOTHING if row.error is None else f"{row.error:.4f}",
            )
            for row in case.rows
        ],
    )


def _case_plots(case: CaseSpeed, name: str) -> Iterator[Plot]:
    caption = f"{case.case}; shorter is better. Hollow: peers; filled: this project."
    timed = [row for row in case.rows if row.seconds is not None]
    if timed:
        bars = [
            Bar(name=row.peer, value=row.seconds or 0, told=seconds(row.seconds or 0), reference=row.peer != OURS)
            for row in timed
        ]
        yield bar_plot(f"{name}-seconds", "Time to quantize", caption, bars, unit="seconds")
    held = [(row.peer, (row.peak_rss_bytes or 0) / MEBIBYTE) for row in case.rows if row.peak_rss_bytes is not None]
    if held:
        bars = [Bar(name=who, value=mib, told=f"{number(mib, 0)} MiB", reference=who != OURS) for who, mib in held]
        yield bar_plot(f"{name}-memory", "Peak memory", caption, bars, unit="MiB")


# -- true shapes ----------------------------------------------------------------------------------------


def _true_shapes(record: TrueShapesRecord, name: str) -> Section:
    shapes = dict.fromkeys(_shape(row) for row in record.rows)
    return Section(
        name=name,
        kind="True shapes",
        title=", ".join(dict.fromkeys(row.shape for row in record.rows)) or "no step",
        warnings=["random weights: times, sizes and memory alone mean something"] if record.weights == "random" else [],
        facts=facts_of(record, ("Shapes and layers", "; ".join(shapes) or NOTHING)),
        command=record.command or "",
        plots=tuple(plot for at, shape in enumerate(shapes) for plot in _shape_plots(record, shape, f"{name}-{at}")),
        tables=[_shape_table(record)],
        missing=[f"{_shape(row)}, {row.step}: {row.problem}" for row in record.rows if row.problem is not None],
        terms=tuple(record.how_measured.items()) or WATCHED,
        versions=versions_of(record),
    )


def _shape_table(record: TrueShapesRecord) -> Table:
    return Table(
        caption="Every step at every shape",
        columns=(
            Column(name="Shape", number=False),
            Column(name="Step", number=False),
            Column(name="Time", unit="s"),
            Column(name="Peak memory", unit="GiB"),
            Column(name="Promised", unit="GiB at most"),
            Column(name="Read", unit="GiB"),
            Column(name="Written", unit="GiB"),
            Column(name="Exit code"),
            Column(name="Command", number=False),
        ),
        rows=[
            (
                _shape(row),
                row.step,
                number(row.seconds, 1),
                *(_gibibytes(size) for size in (row.peak_bytes, row.most_bytes, row.read_bytes, row.written_bytes)),
                str(row.code),
                row.command,
            )
            for row in record.rows
        ],
    )


def _shape_plots(record: TrueShapesRecord, shape: str, name: str) -> Iterator[Plot]:
    own = [row for row in record.rows if _shape(row) == shape]
    bars = [
        Bar(
            name=row.step,
            value=row.peak_bytes / GIBIBYTE,
            told=f"{_gibibytes(row.peak_bytes)} GiB"
            + (f" of {_gibibytes(row.most_bytes)}" if row.most_bytes is not None else ""),
            limit=None if row.most_bytes is None else row.most_bytes / GIBIBYTE,
            bad=row.problem is not None,
        )
        for row in own
    ]
    red = " Red: the step failed or took more." if any(bar.bad for bar in bars) else ""
    caption = f"Of each step. Dashed: the most that is promised.{red}"
    yield bar_plot(f"{name}-peak", f"Peak memory: {shape}", caption, bars, unit="GiB")
    bars = [
        Bar(name=row.step, value=row.seconds, told=seconds(row.seconds), bad=row.problem is not None) for row in own
    ]
    yield bar_plot(f"{name}-time", f"Time: {shape}", "Of each step, imports included.", bars, unit="seconds")


def _shape(row: StepRow) -> str:
    depth = "all layers" if row.layers is None else count(row.layers, "layer")
    return f"{row.shape}, {depth}{', sparse' if row.sparse else ''}"


def _gibibytes(size: int | None) -> str:
    return NOTHING if size is None else number(size / GIBIBYTE)
