"""Images for the steps: those of holisafe-mini's calibration part, written by the first step that asks."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu_proof.finding import Task
from benchmarks.holisafe_mini import write_suite
from calibration.holisafe_mini.suite import build_suite

__all__ = ["PAIRS", "suite_of"]

PAIRS = 128


def suite_of(task: Task) -> tuple[Path, list[Path]]:
    """Return the suite's folder and its images."""
    folder = task.work / "suite"
    if not folder.is_dir():
        write_suite(build_suite("calibration", pairs=PAIRS, questions=0), folder)
    return folder, sorted((folder / "images").rglob("*.png"))
