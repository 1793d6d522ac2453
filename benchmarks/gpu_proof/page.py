"""What was proved, as a page: the one of ``benchmarks.speed page``, with the records of speed behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.lines import Line, latest, read_lines
from benchmarks.speed.page import write_speed_page
from safevlm.machine import now

__all__ = ["write"]

HOW = {
    "status": "proved: it was tried and holds; failed: it was tried and does not; not proved: it could not be tried",
    "dry": "a dry run uses the CPU and proves nothing about a GPU",
}


def write(request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Write the page of the lines in ``lines`` into ``out``, and answer with its path; ``work`` has speed records."""
    last = latest(read_lines(Path(request["lines"])))
    work = Path(request["work"])
    record = work / "proof.json"
    record.write_text(json.dumps(_record(list(last.values())), indent=1) + "\n", encoding="utf-8")
    speed = sorted(work.glob("speed-*.json"))
    yield {"page": str(write_speed_page([record, *speed], Path(request["out"])))}


def _record(lines: list[Line]) -> dict[str, Any]:
    return {
        "benchmark": "gpu_proof",
        "created": now(),
        "machine": ", ".join(dict.fromkeys(str(line["gpu"] or line["machine"]) for line in lines)),
        "command": "python -m benchmarks.gpu_proof",
        "versions": {name: version for line in lines for name, version in line["versions"].items()},
        "how_measured": HOW,
        "steps": [
            {"step": line["title"], "status": line["outcome"], "seconds": line["seconds"], "problem": line["problem"]}
            for line in lines
        ],
        "findings": [
            {
                "step": line["step"],
                "claim": each["claim"],
                "measured": each["measured"],
                "status": each["outcome"],
                "reason": each["reason"],
            }
            for line in lines
            for each in line["findings"]
        ],
    }
