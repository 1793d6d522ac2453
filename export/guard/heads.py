"""Which head a guard on the projector gets: the checkpoint's own, one from a file, or one distilled on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safevlm.checkpoint.hub import TINY_CHECKPOINTS
from safevlm.errors import GuardHeadError, InputError

if TYPE_CHECKING:
    from safevlm.checkpoint.checkpoint import Checkpoint
    from safevlm.network.distilled_head import DistilledHead

__all__ = ["HeadRequest", "find_head"]

HUB = "hub:"


@dataclass(frozen=True, kw_only=True)
class HeadRequest:
    """What the command line says about the head.

    ``guard`` is a file that ``calibration.distill`` wrote; ``images`` a folder or ``hub:NAME`` to distil from,
    with ``labels`` for its report, refused below ``min_agreement``; ``grid`` (height, width) in pixels.
    """

    guard: Path | None = None
    images: str | None = None
    labels: Path | None = None
    min_agreement: float = 0.97
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.guard is not None and self.labels is not None:
            raise InputError(
                "--labels and --guard cannot be combined, because --guard gives a finished head. Leave one of them out."
            )
        if self.guard is not None and self.images is not None and self.folder is None:
            raise InputError(
                f"--images {self.images} and --guard cannot be combined, because --guard gives a finished head. Leave "
                "one of them out."
            )

    @property
    def folder(self) -> Path | None:
        """The folder of pictures, if a folder was given; the parity check uses it, too."""
        return None if self.images is None or self.images.startswith(HUB) else Path(self.images)


def find_head(
    checkpoint: Checkpoint, request: HeadRequest, *, report: Callable[[str], None] = lambda _: None
) -> DistilledHead | None:
    """Return the distilled head to export with; ``None`` where the checkpoint's own head is exported.

    That is so for a guard that taps the projector, and for one behind the language model when neither a head nor
    pictures are given. Tiny checkpoints bring their own pictures.

    Raises GuardHeadError for a head where the checkpoint's own is exact, or of another checkpoint; those of
    :func:`calibration.distill.distill`.
    """
    if checkpoint.tap.source == "projector":
        if request.guard is not None:
            raise GuardHeadError(
                f"{checkpoint.name}: its guard taps the projector ({checkpoint.tap.learned}) and is split off exactly, "
                "so no head is needed. Leave --guard out."
            )
        if request.labels is not None or (request.images is not None and request.folder is None):
            unused = "--labels" if request.labels is not None else f"--images {request.images}"
            raise InputError(
                f"{checkpoint.name}: its guard is split off exactly and nothing is distilled, so {unused} has no "
                "effect. Leave it out; --images FOLDER only chooses the images of the parity check."
            )
        return None
    if request.guard is not None:
        from safevlm.network.distilled_head import DistilledHead

        return DistilledHead.read(request.guard)
    if request.images is None and checkpoint.name not in TINY_CHECKPOINTS:
        return None
    from calibration.distill import DistillOptions, distill, pictures_for

    options = DistillOptions(grid=request.grid, min_agreement=request.min_agreement, labels=request.labels)
    return distill(checkpoint, pictures_for(request.images, checkpoint), options, report=report)
