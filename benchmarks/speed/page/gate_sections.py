"""The sections of the records of a gate and of a gateway."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.report.drawing import Plot
from benchmarks.report.text import count
from benchmarks.speed.page.parts import (
    Column,
    Section,
    Table,
    facts_of,
    milliseconds,
    number,
    rounds_told,
    share,
    signed,
    versions_of,
)
from benchmarks.speed.page.plots import Bar, bar_plot
from benchmarks.speed.page.records import GateRecord, GatewayRecord

__all__ = ["gate_section", "gateway_section"]

# -- gate -----------------------------------------------------------------------------------------------


def gate_section(record: GateRecord, name: str) -> Section:
    """Return a gate's section; ``name`` is its anchor. Errors: MissingExtraError without matplotlib."""
    subject, settings = record.subject, record.settings
    told = [f"{subject.height} × {subject.width} pixels"]
    told += [f"prompt of {count(subject.prompt_tokens, 'token')}"] if subject.prompt_tokens is not None else []
    told += [count(subject.language_layers, "language-model layer")] if subject.language_layers is not None else []
    told += [f"guard’s head {subject.head}"] if subject.head else []
    return Section(
        name=name,
        kind="Gate",
        title=subject.name,
        warnings=[subject.weights] if subject.random or "random" in subject.weights.lower() else [],
        facts=facts_of(
            record,
            ("Model", ", ".join(told)),
            ("Threads", count(settings.threads)),
            ("Rounds", rounds_told(settings.rounds, settings.repeats).replace(" at most", "")),
            ("New tokens", f"at most {count(settings.max_new_tokens)}"),
        ),
        command=record.command or "",
        plots=tuple(_gate_plots(record, name)),
        tables=[_gate_table(record)],
        missing=[],
        terms=tuple(record.how_measured.items()),
        versions=versions_of(record),
    )


def _gate_table(record: GateRecord) -> Table:
    passes = list(dict.fromkeys(each for row in record.rows for each in row.passes))
    return Table(
        caption=f"Every way on every course, {record.subject.name}",
        columns=(
            Column(name="Way", number=False),
            Column(name="Course", number=False),
            Column(name="Median", unit="ms"),
            Column(name="Spread", unit="ms"),
            Column(name="Added to an answer", unit="ms"),
            *(Column(name=each.capitalize(), unit="passes") for each in passes),
            Column(name="Runs"),
        ),
        rows=[
            (
                row.way,
                row.course,
                number(row.median_ms),
                number(row.spread_ms),
                signed(row.added_ms),
                *(count(row.passes.get(each)) for each in passes),
                count(row.runs),
            )
            for row in record.rows
        ],
    )


def _gate_plots(record: GateRecord, name: str) -> Iterator[Plot]:
    """Draw blocks and answers apart: an answer takes many times as long."""
    for end, title in (("block", "Time to a block"), ("answer", "Time to an answer")):
        bars = [
            Bar(
                name=row.way if row.course == end else f"{row.way} · {row.course}",
                value=row.median_ms,
                told=milliseconds(row.median_ms),
                reference=row.way == "no guard",
            )
            for row in record.rows
            if row.course.endswith(end)
        ]
        if bars:
            grey = " Hollow: no guard, the reference." if any(bar.reference for bar in bars) else ""
            caption = f"Median of each way; shorter is better.{grey}"
            yield bar_plot(f"{name}-{end}", title, caption, bars, unit="ms")


# -- gateway --------------------------------------------------------------------------------------------


def gateway_section(record: GatewayRecord, name: str) -> Section:
    """Return a gateway's section; ``name`` is its anchor. Errors: MissingExtraError without matplotlib."""
    return Section(
        name=name,
        kind="Gateway",
        title=f"guard of {record.bundle}",
        warnings=[],
        facts=facts_of(
            record,
            ("Image", record.image),
            ("Rounds", f"{count(record.settings.rounds, 'round')} of {count(record.settings.requests, 'request')}"),
            ("Clients at once", count(record.clients)),
        ),
        command=record.command or "",
        plots=tuple(_gateway_plots(record, name)),
        tables=tuple(_gateway_tables(record)),
        missing=[],
        terms=tuple(record.how_measured.items()),
        versions=versions_of(record),
    )


def _gateway_tables(record: GatewayRecord) -> Iterator[Table]:
    yield Table(
        caption="A request that is allowed",
        columns=(Column(name="Request", number=False), Column(name="p50", unit="ms"), Column(name="p95", unit="ms")),
        rows=[
            *((way, *map(number, pair)) for way, pair in _requests(record)),
            ("added by the gateway", *map(signed, record.overhead_ms)),
        ],
    )
    yield Table(
        caption="Blocked requests",
        columns=(Column(name="Clients", number=False), Column(name="Blocks", unit="a second")),
        rows=[(who, number(rate, 1)) for who, rate in _rates(record)],
    )
    if record.first_token:
        bare = next(iter(record.first_token.values()))
        yield Table(
            caption="Time to the first text of an answer, llama.cpp",
            columns=(
                Column(name="Way", number=False),
                Column(name="Median", unit="ms"),
                Column(name="Times the first way", unit="×"),
            ),
            rows=[(way, number(ms), share(ms, bare)) for way, ms in record.first_token.items()],
        )


def _gateway_plots(record: GatewayRecord, name: str) -> Iterator[Plot]:
    requests = _requests(record)
    bars = [
        Bar(name=f"{way} · {told}", value=pair[at], told=milliseconds(pair[at]), reference=way == requests[0][0])
        for at, told in enumerate(("p50", "p95"))
        for way, pair in requests
    ]
    caption = "From sending to the whole answer; shorter is better. Hollow: without the gateway."
    yield bar_plot(f"{name}-requests", "An allowed request", caption, bars, unit="ms")
    bars = [Bar(name=who, value=rate, told=f"{number(rate, 1)} a second") for who, rate in _rates(record)]
    yield bar_plot(f"{name}-blocks", "Blocked requests", "Longer is better.", bars, unit="blocks a second")
    if record.first_token:
        bars = [
            Bar(name=way, value=ms, told=milliseconds(ms), reference=place == 0)
            for place, (way, ms) in enumerate(record.first_token.items())
        ]
        caption = "Median of a new picture each time; shorter is better. Hollow: the first way, which has no gate."
        yield bar_plot(f"{name}-first", "Time to the first text", caption, bars, unit="ms")


def _requests(record: GatewayRecord) -> tuple[tuple[str, list[float]], ...]:
    return ("upstream itself", record.direct_ms), ("through the gateway", record.gateway_ms)


def _rates(record: GatewayRecord) -> tuple[tuple[str, float], ...]:
    return ("1 client", record.blocks_alone), (f"{count(record.clients, 'client')} at once", record.blocks_together)
