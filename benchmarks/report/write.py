"""Writes a report: a folder that is either whole or not there.

::

    report.html   for people: one page, no network
    report.json   everything, strict JSON
    report.md     in short, for a model card
    junit.xml     for CI: green only when the verdict is PASS
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.findings import Findings
from benchmarks.report.junit import junit
from benchmarks.report.markdown import markdown
from benchmarks.report.page import page
from models.errors import InputError, SafeVLMError

__all__ = ["write_report"]


def write_report(findings: Findings, out: Path, *, images: Path | None = None) -> Path:
    """Write the report into the new folder ``out`` and return the path of its page.

    ``images`` is the folder that image names start in: with it, small pictures of the samples that changed are in the
    page, behind a click; without it no picture is.

    Errors: InputError when ``out`` exists or cannot be written (a full disk leaves nothing behind), or when ``images``
    has none of the pictures; MissingExtraError without jinja2 or matplotlib; SafeVLMError for a figure that is no
    number.
    """
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists. Give --out a folder that does not, or remove this one.")
    files = {
        "report.json": _json(findings),  # first: it refuses what is no number
        "report.html": page(findings, images=images).encode("utf-8"),
        "report.md": markdown(findings).encode("utf-8"),
        "junit.xml": junit(findings),
    }
    unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        for name, data in files.items():
            (unfinished / name).write_bytes(data)
        unfinished.rename(out)
    except OSError as error:
        raise InputError(
            f"{out} cannot be written: {error.strerror or error}. Nothing was left behind; make room or give another "
            "--out."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already when all went well
    return out / "report.html"


def _json(findings: Findings) -> bytes:
    """Return strict JSON: no NaN, and no half of a surrogate pair, which many readers refuse."""
    content = findings.to_json()
    bad = next(_not_numbers(content, "findings"), None)
    if bad is not None:
        raise SafeVLMError(
            f"{bad} is no number, so no report was written: please report this with the two run records."
        )
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False, sort_keys=False)
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole.encode("utf-8") + b"\n"


def _not_numbers(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name} ({value})"
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _not_numbers(each, f"{name}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for place, each in enumerate(value):
            yield from _not_numbers(each, f"{name}[{place}]")
