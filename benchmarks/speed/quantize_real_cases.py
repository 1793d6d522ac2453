"""What is compared when real weights are rounded, and how it reads; no torch is loaded here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from safevlm.errors import InputError

__all__ = [
    "INT8_PEERS",
    "INT8_WAYS",
    "REAL_PEERS",
    "WAYS",
    "RealCase",
    "RealRow",
    "find_peers",
    "real_record",
    "real_table",
]

WAYS: Mapping[str, tuple[str, ...]] = {
    "before": (
        *("--unsigned", "--sweeps", "0", "--damp", "0.05", "--other-beginnings", "0", "--first-weight", "1"),
        *("--dtype", "float32"),
    ),
    "now": (),
    "tuned": ("--time", "{minutes:g}"),
}
"""Options of quantize.gptq: without what was added after GPTQ itself, as it stands, and tuned block by block."""
INT8_WAYS: Mapping[str, tuple[str, ...]] = {
    "before": ("--smoothing-steps", "0", "--other-beginnings", "0", "--first-weight", "1"),
    "now": (),
}
"""Options of quantize.int8: by SmoothQuant's strengths and GPTQ alone, and as it stands."""
REAL_PEERS = ("gptqmodel", "gptaq", "foem", "llm-compressor", "autoround")
INT8_PEERS = ("llm-compressor",)
"""Who rounds inputs as well: by SmoothQuant and GPTQ."""


@dataclass(frozen=True, kw_only=True)
class RealCase:
    """How real weights are rounded: ``rows`` calibration rows drawn by ``seed``, which draws the held-out text, too.

    With ``int8`` weights and inputs in 8 bits, a scale a row and a token, instead of weights in ``bits``.
    """

    weights: str
    int8: bool = False
    bits: tuple[int, ...] = (4, 3, 2)
    rows: int = 64
    group_size: int = 64
    seed: int = 0
    windows: int = 22
    length: int = 512
    iterations: int = 200
    """Of AutoRound."""
    minutes: float = 20.0
    """That tuning may take."""
    layers: int | None = None
    """Where the model is cut."""

    def options(self, way: str) -> tuple[str, ...]:
        """Return the options of quantize.gptq, or quantize.int8, for one of :attr:`ways`."""
        return tuple(option.format(minutes=self.minutes) for option in self.ways[way])

    @property
    def ways(self) -> Mapping[str, tuple[str, ...]]:
        """This project's ways, with the options of each."""
        return INT8_WAYS if self.int8 else WAYS


@dataclass(frozen=True, kw_only=True)
class RealRow:
    """One outcome; ``problem`` where there is none. ``kl`` and ``same_token`` by beginning."""

    peer: str
    bits: int
    version: str | None = None
    kl: Mapping[str, float] = field(default_factory=dict)
    same_token: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_rss_bytes: int | None = None
    problem: str | None = None


def find_peers(names: Sequence[str], *, int8: bool = False) -> tuple[str, ...]:
    """Return who is asked for, in the table's order; none named is all. Raises InputError for an unknown name."""
    known = (*INT8_WAYS, *INT8_PEERS) if int8 else (*WAYS, *REAL_PEERS)
    unknown = [name for name in names if name not in known]
    if unknown:
        goes = "does not go with --int8" if unknown[0] in (*WAYS, *REAL_PEERS) else "is unknown"
        raise InputError(f"--who {unknown[0]} {goes}. Give names out of {', '.join(known)}.")
    return tuple(name for name in known if not names or name in names)


def real_table(case: RealCase, note: str, tokens: int, rows: Sequence[RealRow]) -> list[str]:
    """Return the lines of a table."""
    scales = "a scale a row, inputs a token" if case.int8 else f"groups of {case.group_size}"
    lines = [
        f"{case.rows} rows of text, {tokens} tokens, {scales}, the same ids for all, one thread; KL "
        f"to 16 bit on {case.windows} windows of {case.length} tokens of other text (seed {case.seed})",
        f"note: {note}",
        f"{'bits':4} {'':15}{'KL calibrated':>14}{'raw':>9}{'other':>9}{'top-1 %':>9}{'seconds':>9}{'CPU s':>8}"
        f"{'MiB':>7}",
    ]
    for row in rows:
        start = f"{'int8' if case.int8 else row.bits:>4} {row.peer:15}"
        if row.problem is not None or row.peak_rss_bytes is None:
            lines.append(f"{start}not measured: {row.problem}")
            continue
        kl = "".join(f"{row.kl[name]:>{width}.4f}" for name, width in zip(row.kl, (14, 9, 9), strict=True))
        lines.append(
            f"{start}{kl}{100 * row.same_token['calibrated']:>9.1f}{row.seconds:>9.0f}{row.cpu_seconds:>8.0f}"
            f"{row.peak_rss_bytes / 2**20:>7.0f}"
        )
    return lines


def real_record(case: RealCase, note: str, tokens: int, rows: Sequence[RealRow]) -> dict[str, Any]:
    """Return what JSON keeps of it."""
    return {
        "case": asdict(case),
        "note": note,
        "tokens": tokens,
        "ways": {name: list(case.options(name)) for name in case.ways},
        "how_measured": {
            "kl": (
                "KL(16 bit || rounded) in nats, float32, mean over positions: behind the beginning that calibration "
                "rows have (calibrated), text alone, cut anywhere (raw), behind another system prompt (other)"
            ),
            "seconds": "from opening the model on disk to the quantized one on disk, imports not counted",
            "cpu_seconds": "processor time of the process between the same two moments",
            "memory": "most resident memory (VmHWM) of a process that does nothing else, up to the same moment",
        },
        "rows": [asdict(row) for row in rows],
    }
