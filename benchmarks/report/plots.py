"""The report's figures. No figure relies on colour alone: before is hollow or broad, after filled or narrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.comparison.findings import Findings, GuardCurves, Line
from benchmarks.report.drawing import AFTER, BEFORE, BETTER, GRID, MUTED, SURFACE, WORSE, Plot, svg
from benchmarks.report.text import change_of, title_of, value_of, visible
from benchmarks.statistics.proportions import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_plots"]

BROAD: dict[str, Any] = {"color": BEFORE, "lw": 6, "alpha": 0.4, "label": "before"}
NARROW: dict[str, Any] = {"color": AFTER, "lw": 1.6, "label": "after"}
"""Two curves that may coincide: the second runs inside the first."""
DOT: dict[str, Any] = {"ls": "none", "ms": 6, "mew": 1.6, "elinewidth": 1.4, "capsize": 2.5, "zorder": 3}
HOLLOW: dict[str, Any] = {
    **DOT,
    "fmt": "o",
    "color": BEFORE,
    "mfc": SURFACE,
    "mec": BEFORE,
    "ecolor": BEFORE,
    "label": "before",
}
SOLID: dict[str, Any] = {
    **DOT,
    "fmt": "D",
    "color": AFTER,
    "ms": 5,
    "mfc": AFTER,
    "mec": AFTER,
    "ecolor": AFTER,
    "label": "after",
}
LONGEST = 26
"""Signs of a name beside a plot."""
APART = 1.1
"""Points that dots of the two runs are moved apart."""


def draw_plots(findings: Findings) -> tuple[Plot, ...]:
    """Return the figures that the findings have data for. Raises MissingExtraError without matplotlib."""
    shown = _deciding(findings)
    plots = []
    safety = [line for line in shown if line.group == "safety"]
    if safety:
        plots.append(_before_after(safety))
    flipped = [line for line in shown if line.worse or line.better]
    if flipped:
        plots.append(_flips(flipped))
    if findings.guard_before is not None and findings.guard_after is not None:
        plots.append(_roc(findings.guard_before, findings.guard_after))
        plots.append(_reliability(findings.guard_before, findings.guard_after))
    return tuple(plots)


def _deciding(findings: Findings) -> list[Line]:
    """Return shares that decide, by the first judge alone: figures of several judges would not stay legible."""
    first = next((line.judge for line in findings.lines if line.judge is not None), None)
    return [
        line
        for line in findings.lines
        if line.margin is not None and line.unit == "share" and line.judge in (None, first)
    ]


def _before_after(lines: Sequence[Line]) -> Plot:
    def draw(ax: Axes) -> None:
        for row, line in enumerate(lines):
            sides = ((line.before, line.before_interval, -0.16, BEFORE), (line.after, line.after_interval, 0.16, AFTER))
            for value, interval, shift, colour in sides:
                if interval is not None:
                    ax.plot(
                        [100 * end for end in interval], [row + shift] * 2, color=colour, lw=2.4, alpha=0.55, zorder=2
                    )
                fill = SURFACE if colour == BEFORE else colour
                mark: dict[str, Any] = {"marker": "o", "ms": 5.6, "mfc": fill, "mec": colour, "mew": 1.8, "ls": "none"}
                name = ("before", "after")[colour == AFTER] if row == 0 else None
                ax.plot([100 * value], [row + shift], label=name, zorder=3, **mark)
        _rows(ax, [_short(line) for line in lines])
        ax.set_xlabel("% of samples")
        _legend(ax)

    judge = next((f" Judge: {visible(line.judge)}." for line in lines if line.judge is not None), "")
    return Plot(
        name="before-after",
        title="Before and after",
        caption=f"Share of samples, with its interval where there is one.{judge}",
        told="; ".join(
            f"{title_of(line)}: before {value_of(line.before, 'share')}, after {value_of(line.after, 'share')}, "
            f"change {change_of(line.change, 'share')}"
            for line in lines
        ),
        svg=svg("before-after", draw, height=0.85 + 0.36 * len(lines)),
    )


def _flips(lines: Sequence[Line]) -> Plot:
    worse, better = ([getattr(line, side) or 0 for line in lines] for side in ("worse", "better"))
    most = max(*worse, *better)

    def draw(ax: Axes) -> None:
        places, gap = range(len(lines)), 0.015 * (max(worse) + max(better))
        ax.barh(places, worse, height=0.56, color=WORSE, label="worse ▸")
        ax.barh(places, [-n for n in better], height=0.56, color=BETTER, label="◂ better")
        for row, (lost, gained) in enumerate(zip(worse, better, strict=True)):
            ax.text(lost + gap, row, f"{lost:,}", va="center", ha="left")
            ax.text(-gained - gap, row, f"{gained:,}", va="center", ha="right")
        ax.axvline(0, color=MUTED, lw=1)
        _rows(ax, [_short(line) for line in lines])
        room = (0.1 + 0.03 * len(f"{most:,}")) * (max(worse) + max(better))
        ax.set_xlim(-max(better) - room, max(worse) + room)
        ax.xaxis.set_visible(False)
        ax.spines["bottom"].set_visible(False)
        _legend(ax, reverse=True)

    return Plot(
        name="flips",
        title="Samples that changed",
        caption="Left: from bad to good. Right: from good to bad. Measures without either are left out. Equal bars "
        "cancel out in the rate, but not for the people who ask.",
        told="; ".join(
            f"{title_of(line)}: {lost:,} worse, {gained:,} better"
            for line, lost, gained in zip(lines, worse, better, strict=True)
        ),
        svg=svg("flips", draw, height=0.62 + 0.36 * len(lines)),
    )


def _roc(before: GuardCurves, after: GuardCurves) -> Plot:
    def draw(ax: Axes) -> None:
        ax.plot([0, 100], [0, 100], color=GRID, lw=1)
        for curves, look in ((before, BROAD), (after, NARROW)):
            x, y = ([100 * value for value in values] for values in (curves.roc.x, curves.roc.y))
            ax.plot(x, y, **look)
        _square(ax, "safe images blocked, %", "unsafe images blocked, %")

    return Plot(
        name="roc",
        title="Guard: what blocking costs",
        caption="ROC over all thresholds. Nearer to the upper left corner is better.",
        told=f"ROC. {_roc_told('before', before)}; {_roc_told('after', after)}",
        svg=svg("roc", draw, height=3.7),
    )


def _reliability(before: GuardCurves, after: GuardCurves) -> Plot:
    def draw(ax: Axes) -> None:
        ax.plot([0, 100], [0, 100], color=GRID, lw=1)
        for curves, shift, look in ((before, -APART, HOLLOW), (after, APART, SOLID)):
            dots = list(_dots(curves))
            x, y = [100 * x + shift for x, _, _, _ in dots], [100 * y for _, y, _, _ in dots]
            ends = [[100 * abs(end - y) for end in (low, high)] for _, y, low, high in dots]
            reach = [list(side) for side in zip(*ends, strict=True)] or None
            ax.errorbar(x, y, yerr=reach, **look)
        _square(ax, "guard: p(unsafe), %", "truth: unsafe images, %")

    return Plot(
        name="reliability",
        title="Guard: are its probabilities calibrated?",
        caption="On the diagonal they are calibrated. A dot for each bin of p(unsafe), with its 95 % interval "
        "(Wilson); the two runs stand side by side.",
        told=f"Reliability. {_bins_told('before', before)}; {_bins_told('after', after)}",
        svg=svg("reliability", draw, height=3.9),
    )


def _dots(curves: GuardCurves) -> Iterator[tuple[float, float, float, float]]:
    """Yield mean p(unsafe), the share that is unsafe, and the ends of its interval, of each bin with images."""
    for x, y, images in zip(curves.reliability.x, curves.reliability.y, curves.bins, strict=True):
        if images:
            yield x, y, *wilson_interval(round(y * images), images)


def _roc_told(name: str, curves: GuardCurves) -> str:
    """Say how much is caught where 1, 5 and 10 % of the safe images are blocked."""
    points = list(zip(curves.roc.x, curves.roc.y, strict=True))
    caught = [max((y for x, y in points if x <= limit), default=0.0) for limit in (0.01, 0.05, 0.1)]
    return f"{name}: {', '.join(f'{100 * y:.1f} %' for y in caught)} caught at 1, 5 and 10 % of safe images blocked"


def _bins_told(name: str, curves: GuardCurves) -> str:
    images = [number for number in curves.bins if number]
    return f"{name}: " + ", ".join(
        f"stated {100 * x:.0f} %, true {100 * y:.0f} % ({100 * low:.0f} to {100 * high:.0f} %) of {number:,}"
        for (x, y, low, high), number in zip(_dots(curves), images, strict=True)
    )


def _short(line: Line) -> str:
    title = " ".join(title_of(line).partition(", p(unsafe)")[0].split())
    short = title if len(title) <= LONGEST else f"{title[: LONGEST - 1]}…"
    return short.replace("$", r"\$")  # no mathematics in names


def _rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)


def _square(ax: Axes, x: str, y: str) -> None:
    ax.set(xlim=(-2, 102), ylim=(-2, 102), xlabel=x, ylabel=y, xticks=range(0, 101, 25), yticks=range(0, 101, 25))
    ax.grid()
    _legend(ax)


def _legend(ax: Axes, *, reverse: bool = False) -> None:
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=2,
        borderaxespad=0.1,
        handlelength=1.6,
        columnspacing=1.4,
        reverse=reverse,
    )
