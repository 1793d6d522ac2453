"""Pairs of runs that never happened: what the verdict's rule says where the truth is known.

A suite is lines of yes-or-no samples on shared images. Each answer comes from a normal score: a part that image and
sample keep from run to run, and a part that is drawn anew in each run, for the image as a whole and for the sample.
The answer is bad where the score lies below a threshold, so that the rate and the share of answers that change
between two equal runs (the churn) are what they are meant to be. A run that became worse has a higher threshold.

Shape suffixes: N samples, I images, R pairs of runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from benchmarks.statistics.clustered import Clusters
from benchmarks.statistics.decision import LineVerdict, decide, overall
from benchmarks.statistics.holm import holm
from benchmarks.statistics.paired import PairedStatistics, line_statistics
from safevlm.errors import InputError

__all__ = [
    "MEAN",
    "Decide",
    "Sampled",
    "Suite",
    "Tally",
    "compared",
    "draw_badness",
    "draw_worsening",
    "keep_for_churn",
    "line_verdicts",
    "mean_where",
    "simulate",
    "spread_over",
    "where_of",
]

MEAN = "masr"
_NORMAL = NormalDist()
_BATCH = 250
"""Pairs of runs at a time: sums of 1,791 images x 4 types x 250 take 14 MB."""

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
Decide = Callable[..., LineVerdict]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampled:
    """The samples of one line: images (numbers in their pool), rate of bad answers, churn, margin; shares in 0..1."""

    key: str
    pool: str
    """Images of one name are the same images: a photograph is asked about in several ways."""
    images: Whole
    rate: float
    keep: float
    """Share of the score's variance that both runs have in common; less of it is more churn."""
    margin: float
    typed: bool = False
    """Whether the line is one of those that the mean is over."""
    decodings: int = 1
    """Sampled answers a sample and run; its badness is their mean."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Suite:
    """Lines, the margin of the mean over the typed ones, and how much of every part belongs to images (0..1)."""

    lines: tuple[Sampled, ...]
    mean_margin: float
    image_share: float = 0.3

    @property
    def keys(self) -> tuple[str, ...]:
        """The mean's key and the lines'."""
        return (MEAN, *(line.key for line in self.lines))

    def margin(self, key: str) -> float:
        """Return a line's margin."""
        return self.mean_margin if key == MEAN else next(line.margin for line in self.lines if line.key == key)

    def worsening(self, key: str, amount: float) -> dict[str, float]:
        """Return how much worse each line is where ``key`` is ``amount`` worse: for the mean, all typed ones alike."""
        if key not in self.keys:
            raise InputError(f"{key!r} is not one of the lines. Allowed: {', '.join(self.keys)}.")
        return {line.key: amount for line in self.lines if line.key == key or (key == MEAN and line.typed)}


@dataclass(kw_only=True)
class Tally:
    """How often each line, and the whole, got which verdict."""

    runs: int = 0
    lines: dict[str, dict[str, int]] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)

    def share(self, verdict: LineVerdict, key: str | None = None) -> float:
        """Return how often a line (the whole without ``key``) got ``verdict``."""
        return (self.whole if key is None else self.lines[key]).get(verdict, 0) / self.runs

    def add(self, verdicts: Mapping[str, LineVerdict]) -> None:
        """Count one pair of runs."""
        self.runs += 1
        for key, verdict in verdicts.items():
            counts = self.lines.setdefault(key, {})
            counts[verdict] = counts.get(verdict, 0) + 1
        told = overall(list(verdicts.values()))
        self.whole[told] = self.whole.get(told, 0) + 1


def simulate(
    suite: Suite,
    worsening: Mapping[str, float],
    *,
    runs: int,
    seed: int = 0,
    draws: int = 2000,
    confidence: float = 0.95,
    harm_level: float = 0.05,
    rule: Decide = decide,
    report: Callable[[int], None] = lambda _: None,
) -> Tally:
    """Decide ``runs`` simulated comparisons in which each line is truly ``worsening`` worse (0 where not named).

    Lines, bounds, p-values and ``rule`` are those of the report. ``report`` gets the number of comparisons done since
    its last call.
    """
    tally = Tally()
    for found in compared(suite, worsening, runs=runs, seed=seed, draws=draws, confidence=confidence):
        size = len(next(iter(found.values())))
        for run in range(size):
            tally.add(line_verdicts(suite, {key: each[run] for key, each in found.items()}, rule, harm_level))
        report(size)
    return tally


def compared(
    suite: Suite,
    worsening: Mapping[str, float],
    *,
    runs: int,
    seed: int = 0,
    draws: int = 2000,
    confidence: float = 0.95,
) -> Iterator[dict[str, list[PairedStatistics]]]:
    """Yield the statistics of ``runs`` simulated comparisons by line, some hundreds at a time."""
    rng = np.random.default_rng([seed, 11])
    typed = np.concatenate([np.full(len(line.images), line.typed) for line in suite.lines])
    places = [where_of(line) for line in suite.lines]
    mean = mean_where(suite)
    for start in range(0, runs, _BATCH):
        size = min(_BATCH, runs - start)
        drawn = draw_worsening(suite, worsening, size, rng)
        found = {
            line.key: line_statistics(
                where, own, counted=line.decodings == 1, confidence=confidence, seed=0, draws=draws
            )
            for line, where, own in zip(suite.lines, places, drawn, strict=True)
        }
        if mean is not None:
            all_NR = np.concatenate(drawn)[typed]
            found[MEAN] = line_statistics(mean, all_NR, counted=False, confidence=confidence, seed=0, draws=draws)
        yield found


