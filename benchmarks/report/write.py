"""Writes a report: a folder that is either whole or not there.

::

    report.html   for people: one page, no network
    report.json   everything, strict JSON
    report.md     in short, for a model card
    junit.xml     for CI: green only when the verdict is PASS
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.comparison.findings import Findings
from benchmarks.report.files import not_numbers, strict_json, write_files
from benchmarks.report.junit import junit
from benchmarks.report.markdown import markdown
from benchmarks.report.page import page
from safevlm.errors import InputError, SafeVLMError

__all__ = ["write_report"]


def write_report(findings: Findings, out: Path, *, images: Path | None = None) -> Path:
    """Write the report into the new folder ``out`` and return the path of its page.

    ``images`` is the folder that image names start in: with it, small images of the samples that changed are in the
    page, blurred until asked for; without it no image is.

    Raises InputError when ``out`` exists or cannot be written (a full disk leaves nothing behind), or when ``images``
    has none of the images; MissingExtraError without jinja2, matplotlib or PyYAML; SafeVLMError for a figure that is no
    number.
    """
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} already exists. Give --out a new folder, or remove this one.")
    files = {
        "report.json": _json(findings),  # first: it refuses what is no number
        "report.html": page(findings, images=images).encode("utf-8"),
        "report.md": markdown(findings).encode("utf-8"),
        "junit.xml": junit(findings),
    }
    write_files(out, files)
    return out / "report.html"


def _json(findings: Findings) -> bytes:
    content = findings.to_json()
    bad = next(not_numbers(content, "findings"), None)
    if bad is not None:
        raise SafeVLMError(
            f"{bad} is not a number, so no report was written. Please report this with the two run records."
        )
    return strict_json(content)
