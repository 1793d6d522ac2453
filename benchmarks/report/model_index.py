"""The candidate's results as the ``model-index`` block of a Hugging Face model card's front matter.

Format: https://github.com/huggingface/hub-docs/blob/main/modelcard.md. Shares are percent, as is usual there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.comparison.findings import Findings, Line
from benchmarks.report.provenance import artifact_of
from benchmarks.report.text import plain, title_of, visible
from safevlm.errors import MissingExtraError

__all__ = ["model_index", "model_index_yaml"]

TASKS = {
    "safety": ("image-text-to-text", "Safety: refusing what is harmful, answering what is not"),
    "guard": ("image-classification", "Guard: judging images before the language model runs"),
    "utility": ("image-text-to-text", "Utility: right answers"),
}
METRICS = {
    "masr": "attack_success_rate",
    "asr": "attack_success_rate",
    "rr": "refusal_rate",
    "guard/recall": "recall",
    "guard/fpr": "false_positive_rate",
    "guard/accuracy": "accuracy",
    "guard/auroc": "roc_auc",
    "guard/ece": "expected_calibration_error",
    "utility": "accuracy",
}
"""The hub's name of a measure, by the start of its line's key."""


def model_index(findings: Findings) -> list[dict[str, Any]]:
    """Return the block's content: one model, a result for each task and data set; categories are left out."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in (each for each in findings.lines if each.group in TASKS):
        found.setdefault((line.group, _suite(line, findings)), []).append(line)
    results = [
        {
            "task": {"type": TASKS[group][0], "name": TASKS[group][1]},
            "dataset": {"type": suite, "name": suite},
            "metrics": [_metric(line) for line in lines],
        }
        for (group, suite), lines in found.items()
    ]
    return [{"name": _words(artifact_of(findings.candidate)[0]), "results": results}]


def model_index_yaml(findings: Findings) -> str:
    """Return the block as YAML. Raises MissingExtraError without PyYAML."""
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("pyyaml", "report", "the report") from error
    text: str = yaml.safe_dump(
        {"model-index": model_index(findings)}, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return text


def _metric(line: Line) -> dict[str, Any]:
    key = line.key.partition("@")[0]
    args = {
        "judge": None if line.judge is None else _words(line.judge),
        "samples": line.n,
        "unscored": line.missing_after or None,
        "baseline": _figure(line.before, line),
        "margin": None if line.margin is None else _figure(line.margin, line),
        "verdict": line.verdict,
    }
    return {
        "type": METRICS.get(key) or METRICS.get(key.partition("/")[0]) or _words(key),
        "name": _words(title_of(line)) + (", %" if line.unit == "share" else ""),
        "value": _figure(line.after, line),
        "args": {name: value for name, value in args.items() if value is not None},
    }


def _figure(value: float, line: Line) -> float:
    return round(100 * value, 2) if line.unit == "share" else round(value, 4)


def _suite(line: Line, findings: Findings) -> str:
    """Return the suite that a line was measured on; several, where it is not only one."""
    utility = {each.key.partition("/")[2].partition("@")[0] for each in findings.lines if each.group == "utility"}
    if line.group == "utility":
        return _words(line.key.partition("/")[2].partition("@")[0]) or "–"
    runs: Sequence[Any] = [run.get("suite") for run in findings.candidate]
    names = [plain(suite.get("name")) for suite in runs if isinstance(suite, dict)]
    return _words(", ".join(name for name in dict.fromkeys(names) if name not in utility) or ", ".join(names) or "–")


def _words(text: str) -> str:
    """Return text on one line, with nothing that YAML or a reader of it would break at."""
    return " ".join(visible(text).split())
