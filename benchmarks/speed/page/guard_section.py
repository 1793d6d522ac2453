"""The section of a guard's record: latency, ratio, memory and size of every peer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.report.drawing import Plot
from benchmarks.report.text import MINUS, count
from benchmarks.speed.page.parts import (
    NOTHING,
    Column,
    Section,
    Table,
    facts_of,
    mebibytes,
    milliseconds,
    number,
    rounds_told,
    spread_of,
    versions_of,
)
from benchmarks.speed.page.plots import Bar, bar_plot
from benchmarks.speed.page.records import GuardRecord, GuardRow

__all__ = ["guard_section"]

REFERENCE = "torch eager"
HOLLOW = "Hollow and grey: not of this project."
LINE = "The thin line ends at the lowest and highest median of the rounds."
MEBIBYTE = 2**20
COLUMNS = (
    Column(name="Peer", number=False),
    Column(name="Made by", number=False),
    Column(name="Precision", number=False),
    Column(name="Device", number=False),
    Column(name="Batch", unit="images"),
    Column(name="Median", unit="ms a batch"),
    Column(name="p95", unit="ms a batch"),
    Column(name="Spread", unit="ms"),
    Column(name="An image", unit="ms"),
    Column(name="Speed", unit="× torch eager"),
    Column(name="Peak memory", unit="MiB"),
    Column(name="Size", unit="MiB"),
    Column(name="Differs", unit="most, of p"),
    Column(name="Runs"),
    Column(name="Medians of rounds", unit="ms", number=False),
)


def guard_section(record: GuardRecord, name: str) -> Section:
    """Return the section; ``name`` is its anchor. Errors: MissingExtraError without matplotlib."""
    subject, settings = record.subject, record.settings
    layers = "" if subject.layers is None else f", cut to {count(subject.layers, 'vision layer')}"
    told = [count(subject.classes, "class", "classes")] if subject.classes is not None else []
    told += [f"tap: {subject.tap}"] if subject.tap else []
    told += [f"revision {subject.revision}"] if subject.revision else []
    size = f"{subject.parameters / 1e6:,.1f} M parameters, {subject.height} × {subject.width} pixels"
    rounds = rounds_told(settings.rounds, settings.repeats)
    title = f"{subject.name}{layers}"
    return Section(
        name=name,
        kind="Guard",
        title=title,
        warnings=[subject.weights] if subject.random or "random" in subject.weights.lower() else [],
        facts=facts_of(
            record,
            ("Guard", ", ".join([size, *told])),
            ("Threads", count(settings.threads)),
            ("Rounds", rounds if settings.seconds is None else f"{rounds}, none begun after {settings.seconds:g} s"),
        ),
        command=record.command or "",
        plots=tuple(_plots(record.rows, name)),
        tables=[Table(caption=f"Every peer, guard of {title}", columns=COLUMNS, rows=_cells(record))],
        missing=_missing(record.rows),
        terms=tuple(record.how_measured.items()),
        versions=(*versions_of(record), *_own_versions(record.rows)),
    )


def _plots(rows: Sequence[GuardRow], name: str) -> Iterator[Plot]:
    """Draw latency and ratio for each device and batch size, memory for each batch size, and sizes."""
    groups = list(dict.fromkeys((row.device, row.batch) for row in rows if row.latency is not None))
    for number_, (device, batch) in enumerate(groups):
        own = [row for row in rows if (row.device, row.batch) == (device, batch)]
        where = f"{device.upper()}, batch {batch}"
        yield _latency(own, f"{name}-latency-{number_}", where)
        compared = [row for row in own if row.ratio_to_torch_eager is not None]
        if any(row.peer != REFERENCE for row in compared):
            yield _ratio(compared, f"{name}-ratio-{number_}", where)
    for number_, batch in enumerate(dict.fromkeys(row.batch for row in rows)):
        bars = [
            _bytes_bar(f" · {row.precision} · {row.device.upper()}", row, row.peak_rss_bytes)
            for row in rows
            if row.batch == batch and row.peak_rss_bytes is not None
        ]
        if bars:
            caption = f"Most resident memory of a process that runs this peer alone. {HOLLOW}"
            yield bar_plot(f"{name}-memory-{number_}", f"Peak memory: batch {batch}", caption, bars, unit="MiB")
    sized: dict[tuple[str, str, int], GuardRow] = {}
    for row in rows:
        if row.size_bytes is not None:
            sized.setdefault((row.peer, row.precision, row.size_bytes), row)  # the same file for every batch size
    if sized:
        bars = [_bytes_bar(f" · {row.precision}", row, row.size_bytes) for row in sized.values()]
        yield bar_plot(f"{name}-size", "Size", f"Weights and graph as they are stored. {HOLLOW}", bars, unit="MiB")


def _latency(rows: Sequence[GuardRow], name: str, where: str) -> Plot:
    bars = [
        Bar(
            name=row.peer,
            detail=f" · {row.precision}",
            value=row.latency.median_ms,
            told=milliseconds(row.latency.median_ms),
            spread=spread_of(row.latency.rounds_ms),
            reference=_is_peer(row),
        )
        for row in rows
        if row.latency is not None
    ]
    caption = f"Median of one call; shorter is better. {LINE} {HOLLOW}"
    return bar_plot(name, f"Latency: {where}", caption, bars, unit="ms a batch")


def _ratio(rows: Sequence[GuardRow], name: str, where: str) -> Plot:
    bars = [
        Bar(
            name=row.peer,
            detail=f" · {row.precision}",
            value=row.ratio_to_torch_eager or 0.0,
            told=f"× {number(row.ratio_to_torch_eager)}",
            limit=1.0,
            reference=_is_peer(row),
        )
        for row in rows
    ]
    caption = f"How many times as fast as torch eager, the dashed mark; longer is better. {HOLLOW}"
    return bar_plot(name, f"Speed: {where}", caption, bars, unit="× torch eager")


def _bytes_bar(detail: str, row: GuardRow, size: int | None) -> Bar:
    value, reference = (size or 0) / MEBIBYTE, _is_peer(row)
    return Bar(name=row.peer, detail=detail, value=value, told=f"{number(value, 0)} MiB", reference=reference)


def _is_peer(row: GuardRow) -> bool:
    return row.peer == REFERENCE if row.ours is None else not row.ours


def _cells(record: GuardRecord) -> list[tuple[str, ...]]:
    found = []
    for row in record.rows:
        if row.latency is None and row.size_bytes is None and row.peak_rss_bytes is None:
            continue  # it stands among what was not measured
        latency, delta = row.latency, row.max_abs_prob_delta
        times = (latency.median_ms, latency.p95_ms, latency.spread_ms, latency.ms_per_image) if latency else (None,) * 4
        found.append(
            (
                row.peer,
                "peer" if _is_peer(row) else "us",
                row.precision,
                row.device.upper(),
                count(row.batch),
                *map(number, times),
                number(row.ratio_to_torch_eager),
                mebibytes(row.peak_rss_bytes),
                mebibytes(row.size_bytes, 1),
                NOTHING if delta is None else f"{delta:.2g}".replace("-", MINUS),
                NOTHING if latency is None else count(latency.runs),
                NOTHING if latency is None else ", ".join(map(number, latency.rounds_ms)) or NOTHING,
            )
        )
    return found


def _missing(rows: Sequence[GuardRow]) -> list[str]:
    """Say what of a peer is missing and why; a peer that cannot run here says it once for all batch sizes."""
    told = []
    for row in rows:
        if row.status == "measured" and row.reason is None:
            continue
        state = "measured in some rounds only" if row.status == "measured" else row.status
        batch = "" if row.status == "unavailable" else f", batch {row.batch}"
        reason = row.reason or "no reason is stated"
        told.append(f"{row.peer} {row.precision} on {row.device.upper()}{batch}: {state}: {reason}")
    return list(dict.fromkeys(told))


def _own_versions(rows: Sequence[GuardRow]) -> list[tuple[str, str]]:
    """Return the versions that peers state themselves, each once."""
    found = [(row.peer, row.version) for row in rows if row.version is not None]
    found += [
        (f"{row.peer}: {name}", version or "not installed")
        for row in rows
        for name, version in (row.versions or {}).items()
    ]
    return list(dict.fromkeys(found))
