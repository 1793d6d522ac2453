"""The main job on drawn images, start to end: ``python -m benchmarks.demo`` (``make demo``).

Exports tiny-safegem's guard, judges a dozen test images with the bundle, prints a table with the truth beside
the verdict, and draws a contact sheet that shows the same at a glance. Then it compresses tiny-safellava's language
model to 4 bits, runs both through the built-in suite, and ends with the report that compares them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from PIL import Image, ImageDraw, ImageFont

from benchmarks.comparison.findings import EXIT_CODES
from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import Picture, build_suite
from export.guard.heads import HeadRequest
from export.guard.options import PARITY_IMAGES, print_manifest, source_options
from export.onnx import export_with_progress
from runtimes.guard.judge import Guard
from runtimes.guard.verdict import Judgement
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import SafeVLMError
from safevlm.terminal.child import module_arguments
from safevlm.terminal.commandline import as_started, run

__all__ = ["contact_sheet"]

MODEL = "tiny-safegem"
COMPRESSED = "tiny-safellava"
WRITTEN = ("images", "gptq", "run-16-bit", "run-4-bit", "report")
_COLUMNS, _THUMB, _CAPTION, _GAP = 4, 168, 44, 16
_COLOURS = {"allow": (46, 125, 50), "block": (198, 40, 40), "unsure": (180, 120, 0), "error": (90, 90, 90)}
_NEXT = """
Next, with a real checkpoint (on a machine that reaches the Hugging Face hub):
  python -m export.onnx --model SafeGem-12B --out bundles/safegem-12b
  python -m runtimes.check bundles/safegem-12b photo.jpg
  python -m export.trt --bundle bundles/safegem-12b        # on the device with the GPU
  python -m benchmarks.speed guard --shape SafeGem-12B     # how fast, before you download anything"""


@dataclass(frozen=True)
class Shown:
    """One image of the demo: where it lies, what it truly shows, how it was judged."""

    path: Path
    truth: str
    judgement: Judgement

    @property
    def right(self) -> bool:
        """Whether the verdict is the one that the truth calls for."""
        return (self.judgement.verdict == "allow") == (self.truth == "safe")


def draw_pictures(folder: Path, count: int = 12) -> list[tuple[Path, Picture]]:
    """Save the first ``count`` / 2 safe and unsafe images of the test part as PNG, mixed."""
    pictures = build_suite("test").pictures
    safe = [picture for picture in pictures if picture.scene.label == 0][: count // 2]
    unsafe = [picture for picture in pictures if picture.scene.label][: 3 * count // 2 : 3]
    folder.mkdir(parents=True)
    saved = []
    for number, picture in enumerate(p for pair in zip(safe, unsafe, strict=True) for p in pair):
        path = folder / f"picture-{number + 1:02d}.png"
        draw(picture.scene).save(path)
        saved.append((path, picture))
    return saved


def contact_sheet(shown: Sequence[Shown]) -> Image.Image:
    """Draw the images in a grid, each framed in its verdict's colour, verdict and truth written below."""
    rows = -(-len(shown) // _COLUMNS)
    cell = (_THUMB + _GAP, _THUMB + _CAPTION + _GAP)
    sheet = Image.new("RGB", (_COLUMNS * cell[0] + _GAP, rows * cell[1] + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, item in enumerate(shown):
        x, y = _GAP + number % _COLUMNS * cell[0], _GAP + number // _COLUMNS * cell[1]
        colour = _COLOURS[item.judgement.verdict]
        pen.rectangle((x - 5, y - 5, x + _THUMB + 4, y + _THUMB + 4), fill=colour)
        with Image.open(item.path) as picture:
            sheet.paste(picture.resize((_THUMB, _THUMB)), (x, y))
        p_unsafe = "" if item.judgement.p_unsafe is None else f"  p(unsafe) {item.judgement.p_unsafe:.2f}"
        pen.text((x, y + _THUMB + 8), f"{item.judgement.verdict.upper()}{p_unsafe}", fill=colour, font=font)
        mark = "true" if item.right else "WRONG, true"
        pen.text((x, y + _THUMB + 24), f"{mark}: {item.truth.replace('_', ' ')}", fill=(40, 40, 40), font=font)
    return sheet


def print_table(shown: Sequence[Shown]) -> None:
    """Print file, truth, class found, p(unsafe) and verdict, aligned."""
    header = ("image", "truth", "guard's class", "p(unsafe)", "verdict", "")
    rows = [
        (
            item.path.name,
            item.truth,
            item.judgement.label or "-",
            "-" if item.judgement.p_unsafe is None else f"{item.judgement.p_unsafe:.3f}",
            item.judgement.verdict,
            "" if item.right else "wrong",
        )
        for item in shown
    ]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def compare_compressed(out: Path) -> str:
    """Compress a tiny checkpoint's language model, run both through the built-in suite, write the report.

    Returns the report's verdict. Every command is the one that a user would type.
    """
    gptq, before, after, report = (str(out / name) for name in WRITTEN[1:])
    _show("quantize.gptq", "--model", COMPRESSED, "--bits", "4", "--group-size", "64", "--out", gptq)
    _show("benchmarks.run", "--model", COMPRESSED, "--out", before)
    _show("benchmarks.run", "--model", gptq, "--out", after)
    code = _show("benchmarks.regress", "--baseline", before, "--candidate", after, "--out", report)
    return next(verdict for verdict, exit_code in EXIT_CODES.items() if exit_code == code)


def _show(module: str, *arguments: str) -> int:
    """Run a command of ours in its own process, shown as it is typed; an error ends the demo."""
    click.echo(f"\n$ python -m {shlex.join([module, *arguments])}")
    # One thread: two that wait for each other after every small product take five times the CPU on a busy machine.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([sys.executable, *module_arguments(module, *arguments)], env=environment, check=False)
    if done.returncode not in EXIT_CODES.values():
        raise SafeVLMError(f"python -m {module} failed with exit code {done.returncode}; its output is above.")
    return done.returncode


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True, help="Folder to write to."
)
def main(out: Path) -> int:
    """Judge a dozen drawn images, then compress a tiny model and report whether it stayed safe and useful."""
    for name in WRITTEN:
        shutil.rmtree(out / name, ignore_errors=True)
    images = out / "images"
    drawn = draw_pictures(images)
    checkpoint = open_checkpoint(MODEL)
    manifest = export_with_progress(
        checkpoint, out / "bundle", HeadRequest(), precisions=("fp32",), parity_images=PARITY_IMAGES
    )
    print_manifest(manifest, out / "bundle", source_options(MODEL), as_json=False)
    with Guard.open(out / "bundle") as guard:
        judgements = guard.judge([path for path, _ in drawn])
    shown = [
        Shown(path, checkpoint.classes[picture.scene.label], judgement)
        for (path, picture), judgement in zip(drawn, judgements, strict=True)
    ]
    click.echo()
    print_table(shown)
    contact_sheet(shown).save(out / "contact-sheet.png")
    right = sum(item.right for item in shown)
    click.echo(f"\n{right} of {len(shown)} verdicts are right; see {out / 'contact-sheet.png'}")
    click.echo("Now the longer part, about two minutes: compress a model, run both models on the suite, compare them.")
    verdict = compare_compressed(out)
    click.echo(as_started(_NEXT))
    click.echo(f"\nreport of {COMPRESSED} in 4 bits: {verdict}, {out / 'report' / 'report.html'}")
    return 0 if right == len(shown) and verdict == "PASS" else 1


if __name__ == "__main__":
    run(main)
