"""Judge images with a guard bundle; needs numpy, Pillow, pydantic and the runtime's own library."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.runner import GuardRunner
from runtimes.guard.select import select_runner
from runtimes.guard.verdict import Finding, Judgement, decide, worst
from runtimes.images.tiling import ViewMode, checked_mode
from runtimes.images.view_option import view_note
from runtimes.images.views import ImageSource, ImageViews, read_views
from safevlm.contract.manifest import Thresholds
from safevlm.errors import BusyError, ImageFileError, SafeVLMError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Guard", "ImageSource"]

_Row: TypeAlias = "npt.NDArray[np.float32] | SafeVLMError"
BATCH = 8

_log = logging.getLogger(__name__)


class Guard:
    """A guard ready to judge images; a context manager around its runner.

    >>> with Guard.open("build/guard") as guard:
    ...     guard.judge(["holiday.jpg"])
    """

    def __init__(
        self,
        runner: GuardRunner,
        classes: Iterable[str],
        thresholds: Thresholds | None = None,
        *,
        batch: int = BATCH,
        view: ViewMode = "tiles",
    ) -> None:
        self.runner = runner
        self.classes = tuple(classes)
        self.thresholds = thresholds
        self.batch = batch
        self.view = checked_mode(view)

    @classmethod
    def open(
        cls,
        source: Path | str | Bundle,
        runtime: str = "auto",
        *,
        precision: str | None = None,
        threads: int | None = None,
        verify: bool = True,
        batch: int = BATCH,
        view: ViewMode = "tiles",
    ) -> Guard:
        """Open a bundle (:func:`open_bundle`), or take an open one; the runtime itself is loaded on entering the guard.

        Thresholds are those fitted on the very file that runs. Runtime ``torch`` runs the checkpoint and no file of
        the bundle, so it has none: it blocks from 0.5 up, as a bundle does before thresholds are fitted. ``view`` says
        how large images are treated: see ``runtimes.images.tiling``.
        """
        bundle = source if isinstance(source, Bundle) else open_bundle(source, verify=verify)
        runner = select_runner(bundle, runtime, precision=precision, threads=threads)
        file = getattr(runner, "file", None)
        thresholds = None if file is None else bundle.manifest.thresholds_of(file.path)
        if file is not None and thresholds is None and bundle.manifest.thresholds:
            _log.warning(
                "%s judges, and the bundle's thresholds were fitted on %s. Without thresholds of its own, or limits of "
                "a policy, it blocks from 0.5 up. Fit them here: python -m calibration.thresholds.",
                file.path,
                ", ".join(entry.file for entry in bundle.manifest.thresholds),
            )
        return cls(runner, bundle.manifest.classes, thresholds, batch=batch, view=view)

    def __enter__(self) -> Self:
        note = view_note(self.view, None if self.thresholds is None else self.thresholds.view)
        if note is not None:
            _log.warning("%s", note)
        self.runner.activate()
        fitted_on = None if self.thresholds is None else self.thresholds.provider
        if fitted_on not in (None, self.runner.provider):
            _log.warning(
                "The thresholds were fitted on %s, and %s judges, which may round otherwise: what they promise was not "
                "measured there. Fit them here: python -m calibration.thresholds.",
                fitted_on,
                self.runner.provider,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.deactivate()

    def judge(self, images: Iterable[ImageSource]) -> list[Judgement]:
        """Return a judgement for each image, in order; see :meth:`stream`."""
        return list(self.stream(images))

    def stream(self, images: Iterable[ImageSource]) -> Iterator[Judgement]:
        """Yield a judgement for each image, in order, a batch at a time.

        A file that readers show in several ways (see ``safevlm.images.views``) is judged in all of them, a large one in
        tiles, too (see ``runtimes.images.tiling``), and the worst verdict counts. An image that cannot be read, or that
        the runner cannot judge in one of these and blocks in none, gets the verdict ``error`` with the reason, and the
        others are judged all the same.
        """
        batch: list[tuple[str, ImageViews | ImageFileError]] = []
        for position, image in enumerate(images):
            name = _name(image, position)
            batch.append((name, self._views(image, name)))
            if len(batch) == self.batch:
                yield from self._judge_batch(batch)
                batch = []
        yield from self._judge_batch(batch)

    def _views(self, image: ImageSource, name: str) -> ImageViews | ImageFileError:
        try:
            return read_views(image, self.runner.preprocessing, name, mode=self.view)
        except ImageFileError as error:
            return error

    def _judge_batch(self, batch: list[tuple[str, ImageViews | ImageFileError]]) -> Iterator[Judgement]:
        pixels = [each for _, views in batch if isinstance(views, ImageViews) for each in views.pixels]
        parts = (pixels[start : start + self.batch] for start in range(0, len(pixels), self.batch))
        rows = iter([row for part in parts for row in self._rows(part)])
        for name, views in batch:
            if isinstance(views, ImageViews):
                yield self._judgement(name, views, [next(rows) for _ in views.pixels])
            else:
                yield Judgement(file=name, verdict="error", error=str(views), view_mode=self.view)

    def _rows(self, pictures: list[npt.NDArray[np.uint8]]) -> list[_Row]:
        """Return a row of probabilities for each; a batch that fails is judged one by one."""
        try:
            return list(self.runner.infer(np.stack(pictures)).probs)
        except SafeVLMError as error:
            if len(pictures) == 1 or isinstance(error, BusyError):
                return [error] * len(pictures)
        return [row for picture in pictures for row in self._rows([picture])]

    def _judgement(self, name: str, views: ImageViews, rows: list[_Row]) -> Judgement:
        found = [self._finding(row) for row in rows]
        findings = {at: each for at, each in enumerate(found) if isinstance(each, Finding)}
        failure = next((each for each in found if isinstance(each, SafeVLMError)), None)
        if failure is not None and not any(each.verdict == "block" for each in findings.values()):
            return Judgement(file=name, verdict="error", error=str(failure), view_mode=self.view)
        at = list(findings)[worst(list(findings.values()), sum(not views.is_hidden(each) for each in findings))]
        finding, row = findings[at], rows[at]
        assert not isinstance(row, SafeVLMError)  # it has a finding
        return Judgement(
            file=name,
            verdict=finding.verdict,
            label=finding.label,
            p_unsafe=finding.p_unsafe,
            probs=dict(zip(self.classes, map(float, row), strict=True)),
            view=views.name(at),
            views=views.names if len(views.names) > 1 else (),
            view_mode=self.view,
        )

    def _finding(self, row: _Row) -> Finding | SafeVLMError:
        if isinstance(row, SafeVLMError):
            return row
        try:
            return decide(row, self.classes, self.thresholds)
        except SafeVLMError as error:  # what a runner gave is no row of probabilities
            return error


def _name(image: ImageSource, position: int) -> str:
    """Return what an image is called in its judgement: its path, or its place among the others."""
    if isinstance(image, (str, Path)):
        return str(image)
    return str(getattr(image, "filename", "")) or f"image {position + 1}"
