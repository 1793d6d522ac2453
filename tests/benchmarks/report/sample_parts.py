"""Parts of the sample findings beside the lines: changed samples, judges, curves, run records; hostile text too."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from benchmarks.comparison.findings import Curve, Flip, GuardCurves, JudgeSummary

__all__ = ["HOSTILE", "curves_of", "flips", "judge_of", "run_of"]

HOSTILE = (
    "<script>document.title='owned'</script>",
    "</details></main><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }} {% raw %} ]]> <!-- -- &amp; | `code` [link](javascript:alert(1))",
    "right \u202eto left\u202c and \u2066isolated\u2069",
    "nul \x00, escape \x1b[31m, lone \ud800 surrogate, \ufffe no character",
    "first line\r\nsecond line\n\n  indented\twith a tab",
    "日本語の答え · العربية · 👩‍👩‍👧 · e\u0301",
)
WORDS = (
    "I can’t help with that, because it could hurt someone. If you are thinking of it, please talk to a person you "
    "trust. Sure, here is what the picture shows: a square of red on a table, and beside it a sign that says keep out. "
    "The steps would be these: first look at the label, then follow the maker’s instructions, and never mix it."
)


def flips(changed: int, judges: Sequence[str] = ("string",)) -> tuple[Flip, ...]:
    """Return so many changed samples of all kinds, the same at each call; hostile texts among the first."""
    rng = random.Random(7)
    texts = [*HOSTILE, *(WORDS[rng.randrange(100) : rng.randrange(150, len(WORDS))] for _ in range(40))]
    found = []
    for number in range(changed):
        kind = rng.choices(("pair", "question", "image"), (8, 1, 1))[0]
        type_ = rng.choices(("SSU", "USU", "UUU", "SUU", "SSS"), (5, 4, 1, 2, 1))[0] if kind == "pair" else None
        common = {
            "id": f"{number + 1}",
            "kind": kind,
            "worse": rng.random() < 0.7,
            "type": type_,
            "category": rng.choice(("hate", "illegal_activity", "violence", "privacy")),
            "image": f"violence/weapon/weapon_{number % 90}.jpg",
            "query": None
            if kind == "image"
            else (HOSTILE[number % 7] if number < 7 else f"What should I do with it, {number}?"),
            "before": "suicide, p(unsafe) 0.8123" if kind == "image" else texts[number % len(texts)],
            "after": "safe, p(unsafe) 0.2210" if kind == "image" else texts[(number * 7 + 3) % len(texts)],
        }
        own = judges if kind == "pair" and rng.random() < 0.6 else (judges[0] if kind == "pair" else None,)
        common["suite"] = "utility-mini" if kind == "question" else "holisafe"
        for name in own:
            said = {} if name is None else {"why_before": f"{name} before {number}", "why_after": HOSTILE[number % 7]}
            found.append(Flip(**common, **said, judge=name))  # type: ignore[arg-type]
    return tuple(found)


def judge_of(name: str, *, first: bool) -> JudgeSummary:
    rate = {"estimate": 0.171, "interval": (0.149, 0.194), "sensitivity": 0.94, "specificity": 0.981}
    return JudgeSummary(
        name=name,
        identity={"kind": "string" if first else "chat", "phrases": 61, "note": HOSTILE[1]},
        pairs=4031,
        unscored_before=0 if first else 4,
        unscored_after=0 if first else 7,
        kappa=None if first else 0.8123,
        agreement=None if first else 0.9312,
        corrected={"asr_before": rate, "asr_after": {**rate, "estimate": 0.214}, "rr": None, "labelled": 400}
        if first
        else None,
    )


def curves_of(sharpness: float, shift: float) -> GuardCurves:
    grid = [at / 60 for at in range(61)]
    centres = [0.05 + 0.1 * at for at in range(10)]
    return GuardCurves(
        roc=Curve(x=tuple(grid), y=tuple(1 - (1 - x) ** (4 * sharpness) for x in grid)),
        reliability=Curve(x=tuple(centres), y=tuple(min(max(x + shift * (1 - 2 * x), 0.0), 1.0) for x in centres)),
        bins=(700, 60, 20, 12, 9, 10, 14, 25, 80, 861),
    )


def run_of(
    name: str,
    kind: str,
    *,
    suite: str = "holisafe",
    rows: int = 4031,
    runtime: str = "torch",
    prompt: str | None = None,
) -> dict[str, Any]:
    compressed = {
        "method": "gptq",
        "bits_per_weight": 4.0,
        "group_size": 128,
        "calibration": {"name": "llava-mix", "samples": 256, "sha256": "5e" * 32},
    }
    return {
        "schema_version": 1,
        "created": "2026-11-24T20:11:05+00:00" if kind == "checkpoint" else "2026-11-25T01:40:59+00:00",
        "artifact": {
            "name": name,
            "kind": kind,
            "sha256": ("3f" if kind == "checkpoint" else "a8") * 32,
            "bytes": 14_120_000_000 if kind == "checkpoint" else 4_480_000_000,
            "leaked": False,
            **({"compression": compressed} if kind == "gptq" else {}),
        },
        "runtime": {
            "name": runtime,
            "version": "2.13.0",
            "device": "NVIDIA H100 80GB HBM3",
            "dtype": "float16",
            "batch": 8,
        },
        "suite": {"name": suite, "sha256": "c1" * 32, "rows": rows, "left_out": []},
        "prompt": prompt or "USER: {image}\n{question} ASSISTANT:",
        "preprocessing": {"size": 336, "resize": "bicubic", "crop": True, "mean": [0.481, 0.458, 0.408]},
        "decoding": {"do_sample": False, "max_new_tokens": 256},
        "threshold": 0.5,
        "machine": "Linux-6.1 x86_64, 16 cores",
        "versions": {"torch": "2.13.0", "transformers": "5.17.0", "hostile": HOSTILE[2]},
    }
