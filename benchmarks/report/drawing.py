"""How figures are drawn: by matplotlib, as SVG that lives inside a page.

Colours are drawn as the page's CSS variables, so that a figure follows light and dark; type is the page's own. The same
drawing gives the same bytes.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safevlm.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AFTER", "BEFORE", "BETTER", "GRID", "INK", "MUTED", "SURFACE", "WIDTH", "WORSE", "Plot", "svg"]

INK, MUTED, GRID, BEFORE, AFTER, WORSE, BETTER, SURFACE = (f"#{n:02x}{n + 1:02x}{n + 2:02x}" for n in range(1, 9))
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "rule",
    BEFORE: "before",
    AFTER: "after",
    WORSE: "worse",
    BETTER: "better",
    SURFACE: "surface",
}
"""Colours that no plot would choose, and the page's variable that each stands for."""

WIDTH = 4.3
"""Inches of 72 units: with type of 10.5 units legible on a phone, where a figure is about as wide."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure: ``svg`` is markup that can be trusted, ``told`` describes it in words."""

    name: str
    title: str
    caption: str
    told: str
    svg: str


def svg(name: str, draw: Callable[[Axes], None], *, height: float, title: str | None = None) -> str:
    """Return a figure as an ``svg`` element for the page: no fonts, colours, ids or dates of its own.

    ``height`` is in inches; ``title`` becomes the element's own. The page gives its title in ``{name}-title`` and its
    description in ``{name}-told``. Raises MissingExtraError without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "the report") from error
    with rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Names in other scripts: matplotlib measures them roughly, the reader's browser has the letters.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        stream = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=nothing, transparent=True)
    return _housed(name, stream.getvalue(), title)


def _housed(name: str, drawing: str, title: str | None) -> str:
    """Make matplotlib's file a part of the page."""
    size = re.search(r'viewBox="([^"]+)"', drawing)
    assert size is not None
    body = drawing[drawing.index("<defs>") :]
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)  # it is about the page's every element
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    body = body.replace("; font-family: 'DejaVu Sans'", "")
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    named = "" if title is None else f"<title>{html.escape(title)}</title>"
    tag = f'<svg viewBox="{size[1]}" role="img" aria-labelledby="{name}-title" aria-describedby="{name}-told">'
    return f"{tag}{named}{body}"
