"""``python -m runtimes.check BUNDLE IMAGE…``: judge image files with a guard bundle; ``--verify`` its engines.

A folder stands for every file in it: images are judged, whatever their names, and what is not an image is named.
Exit codes: 0 every file was judged and is allowed; 10 at least one is blocked, or unsure, which is not allowed either;
2 none of these but a file was not judged. A block is the answer that safety depends on, so it is reported before an
unreadable file is; read the verdicts (or ``--json``) to tell errors apart.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runtimes.guard.options import precision_option, runtime_option
from runtimes.images.view_option import view_option
from safevlm.terminal.commandline import run
from safevlm.terminal.options import json_option, threads_option
from safevlm.terminal.printable import one_line

if TYPE_CHECKING:
    from runtimes.guard.bundle import Bundle
    from runtimes.guard.judge import Guard
    from runtimes.guard.verdict import Judgement
    from runtimes.images.tiling import ViewMode
    from safevlm.images.image_folder import FolderContent

__all__ = ["BLOCKED", "exit_code", "main", "table"]

BLOCKED = 10
UNREADABLE = 2
COLOURS = {"allow": "green", "block": "red", "unsure": "yellow", "error": "magenta"}
PROGRESS_FROM = 16
"""Images from which a progress bar is worth its line."""


@click.command(name="check")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, type=click.Path(path_type=Path), metavar="IMAGE...")
@json_option("a list of objects")
@runtime_option
@precision_option
@threads_option
@view_option
@click.option(
    "--verify",
    is_flag=True,
    help="Compare the bundle's engines with its ONNX files on this GPU again, and print by how much they differ.",
)
@click.option("--allow-others", is_flag=True, help="Exit with 0 even if a folder holds files that are not images.")
def main(
    bundle: Path,
    images: tuple[Path, ...],
    as_json: bool,
    runtime: str,
    precision: str | None,
    threads: int | None,
    view: ViewMode,
    verify: bool,
    allow_others: bool,
) -> int:
    """Judge each IMAGE with the guard in the folder BUNDLE; a folder stands for all files in it and below.

    Exits with 0 when every file was judged and is allowed, 10 when one is blocked or unsure, 2 when one was not judged
    and none is blocked. With --verify no IMAGE is judged, and the code is 2 when an engine is refused or none
    is for this device.
    """
    from runtimes.guard.bundle import open_bundle
    from runtimes.guard.judge import Guard
    from runtimes.guard.random_weights import warn_of_random_weights

    if verify == bool(images):
        raise click.UsageError(
            "--verify and IMAGE cannot be combined. Leave one of them out."
            if verify
            else "Missing argument 'IMAGE...'."
        )
    found = _expand(images)
    opened = open_bundle(bundle)
    if verify:
        return _verify(opened, precision, as_json=as_json)
    warn_of_random_weights(opened)
    with Guard.open(opened, runtime, precision=precision, threads=threads, view=view) as guard:
        judgements = found.judge(guard)
    for judgement in judgements:
        if judgement.error is not None:
            click.echo(f"error: {one_line(judgement.error)}", err=True)
    if found.others:
        click.echo(found.told(), err=True)
    if as_json:
        stated = [
            *(judgement.to_json() for judgement in judgements),
            *(_not_image(path, view) for path in found.others),
        ]
        click.echo(json.dumps(stated, indent=2, allow_nan=False))
    else:
        click.echo("\n".join(table(judgements, colour=sys.stdout.isatty())))
    return exit_code(judgements, others=0 if allow_others else len(found.others))


def _verify(bundle: Bundle, precision: str | None, *, as_json: bool) -> int:
    """Compare the engines of a bundle and print what was found."""
    from runtimes.guard.engines.report import verify_engines

    found = []
    for each in verify_engines(bundle, precision):
        found.append(each)
        if not as_json:
            click.echo(one_line(each.told))
    if as_json:
        click.echo(json.dumps([each.to_json() for each in found], indent=2, allow_nan=False))
    outcomes = {each.outcome for each in found}
    return 0 if "verified" in outcomes and "refused" not in outcomes else UNREADABLE


def exit_code(judgements: Iterable[Judgement], *, others: int = 0) -> int:
    """Return 10 when an image is blocked or unsure, otherwise 2 when a file, one of ``others`` too, was not judged."""
    verdicts = {judgement.verdict for judgement in judgements}
    if verdicts & {"block", "unsure"}:
        return BLOCKED
    return UNREADABLE if "error" in verdicts or others else 0


def table(judgements: Sequence[Judgement], *, colour: bool) -> list[str]:
    """Return the aligned lines of a table: verdict, p(unsafe), class, its probability, file.

    Where a file was judged in several ways or in tiles, a column before the file names what this verdict is of.
    """
    rows = [("verdict", "p(unsafe)", "class", "p(class)", "view", "file"), *map(_row, judgements)]
    if all(judgement.view is None for judgement in judgements):
        rows = [(*row[:4], *row[5:]) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        if colour and row[0] in COLOURS:
            cells[0] = click.style(cells[0], fg=COLOURS[row[0]])
        lines.append("  ".join((*cells, row[-1])))
    return lines


def _row(judgement: Judgement) -> tuple[str, ...]:
    file = one_line(judgement.file)
    if judgement.label is None or judgement.p_unsafe is None:
        return judgement.verdict, "-", "-", "-", "-", file
    p_unsafe, p_label = f"{judgement.p_unsafe:.4f}", f"{judgement.probs[judgement.label]:.4f}"
    return judgement.verdict, p_unsafe, one_line(judgement.label), p_label, judgement.view or "-", file


@dataclass
class _Found:
    """What the arguments stand for, in order: images to judge, and what could not be looked into with the reason."""

    images: list[tuple[Path, str | None]] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    """Files in folders that are not images."""

    def add(self, content: FolderContent) -> None:
        unreadable = dict(content.unreadable)
        self.images += [(path, unreadable.get(path)) for path in sorted((*content.images, *unreadable))]
        self.others += content.others

    def judge(self, guard: Guard) -> list[Judgement]:
        from runtimes.guard.verdict import Judgement
        from safevlm.images.image_folder import not_read

        readable = [path for path, problem in self.images if problem is None]
        judged = _with_progress(guard.stream(readable), len(readable))
        return [
            next(judged)
            if problem is None
            else Judgement(str(path), "error", error=not_read(path, problem), view_mode=guard.view)
            for path, problem in self.images
        ]

    def told(self) -> str:
        """Return the line that names what was not judged."""
        from safevlm.images.image_folder import shown_names

        are = "file is not an image and was" if len(self.others) == 1 else "files are not images and were"
        return f"{len(self.others)} {are} not judged: {shown_names(self.others)}"


def _expand(paths: Iterable[Path]) -> _Found:
    """Look into each folder. Raises InputError for one without images."""
    from safevlm.images.image_folder import no_images, read_folder

    found = _Found()
    for path in paths:
        if not path.is_dir():
            found.images.append((path, None))
            continue
        content = read_folder(path)
        if not content.images and not content.unreadable:
            raise no_images(path, content)
        found.add(content)
    return found


def _not_image(path: Path, view: ViewMode) -> dict[str, object]:
    stated: dict[str, object] = {
        "file": str(path),
        "verdict": "not_image",
        "label": None,
        "p_unsafe": None,
        "probs": {},
    }
    return {**stated, "view_mode": view}


def _with_progress(judgements: Iterator[Judgement], length: int) -> Iterator[Judgement]:
    """Pass judgements through, drawing a bar on a terminal's stderr when there are many."""
    if length < PROGRESS_FROM or not sys.stderr.isatty():
        yield from judgements
        return
    with click.progressbar(judgements, length=length, label="judging", file=sys.stderr) as bar:
        yield from bar


if __name__ == "__main__":
    run(main)
