"""The page of ``benchmarks.robustness``: recall against strength of corruption, one figure a kind, and all figures.

::

    robustness.html   for people, without script or network
    robustness.json   :class:`Robustness`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report.drawing import AFTER, BEFORE, BETTER, INK, SURFACE, WORSE, Plot, svg
from benchmarks.report.files import strict_json, write_files
from benchmarks.report.template import asset, render
from calibration.labelled.corruptions import KINDS
from safevlm.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Point", "Robustness", "robustness_page", "write_robustness"]

SCHEMA_VERSION = 1
PAGE = "robustness.html"
LOOKS = ((BEFORE, "o", (0, (4, 2))), (AFTER, "s", "-"), (WORSE, "^", (0, (1, 1))), (BETTER, "D", "-."), (INK, "v", "-"))
"""Colour, mark and dashes of each file; no figure relies on colour alone."""
COSTLY = 0.05
"""Share of safe images that are not allowed, above which the page says so."""
APART = 0.12
"""How far the marks of two files stand from each other, in steps."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one file does under one corruption; shares are 0..1, intervals 95 %.

    ``caught`` unsafe images are not allowed (blocked or unsure), ``stopped`` safe ones are not allowed. ``lost`` and
    ``gained`` count unsafe images that the first file catches and this one allows, and the other way round; ``change``
    is of the recall, with Tango's interval.
    """

    file: str
    corruption: str
    strength: float | None
    unsafe: int
    caught: int
    recall: float
    recall_interval: tuple[float, float]
    blocked: int
    safe: int
    stopped: int
    fpr: float
    fpr_interval: tuple[float, float]
    lost: int
    gained: int
    change: float
    change_interval: tuple[float, float]

    @property
    def name(self) -> str:
        """The corruption with its strength, ``jpeg:50``, or ``none``."""
        return self.corruption if self.strength is None else f"{self.corruption}:{self.strength:g}"


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """What was measured, and on what; ``promises`` says by file what its thresholds promise."""

    created: str
    bundle: str
    manifest_sha256: str
    machine: str
    view: str
    runtime: str
    labels_sha256: str
    seen_in_fitting: bool
    """Whether thresholds were fitted on these very images, so that recall is flattered."""
    random_weights: bool
    promises: Mapping[str, str]
    points: tuple[Point, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The files, the one that others are compared with first."""
        return tuple(dict.fromkeys(point.file for point in self.points))


def write_robustness(found: Robustness, out: Path) -> Path:
    """Write the page and ``robustness.json`` into ``out``, and return the page's path.

    Raises InputError for an ``out`` that cannot be written; MissingExtraError without jinja2 or matplotlib.
    """
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise InputError(f"--out {out} is a file. Give a folder, or a new name.")
    content = {"schema_version": SCHEMA_VERSION, **asdict(found)}
    write_files(out, {"robustness.json": strict_json(content), PAGE: robustness_page(found).encode("utf-8")})
    return out / PAGE


def robustness_page(found: Robustness) -> str:
    """Return the page. Raises MissingExtraError without jinja2 or matplotlib."""
    kinds = dict.fromkeys(point.corruption for point in found.points if point.strength is not None)
    plain = [point for point in found.points if point.strength is None]
    context = {
        "found": found,
        "plots": [_plot(kind, found.files, plain, found.points) for kind in kinds],
        "sentences": [*_less_robust(found), *_costly(found)],
        "css": asset("style.css"),
    }
    return render("robustness.html.j2", context)


def _less_robust(found: Robustness) -> list[str]:
    """Say of each file but the first under what it surely catches less, and where nothing of the kind is shown."""
    told = []
    for file in found.files[1:]:
        own = [point for point in found.points if point.file == file and point.strength is not None]
        worse = [f"{point.name} ({100 * point.change:+.1f} points)" for point in own if point.change_interval[1] < 0]
        less = f"catches fewer unsafe images than {found.files[0]} under {', '.join(worse)}"
        none = f"is not shown to be less robust than {found.files[0]} under any of {len(own)} corruptions"
        told.append(f"{file} {less if worse else none}. Each is a 95 % interval by itself.")
    return told


def _costly(found: Robustness) -> list[str]:
    """Say of each file under what it stops many safe images: recall alone would flatter a guard that stops all."""
    told = []
    for file in found.files:
        own = [point for point in found.points if point.file == file and point.fpr > COSTLY]
        if own:
            cases = ", ".join(f"{point.name} ({100 * point.fpr:.1f} %)" for point in own)
            told.append(f"{file} does not allow more than {COSTLY:.0%} of safe images under {cases}.")
    return told


def _plot(kind: str, files: Sequence[str], plain: Sequence[Point], points: Sequence[Point]) -> Plot:
    """Draw recall over the steps of a kind, from the image as it is to the last one given."""
    own = [point for point in points if point.corruption == kind]
    bottom = 10 * int(10 * min(point.recall_interval[0] for point in points))  # the same in every figure
    steps = ["none", *dict.fromkeys(f"{point.strength:g}" for point in own)]
    name = f"recall-{kind}"

    def draw(ax: Axes) -> None:
        for place, file in enumerate(files):
            colour, mark, dashes = LOOKS[place % len(LOOKS)]
            shown = [point for point in (*plain, *own) if point.file == file]
            x = [at + APART * (place - (len(files) - 1) / 2) for at in range(len(shown))]
            y = [100 * point.recall for point in shown]
            ends = [[100 * abs(point.recall_interval[side] - point.recall) for point in shown] for side in (0, 1)]
            fill = SURFACE if place == 0 else colour
            ax.errorbar(
                x,
                y,
                yerr=ends,
                color=colour,
                marker=mark,
                mfc=fill,
                ms=5,
                lw=1.4,
                ls=dashes,
                elinewidth=1.4,
                label=file,
            )
        ax.set_xticks(range(len(steps)), steps)
        ax.set(
            ylim=(bottom - (100 - bottom) / 33, 100 + (100 - bottom) / 33),
            xlabel=KINDS[kind].meaning,
            ylabel="unsafe images caught, %",
        )
        ax.grid(axis="y")
        ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=1, borderaxespad=0.1)

    told = "; ".join(f"{point.file} {point.name}: {100 * point.recall:.1f} %" for point in (*plain, *own))
    return Plot(
        name=name,
        title=kind,
        caption=f"{KINDS[kind].meaning}. Bars are 95 % intervals (Wilson).",
        told=f"Recall. {told}",
        svg=svg(name, draw, height=3.2 + 0.2 * len(files)),
    )
