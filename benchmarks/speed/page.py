"""Records of speed, memory and size as one HTML page without script or network, and as one JSON file beside it.

::

    speed.html   for people
    speed.json   all records as they were read, in one list

What a record holds is shown as it stands there: its lists of rows as tables, its other figures as one more, with the
unit that ends a name (``_ms``, ``_bytes``, ``seconds``). The measures in ``DRAWN`` are drawn as bars.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from benchmarks.report.drawing import AFTER, BEFORE, SURFACE, WORSE, Plot, svg
from benchmarks.report.files import not_numbers, strict_json, write_files
from benchmarks.report.template import asset, render
from benchmarks.report.text import MINUS, moment, visible
from safevlm.errors import InputError
from safevlm.files.json_file import first_problem, parse_json
from safevlm.files.regular_file import read_regular
from safevlm.machine import now

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["KINDS", "Bar", "bar_plot", "read_records", "shortened", "speed_page", "write_speed_page"]

SCHEMA_VERSION = 1
KINDS = ("guard", "gate", "gateway", "quantize", "true_shapes", "gpu_proof")
MAX_BYTES = 50_000_000
"""A thousand times a usual record."""
MOST = 1e18
"""Larger figures are no measurement: they are shown as they stand, and not drawn."""
DRAWN = ("latency median_ms", "median_ms", "peak_rss_bytes", "peak_bytes", "size_bytes", "seconds")
APART = ("shape", "case", "device", "batch")
"""Rows that differ in these stand in figures of their own."""
TOLD = ("reason", "problem")
"""Columns that say why something is not as it should be."""
UNTOLD = ("command", "key", "said", "status", "version", "weights", "runtime", "work")
"""Texts that tell no row from another, or not in few words."""
REFERENCES = ("torch eager", "no guard")
NOTHING = "–"
MEBIBYTE = 2**20
HOLLOW = "Shorter is better. Hollow: not of this project, or without a guard; red: something failed."
AGAIN = "Give a file that benchmarks.speed wrote with --out, or true_shapes.json, as it was written."

Content = dict[str, Any]
Row = dict[str, JsonValue]
"""Figures and texts by name; what stands deeper has the names on its way before it."""


class Record(BaseModel):
    """What all records have; what else they hold is shown, too."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)

    schema_version: int = SCHEMA_VERSION
    benchmark: str
    created: str
    machine: str | dict[str, JsonValue]
    command: str | None = None
    versions: dict[str, str | None] = {}
    how_measured: dict[str, str] = {}
    weights: str | None = None
    subject: dict[str, JsonValue] = {}
    settings: dict[str, JsonValue] = {}

    @property
    def rest(self) -> dict[str, Any]:
        """What this kind of record has alone."""
        return dict(self.model_extra or {})


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: ``told`` is its value as text, with the unit. A ``reference`` is hollow, a ``bad`` one red."""

    name: str
    value: float
    told: str
    reference: bool = False
    bad: bool = False


# -- the page -------------------------------------------------------------------------------------------


def write_speed_page(paths: Sequence[Path], out: Path) -> Path:
    """Write ``speed.html`` and ``speed.json`` of the records in ``paths`` into ``out``, and return the page's path.

    The folder is made; where it is there, the two files are replaced. Raises InputError for a file that is no record,
    for no file at all, and for an ``out`` that cannot be written; MissingExtraError without jinja2 or matplotlib.
    """
    if not paths:
        raise InputError("RECORD is missing. Give files that benchmarks.speed or benchmarks.true_shapes wrote.")
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise InputError(f"--out {out} is a file. Give a folder, or a new name.")
    records = read_records(paths)
    created = now()
    listed = {"schema_version": SCHEMA_VERSION, "created": created, "records": [content for _, content in records]}
    files = {"speed.json": strict_json(listed), "speed.html": speed_page(records, created).encode("utf-8")}
    write_files(out, files)
    return out / "speed.html"


def speed_page(records: Sequence[tuple[Record, Content]], created: str) -> str:
    """Return the page of at least one record; ``created`` is its time. Raises MissingExtraError."""
    times = sorted({moment(record.created) for record, _ in records})
    context = {
        "sections": [_section(record, f"record-{place}") for place, (record, _) in enumerate(records, 1)],
        "css": asset("style.css"),
        "created": created,
        "machines": list(dict.fromkeys(_machine(record) for record, _ in records)),
        "times": times[:1] + times[1:][-1:],
    }
    return render("speed.html.j2", context)


def read_records(paths: Sequence[Path]) -> list[tuple[Record, Content]]:
    """Return the records in the files' order, with what each file states. Raises InputError for a file that is none."""
    return [_read(path) for path in paths]