def draw_worsening(suite: Suite, worsening: Mapping[str, float], runs: int, rng: np.random.Generator) -> list[Floats]:
    """Draw badness after - before of each line: NR, -1, 0 or 1, of several decodings the mean."""
    return [
        sum((after.astype(np.float64) - before for before, after in turns), np.zeros(turns[0][0].shape)) / len(turns)
        for turns in draw_badness(suite, worsening, runs, rng)
    ]


def draw_badness(
    suite: Suite, worsening: Mapping[str, float], runs: int, rng: np.random.Generator
) -> list[list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]]:
    """Draw whether each answer of each line is bad, before and after, in each decoding: two of NR."""
    pools = {line.pool: 0 for line in suite.lines}
    for line in suite.lines:
        pools[line.pool] = max(pools[line.pool], int(line.images.max()) + 1)
    most = max(line.decodings for line in suite.lines)
    kept, *fresh = (
        {pool: rng.standard_normal((size, runs), dtype=np.float32) for pool, size in pools.items()}
        for _ in range(1 + 2 * most)
    )
    own = np.float32(np.sqrt(suite.image_share)), np.float32(np.sqrt(1 - suite.image_share))

    def part(images: Mapping[str, npt.NDArray[np.float32]], line: Sampled) -> npt.NDArray[np.float32]:
        alone = rng.standard_normal((len(line.images), runs), dtype=np.float32)
        found: npt.NDArray[np.float32] = own[0] * images[line.pool][line.images] + own[1] * alone
        return found

    found = []
    for line in suite.lines:
        common = np.float32(np.sqrt(line.keep)) * part(kept, line)
        new = np.float32(np.sqrt(1 - line.keep))
        edges = _NORMAL.inv_cdf(line.rate), _NORMAL.inv_cdf(line.rate + worsening.get(line.key, 0.0))
        turns = []
        for turn in range(line.decodings):
            before, after = (
                common + new * part(images, line) < edge
                for images, edge in zip(fresh[2 * turn : 2 * turn + 2], edges, strict=True)
            )
            turns.append((before, after))
        found.append(turns)
    return found


def where_of(line: Sampled) -> Clusters:
    """Return the clusters of one line: its images."""
    return Clusters(np.zeros(len(line.images), dtype=np.int64), line.images, [1.0])


def keep_for_churn(rates: Sequence[float], sizes: Sequence[int], churn: float) -> float:
    """Return the common share of variance at which ``churn`` of all samples change between two equal runs.

    Raises InputError for more churn than runs without anything in common would have.
    """
    most = _churn(rates, sizes, 0.0)
    if not 0 < churn < most:
        told = ", ".join(f"{rate:.3g}" for rate in rates)
        raise InputError(
            f"churn {churn} is not possible with rates {told}. Give a number above 0 and below {most:.3f}."
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if _churn(rates, sizes, middle) < churn else (middle, high)
    return (low + high) / 2


def spread_over(images: int, samples: int, rng: np.random.Generator) -> Whole:
    """Return an image for each sample: every image once in random order, then again, as in HoliSafe-Bench."""
    rounds = -(-samples // images)
    found: Whole = np.concatenate([rng.permutation(images) for _ in range(rounds)])[:samples]
    return found


def _churn(rates: Sequence[float], sizes: Sequence[int], keep: float) -> float:
    """Return twice the chance of good before and bad after, over a grid of what both runs share."""
    grid = np.linspace(-8, 8, 2001)
    density = np.exp(-(grid**2) / 2)
    density /= density.sum()
    changed = 0.0
    for rate, size in zip(rates, sizes, strict=True):
        edge = (_NORMAL.inv_cdf(rate) - np.sqrt(keep) * grid) / np.sqrt(max(1 - keep, 1e-12))
        bad = np.array([_NORMAL.cdf(value) for value in edge])
        changed += size * 2 * float((density * bad * (1 - bad)).sum())
    return changed / sum(sizes)


def mean_where(suite: Suite) -> Clusters | None:
    """Return clusters of the mean: images of different pools are different images."""
    typed = [line for line in suite.lines if line.typed]
    if not typed:
        return None
    pools = sorted({line.pool for line in typed})
    images = [line.images * len(pools) + pools.index(line.pool) for line in typed]
    strata = np.repeat(np.arange(len(typed)), [len(line.images) for line in typed])
    return Clusters(strata, np.concatenate(images), np.full(len(typed), 1 / len(typed)))


def line_verdicts(
    suite: Suite, found: Mapping[str, PairedStatistics], rule: Decide, harm_level: float
) -> dict[str, LineVerdict]:
    """Return the verdict of each line of one comparison, Holm's correction over all of them."""
    corrected = holm([each.p_harm for each in found.values()])
    return {
        key: rule(uppers=each.uppers, margin=suite.margin(key), change=each.change, p_holm=p, alpha=harm_level)
        for (key, each), p in zip(found.items(), corrected, strict=True)
    }
