"""Horizontal bars for the speed page: name and figure above each bar, so that both have room on a phone."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.report.drawing import AFTER, BEFORE, INK, SURFACE, WORSE, Plot, svg
from benchmarks.report.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Bar", "bar_plot", "shortened"]

ROOM = 50
"""Letters of the figure's type that fit beside each other; a wide one counts twice."""
ROW_INCHES, FRAME_INCHES = 0.44, 0.5
NAME_PLACE, BAR_PLACE, BAR_HEIGHT = -0.2, 0.2, 0.32


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: ``told`` is its value in words with the unit, ``spread`` the lowest and highest of its measurements.

    ``detail`` follows the name and is never cut. A ``reference`` is hollow: what the others are compared with.
    ``limit`` is drawn as a dashed mark; ``bad`` says that it is passed or something failed.
    """

    name: str
    value: float
    told: str
    detail: str = ""
    spread: tuple[float, float] | None = None
    limit: float | None = None
    reference: bool = False
    bad: bool = False


def bar_plot(name: str, title: str, caption: str, bars: Sequence[Bar], *, unit: str) -> Plot:
    """Return the figure of at least one bar; ``unit`` names the axis.

    ``name`` is unique on the page. Errors: MissingExtraError without matplotlib.
    """
    title = visible(title)
    ends = [end for bar in bars for end in (bar.value, *(bar.spread or ()), bar.limit or 0.0)]
    most = max(ends) or 1.0

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

    return Plot(
        name=name,
        title=title,
        caption=visible(caption),
        told="; ".join(_in_words(bar) for bar in bars),
        svg=svg(name, draw, height=FRAME_INCHES + ROW_INCHES * len(bars), title=title),
    )


def _draw_bar(ax: Axes, row: int, bar: Bar) -> None:
    place = row + BAR_PLACE
    colour = WORSE if bar.bad else BEFORE if bar.reference else AFTER
    filled = "none" if bar.reference else colour
    ax.barh([place], [bar.value], height=BAR_HEIGHT, facecolor=filled, edgecolor=colour, linewidth=1.5, alpha=0.85)
    if bar.spread is not None and bar.spread[0] < bar.spread[1]:
        ax.plot(bar.spread, [place] * 2, color=INK, lw=1.3, marker="|", ms=7, mew=1.3, solid_capstyle="butt")
    if bar.limit is not None:
        half = BAR_HEIGHT / 2 + 0.06
        ax.plot([bar.limit] * 2, [place - half, place + half], color=INK, lw=1.8, ls=(0, (3, 1.5)))
    detail = shortened(bar.detail, ROOM)
    name = shortened(bar.name, ROOM - len(bar.told) - len(detail) - 2) + detail
    for x, told, side, weight in ((0.0, name, "left", "normal"), (1.0, bar.told, "right", "bold")):
        written = ax.text(x, row + NAME_PLACE, told, ha=side, va="center", weight=weight, parse_math=False)
        written.set_transform(ax.get_yaxis_transform())
        written.set_bbox({"facecolor": SURFACE, "edgecolor": "none", "pad": 0.6})  # the grid is not to cross it
        written.set_in_layout(False)


def _in_words(bar: Bar) -> str:
    spread = "" if bar.spread is None else f", from {bar.spread[0]:.4g} to {bar.spread[1]:.4g}"
    return f"{visible(bar.name + bar.detail)}: {bar.told}{spread}"


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