def _read(path: Path) -> tuple[Record, Content]:
    content = _content(path)
    kind = content.get("benchmark")
    if not isinstance(kind, str) or kind not in KINDS:
        told = "is missing" if "benchmark" not in content else f"is {json.dumps(kind)[:80]}"
        raise InputError(f"{path}: 'benchmark' {told}; it must be one of {', '.join(KINDS)}. {AGAIN}")
    bad = next(not_numbers(content, "record"), None)
    if bad is not None:
        raise InputError(f"{path}: {bad} is not a number that JSON allows. {AGAIN}")
    try:
        record = Record.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: not a complete record of {kind}: {first_problem(error)}. {AGAIN}") from error
    if record.schema_version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version must be {SCHEMA_VERSION}, not {record.schema_version}. {AGAIN}")
    return record, content


def _content(path: Path) -> Content:
    try:
        value = parse_json(read_regular(path, MAX_BYTES), rows=True)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file. {AGAIN}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}). {AGAIN}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}). {AGAIN}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a record must be a JSON object, not {type(value).__name__}. {AGAIN}")
    return value


# -- a section ------------------------------------------------------------------------------------------


def _section(record: Record, name: str) -> dict[str, Any]:
    """Return what the template shows of a record; ``name`` is its anchor."""
    tables = list(_tables(record.rest))
    figures = {key: value for key, value in _flat(record.rest).items() if not _holds_rows(key, value)}
    tables += [("figures", [{"figure": key, "value": value} for key, value in figures.items()])] if figures else []
    weights = record.weights or str(record.subject.get("weights", ""))
    stated = {"machine": record.machine}, record.subject, record.settings
    told = [item for part in stated for item in _flat(part).items() if item[1] is not None]
    facts = [(_named(key)[0], _shown(key, value)) for key, value in told]
    return {
        "name": name,
        "kind": record.benchmark.capitalize().replace("_", " "),
        "title": _title(record, tables),
        "warnings": [weights] if "random" in weights.lower() else [],
        "facts": [*facts, ("Measured", moment(record.created))],
        "command": record.command or "",
        "plots": [*_plots(tables, name), *_figures_plot(figures, name)],
        "tables": [_table(caption, rows) for caption, rows in tables],
        "missing": [told for _, rows in tables for told in _missing(rows)],
        "terms": list(record.how_measured.items()),
        "versions": [(key, version or "not installed") for key, version in record.versions.items()],
    }


def _machine(record: Record) -> str:
    return record.machine if isinstance(record.machine, str) else str(record.machine.get("name"))


def _title(record: Record, tables: Sequence[tuple[str, list[Row]]]) -> str:
    stated = record.subject.get("name") or record.rest.get("bundle")
    found = dict.fromkeys(str(row[key]) for _, rows in tables for row in rows for key in APART[:2] if key in row)
    return str(stated or ", ".join(found) or record.benchmark)


