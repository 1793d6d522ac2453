"""Records of speed, memory and size as one HTML page without script or network, and as one JSON file beside it.

::

    speed.html   for people
    speed.json   all records as they were read, in one list
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.files import strict_json, write_files
from benchmarks.report.template import asset, render
from benchmarks.report.text import moment
from benchmarks.speed.page.parts import machine_of
from benchmarks.speed.page.records import Loaded, read_records
from benchmarks.speed.page.sections import section_of
from safevlm.errors import InputError
from safevlm.machine import now

__all__ = ["speed_page", "write_speed_page"]

SCHEMA_VERSION = 1


def write_speed_page(paths: Sequence[Path], out: Path) -> Path:
    """Write ``speed.html`` and ``speed.json`` of the records in ``paths`` into ``out``, and return the page's path.

    The folder is made; where it is there, the two files are replaced.

    Errors: InputError for a file that is no record, for no file at all, and for an ``out`` that is a file or cannot be
    written; MissingExtraError without jinja2 or matplotlib.
    """
    if not paths:
        raise InputError("no record was given. Give files that benchmarks.speed or benchmarks.true_shapes wrote.")
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise InputError(f"--out {out} is a file. Give a folder, or a name that is not there yet.")
    records = read_records(paths)
    created = now()
    listed = {"schema_version": SCHEMA_VERSION, "created": created, "records": [each.content for each in records]}
    files = {"speed.json": strict_json(listed), "speed.html": speed_page(records, created).encode("utf-8")}
    write_files(out, files)
    return out / "speed.html"


def speed_page(records: Sequence[Loaded], created: str) -> str:
    """Return the page of at least one record; ``created`` is its time. Errors: MissingExtraError."""
    sections = [section_of(each.record, f"record-{place}") for place, each in enumerate(records, 1)]
    return render("speed.html.j2", {"sections": sections, "css": asset("style.css"), **_summary(records, created)})


def _summary(records: Sequence[Loaded], created: str) -> dict[str, Any]:
    """Return what stands on top: how many records, on which machines, from when to when."""
    times = sorted({moment(each.record.created) for each in records})
    return {
        "created": created,
        "machines": list(dict.fromkeys(machine_of(each.record) for each in records)),
        "times": times[:1] + times[1:][-1:],
    }
