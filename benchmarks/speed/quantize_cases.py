"""What is quantized in the comparison of quantizers, and how its outcome reads; no torch is loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.shapes.shapes import VisionShape, find_shape

__all__ = ["CASES", "Case", "QuantizeRow", "QuantizeSpeed", "quantize_table"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A language model to quantize, and how much text."""

    name: str
    what: str
    layers: int
    samples: int
    length: int
    language: Mapping[str, Any]
    width: int

    def shape(self) -> VisionShape:
        """Return a Safe-VLM's shape around this language model, its vision tower one layer."""
        base = find_shape("SafeLLaVA-7B").shortened(1)
        return replace(base, name=self.name, hidden_size=self.width, language=dict(self.language))


CASES = {
    "llama": Case(
        name="llama",
        what="a Llama of 4 layers and width 1024",
        layers=4,
        samples=32,
        length=256,
        width=1024,
        language={
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 2816,
            "vocab_size": 2048,
        },
    ),
    "layer": Case(
        name="layer",
        what="one decoder layer of SafeLLaVA-7B's shape",
        layers=1,
        samples=16,
        length=512,
        width=4096,
        language={
            "num_hidden_layers": 1,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11008,
            "vocab_size": 2048,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class QuantizeRow:
    """One peer's outcome; ``problem`` where there is none. Best of the rounds' times, highest of their peaks."""

    peer: str
    version: str | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None
    error: float | None = None
    """Root mean square error of last hidden states over their root mean square."""
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizeSpeed:
    """All rows of a case, in one run on one machine."""

    case: Case
    threads: int
    rounds: int
    bits: int
    group_size: int
    rows: tuple[QuantizeRow, ...]

    def stated(self) -> dict[str, Any]:
        """Return what JSON keeps of the case."""
        return {"case": self.case.what, "layers": self.case.layers, "samples": self.case.samples} | {
            "length": self.case.length,
            "width": self.case.width,
            "bits": self.bits,
            "group_size": self.group_size,
        }


def quantize_table(speed: QuantizeSpeed) -> list[str]:
    """Return the lines of a table; ratios are to this project's own figures."""
    lines = [
        f"{speed.case.what}: {speed.bits} bits, groups of {speed.group_size}, {speed.case.samples} samples of "
        f"{speed.case.length} tokens, {speed.threads} threads, best of {speed.rounds}",
        f"{'':16}{'version':>10}{'seconds':>10}{'x ours':>8}{'peak MiB':>10}{'x ours':>8}{'output error':>14}",
    ]
    ours = speed.rows[0]
    for row in speed.rows:
        if row.seconds is None or row.peak_rss_bytes is None or row.error is None:
            lines.append(f"{row.peer:16}not measured: {row.problem}")
            continue
        time = f"{row.seconds / ours.seconds:.2f}" if ours.seconds else "-"
        memory = f"{row.peak_rss_bytes / ours.peak_rss_bytes:.2f}" if ours.peak_rss_bytes else "-"
        lines.append(
            f"{row.peer:16}{row.version or '':>10}{row.seconds:>10.1f}{time:>8}{row.peak_rss_bytes / 2**20:>10.0f}"
            f"{memory:>8}{row.error:>14.4f}"
        )
    return lines