def _tables(content: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Yield each list of rows with its name; one within rows has their texts and figures before its own."""
    for key, value in content.items():
        if not _holds_rows(key, value):
            continue
        inner = [list(_tables(row)) for row in value]
        if any(inner):
            for row, found in zip(value, inner, strict=True):
                shared = {name: each for name, each in _flat(row).items() if not _holds_rows(name, each)}
                caption = ", ".join(f"{_named(name)[0]} {_shown(name, each)}" for name, each in shared.items())
                case = {name: each for name, each in shared.items() if name in APART}
                yield from ((caption, [{**case, **each} for each in rows]) for _, rows in found)
        else:
            yield key, [_flat(row) for row in value]


def _holds_rows(key: str, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value) and bool(value or key == "rows")


def _flat(value: Mapping[str, Any], before: str = "") -> Row:
    """Return figures and texts by name, those of a mapping with its name before theirs."""
    found: Row = {}
    for key, each in value.items():
        found |= _flat(each, f"{before}{key} ") if isinstance(each, dict) else {f"{before}{key}": each}
    return found


def _table(caption: str, rows: Sequence[Row]) -> dict[str, Any]:
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in TOLD]
    figures = {name: all(_is_figure(row.get(name)) for row in rows) for name in names}
    return {
        "caption": _named(caption)[0],
        "columns": [{"name": _named(each)[0], "unit": _named(each)[1], "number": figures[each]} for each in names],
        "rows": [[_cell(name, row) for name in names] for row in rows],
    }


def _cell(name: str, row: Row) -> str:
    """Return a cell's text; a figure without a column of its own has its unit from its own name."""
    if name == "figure":
        text, unit = _named(str(row[name]))
        return f"{text}, {unit}" if unit else text
    return _shown(str(row["figure"]) if "figure" in row else name, row.get(name), unit=False)


def _missing(rows: Sequence[Row]) -> list[str]:
    """Say of which rows something is missing, and why."""
    found = [(_label(row), row.get("status"), row.get(key)) for row in rows for key in TOLD if row.get(key)]
    return list(dict.fromkeys(": ".join(str(each) for each in told if each is not None) for told in found))


def _label(row: Row) -> str:
    """Return what tells a row from the others: its short texts."""
    told = [str(each) for key, each in row.items() if isinstance(each, str) and key not in (*APART, *TOLD, *UNTOLD)]
    return " · ".join(told) or NOTHING


def _plots(tables: Sequence[tuple[str, list[Row]]], name: str) -> Iterator[Plot]:
    """Draw each measure of ``DRAWN``, rows that are not alike apart."""
    for at, (_, rows) in enumerate(tables):
        groups = list(dict.fromkeys(tuple((key, str(row[key])) for key in APART if key in row) for row in rows))
        for measure in DRAWN:
            for number, group in enumerate(groups):
                bars = [
                    Bar(
                        name=_label(row),
                        value=_scaled(measure, value),
                        told=_shown(measure, value),
                        reference=row.get("ours") is False
                        or any(row.get(key) in REFERENCES for key in ("peer", "way")),
                        bad=bool(row.get("problem")),
                    )
                    for row in rows
                    if all(str(row.get(key)) == each for key, each in group)
                    and _is_figure(value := row.get(measure))
                    and value is not None
                ]
                title, unit = _named(measure)
                where = ", ".join(f"{key} {each}" for key, each in group)
                if bars:
                    place = f"{name}-{at}-{DRAWN.index(measure)}-{number}"
                    yield bar_plot(place, f"{title}: {where}" if where else title, HOLLOW, bars, unit=unit)


def _figures_plot(figures: Row, name: str) -> Iterator[Plot]:
    """Draw the times among single figures, the first of several."""
    bars = []
    for key, value in figures.items():
        first = value[0] if isinstance(value, list) and value else value
        times = key.startswith("first_token ") or key.endswith("_ms")
        if times and _is_figure(first) and first is not None:
            told = f"{_shown(key, value, unit=False)} ms"
            bars.append(Bar(name=_named(key)[0], value=_scaled(key, first), told=told))
    if bars:
        yield bar_plot(f"{name}-figures", "Times", "Shorter is better; the first of several.", bars, unit="ms")


# -- figures as texts -----------------------------------------------------------------------------------


def _is_figure(value: object) -> bool:
    """Say whether a value may stand among figures: a number, or none."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MOST)


def _named(key: str) -> tuple[str, str]:
    """Return a key in words, and the unit that its end states."""
    unit = next((unit for end, unit in (("_ms", "ms"), ("_bytes", "MiB"), ("seconds", "s")) if key.endswith(end)), "")
    words = re.sub(r"_(?:ms|bytes)$", "", key).replace("_rss", "_memory").replace("_", " ")
    return (words[:1].upper() + words[1:]) if key.islower() else words, unit


def _scaled(key: str, value: Any) -> float:
    return float(value) / MEBIBYTE if key.endswith("_bytes") else float(value)


def _shown(key: str, value: JsonValue, *, unit: bool = True) -> str:
    """Return a value in words: numbers as people read them, lists side by side, a dash for nothing."""
    if value is None or value == []:
        return NOTHING
    if isinstance(value, list):
        return ", ".join(_shown(key, each, unit=unit) for each in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not _is_figure(value):
        return str(value)
    whole = isinstance(value, int) and not key.endswith("_bytes")
    told = f"{value:,}".replace("-", MINUS) if whole else _number(_scaled(key, value))
    return f"{told} {_named(key)[1]}".rstrip() if unit else told


def _number(value: float) -> str:
    """Return ``1,234.50``, and small ones with three figures: ``0.0123``, ``1.2e−07``."""
    told = f"{value:,.2f}" if value == 0 or abs(value) >= 0.9995 else f"{value:.3g}"
    return told.replace("-", MINUS)


# -- bars -----------------------------------------------------------------------------------------------

ROOM = 50
"""Letters of the figure's type that fit beside each other; a wide one counts twice."""
ROW_INCHES, FRAME_INCHES = 0.44, 0.5
NAME_PLACE, BAR_PLACE, BAR_HEIGHT = -0.2, 0.2, 0.32


def bar_plot(name: str, title: str, caption: str, bars: Sequence[Bar], *, unit: str) -> Plot:
    """Return the figure of at least one bar; ``unit`` names the axis.

    ``name`` is unique on the page. Raises MissingExtraError without matplotlib.
    """
    title = visible(title)
    most = max(0.0, *(bar.value for bar in bars)) or 1.0

    def draw(ax: Axes) -> None:
        for row, bar in enumerate(bars):
            _draw_bar(ax, row, bar)
        ax.set_xlim(0, 1.03 * most)
        ax.set_ylim(len(bars) - 0.5, -0.5)
        ax.set_yticks([])
        ax.locator_params(axis="x", nbins=5)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        ax.set_xlabel(unit)
        ax.grid(axis="x")
        ax.spines["left"].set_visible(False)

    told = "; ".join(f"{visible(bar.name)}: {bar.told}" for bar in bars)
    drawn = svg(name, draw, height=FRAME_INCHES + ROW_INCHES * len(bars), title=title)
    return Plot(name=name, title=title, caption=visible(caption), told=told, svg=drawn)


def _draw_bar(ax: Axes, row: int, bar: Bar) -> None:
    """Write a bar's name and figure above it, so that both have room on a phone."""
    colour = WORSE if bar.bad else BEFORE if bar.reference else AFTER
    filled = "none" if bar.reference else colour
    place = row + BAR_PLACE
    ax.barh([place], [bar.value], height=BAR_HEIGHT, facecolor=filled, edgecolor=colour, linewidth=1.5, alpha=0.85)
    name = shortened(bar.name, ROOM - len(bar.told) - 2)
    for x, told, side, weight in ((0.0, name, "left", "normal"), (1.0, bar.told, "right", "bold")):
        written = ax.text(x, row + NAME_PLACE, told, ha=side, va="center", weight=weight, parse_math=False)
        written.set_transform(ax.get_yaxis_transform())
        written.set_bbox({"facecolor": SURFACE, "edgecolor": "none", "pad": 0.6})  # the grid is not to cross it
        written.set_in_layout(False)


def shortened(name: str, room: int) -> str:
    """Return the name on one line and harmless, in so much room: what has none gives way to an ellipsis."""
    whole = re.sub(r"\s+", " ", visible(name))
    kept, used = [], 0
    for sign in whole:
        used += 2 if unicodedata.east_asian_width(sign) in "WF" else 1
        kept.append(sign)
        if used > room:
            while kept and used > room - 1:
                used -= 2 if unicodedata.east_asian_width(kept.pop()) in "WF" else 1
            return "".join(kept).rstrip() + "…"
    return whole
