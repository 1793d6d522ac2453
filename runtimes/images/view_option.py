"""``--view`` of every command that judges images: how large ones are treated (see ``runtimes.images.tiling``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from safevlm.contract.manifest_fields import ViewMode

__all__ = ["view_note", "view_option"]

view_option = click.option(
    "--view",
    type=click.Choice(["tiles", "judged", "whole"]),
    default="tiles",
    show_default=True,
    help="How large images are treated: judged in tiles as well, shown at the judged size, or judged and shown whole.",
)


def view_note(view: ViewMode, fitted_for: ViewMode | None) -> str | None:
    """Return what is to be said of a view and of thresholds fitted for another, None where it is nothing.

    The worst of an image and its tiles is never below the whole alone, and ``judged`` is the whole as ``whole`` has it.
    """
    notes = []
    if view == "whole":
        notes.append(
            "view whole: a large image is shown in more detail than the guard sees, so small things in it are "
            "not judged."
        )
    if fitted_for is not None and (fitted_for == "tiles") != (view == "tiles"):
        if view == "tiles":
            notes.append(
                f"The thresholds were fitted for view {fitted_for}: with tiles they miss no more than they promise, "
                "but may block more. Fit them: python -m calibration.thresholds --view tiles."
            )
        else:
            notes.append(
                f"The thresholds were fitted for view tiles: with view {view} they may miss more than they promise. "
                f"Fit them: python -m calibration.thresholds --view {view}."
            )
    return " ".join(notes) or None
