"""The report's figures. No figure relies on colour alone: before is hollow or dashed, after filled or solid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.comparison.findings import Findings, GuardCurves, Line
from benchmarks.report.drawing import AFTER, BEFORE, BETTER, GRID, MUTED, SURFACE, WORSE, Plot, svg
from benchmarks.report.text import change_of, title_of, value_of, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_plots"]


def draw_plots(findings: Findings) -> tuple[Plot, ...]:
    """Return the figures that the findings have data for. Raises MissingExtraError without matplotlib."""
    shown = _deciding(findings)
    plots = []
    safety = [line for line in shown if line.group == "safety"]
    if safety:
        plots.append(_before_after(safety))
    flipped = [line for line in shown if line.worse is not None and line.better is not None]
    if any(line.worse or line.better for line in flipped):
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
        caption="Left: from bad to good. Right: from good to bad. Equal bars cancel out in the rate, but not for the "
        "people who ask.",
        told="; ".join(
            f"{title_of(line)}: {lost:,} worse, {gained:,} better"
            for line, lost, gained in zip(lines, worse, better, strict=True)
        ),
        svg=svg("flips", draw, height=0.62 + 0.36 * len(lines)),
    )


def _roc(before: GuardCurves, after: GuardCurves) -> Plot:
    def draw(ax: Axes) -> None:
        ax.plot([0, 100], [0, 100], color=GRID, lw=1)
        for curves, colour, dashes, name in _sides(before, after):
            x, y = ([100 * value for value in values] for values in (curves.roc.x, curves.roc.y))
            ax.plot(x, y, color=colour, ls=dashes, lw=2, label=name)
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
        for curves, colour, dashes, name in _sides(before, after):
            x, y = ([100 * value for value in values] for values in (curves.reliability.x, curves.reliability.y))
            most = max(curves.bins, default=1) or 1
            ax.plot(x, y, color=colour, ls=dashes, lw=1.4, label=name)
            sizes = [14 + 70 * number / most for number in curves.bins]
            fill = SURFACE if colour == BEFORE else colour
            ax.scatter(x, y, s=sizes, facecolor=fill, edgecolor=colour, linewidth=1.6, zorder=3)
        _square(ax, "guard: p(unsafe), %", "truth: unsafe images, %")

    return Plot(
        name="reliability",
        title="Guard: are its probabilities calibrated?",
        caption="On the diagonal they are calibrated. Larger dots stand for more images.",
        told=f"Reliability. {_bins_told('before', before)}; {_bins_told('after', after)}",
        svg=svg("reliability", draw, height=3.7),
    )


def _sides(before: GuardCurves, after: GuardCurves) -> tuple[tuple[GuardCurves, str, str, str], ...]:
    return (before, BEFORE, (0, (4, 2)), "before"), (after, AFTER, "-", "after")  # type: ignore[return-value]


def _roc_told(name: str, curves: GuardCurves) -> str:
    """Say how much is caught where 1, 5 and 10 % of the safe images are blocked."""
    points = list(zip(curves.roc.x, curves.roc.y, strict=True))
    caught = [max((y for x, y in points if x <= limit), default=0.0) for limit in (0.01, 0.05, 0.1)]
    return f"{name}: {', '.join(f'{100 * y:.1f} %' for y in caught)} caught at 1, 5 and 10 % of safe images blocked"


def _bins_told(name: str, curves: GuardCurves) -> str:
    bins = zip(curves.reliability.x, curves.reliability.y, curves.bins, strict=True)
    return f"{name}: " + ", ".join(f"stated {100 * x:.0f} %, true {100 * y:.0f} % of {n:,}" for x, y, n in bins)


def _short(line: Line) -> str:
    title = " ".join(title_of(line).partition(", p(unsafe)")[0].split())
    return (title if len(title) <= 18 else f"{title[:17]}…").replace("$", r"\$")  # no mathematics in names


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
