"""What a comparison of two runs found: the content of every report, whatever it is written as.

Shares are 0..1 and differences are after - before; a point is 0.01. Intervals are two-sided, bounds one-sided, at
``Findings.confidence``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

__all__ = [
    "EXIT_CODES",
    "Bound",
    "ClassDrift",
    "ClassRate",
    "ClassVerdict",
    "Curve",
    "Findings",
    "Flip",
    "GuardCurves",
    "Interval",
    "JudgeSummary",
    "Line",
    "Step",
    "Unit",
    "Verdict",
]

Verdict: TypeAlias = Literal["PASS", "REGRESSION", "INCONCLUSIVE", "ANOMALOUS"]
EXIT_CODES: Mapping[Verdict, int] = {"PASS": 0, "REGRESSION": 3, "INCONCLUSIVE": 4, "ANOMALOUS": 5}

Interval: TypeAlias = tuple[float, float]
Unit: TypeAlias = Literal["share", "number", "words"]
ClassVerdict: TypeAlias = Literal["PASS", "REGRESSION", "INCONCLUSIVE", "NOT CERTIFIED"]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A one-sided upper bound of a line's worsening (0..1, positive is worse); PASS needs each below the margin."""

    name: str
    """What it allows for, such as ``samples``, ``images``, ``missing rows``, ``judge errors``."""
    upper: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One measure, before and after.

    With a ``margin`` it takes part in the verdict; without, it is shown and decides nothing (``verdict`` None).
    ``worse`` and ``better`` count samples that changed from good to bad and from bad to good.
    """

    key: str
    """Unique, such as ``asr/SSU``, ``rr``, ``masr``, ``guard/recall``, ``utility/holisafe-mini``, ``category/hate``."""
    title: str
    group: Literal["safety", "guard", "utility", "answers", "category"]
    judge: str | None = None
    """Whose scores these are; None for measures that need no judge."""
    unit: Unit = "share"
    lower_is_better: bool
    n: int
    """Samples that both runs have a score of."""
    clusters: int
    """Images among them."""
    before: float
    after: float
    before_interval: Interval | None = None
    after_interval: Interval | None = None
    change: float
    interval: Interval | None = None
    """Interval of ``change``, computed by ``method``."""
    method: str = ""
    bootstrap: Interval | None = None
    """Of ``change``, images drawn again: a cross-check that knows of several questions an image."""
    bounds: tuple[Bound, ...] = ()
    """What must lie below the margin; empty without one."""
    corrected: float | None = None
    """``change`` without the judge's errors, by people's labels; None without, or where they cannot tell."""
    corrected_interval: Interval | None = None
    """Its upper end is the bound ``judge errors``; the lower one errs as seldom."""
    judge_error: float | None = None
    """Without labels, of a PASS: the share of answers, alike in both runs, that misread would overturn it."""
    judge_drift: float | None = None
    """And how many more of one run's answers than of the other's, as a share."""
    judge_sentence: str = ""
    """What labels make of the change, or which labels are missing, or which error would overturn a PASS."""
    worse: int | None = None
    better: int | None = None
    missing_before: int = 0
    """Samples of this line without a score in the baseline; they are not in ``n``."""
    missing_after: int = 0
    margin: float | None = None
    """How much worse is acceptable, above 0."""
    declared: float | None = None
    """The declared margin, where ``margin`` is less: a share of the few samples that were good in the baseline."""
    p_harm: float | None = None
    p_holm: float | None = None
    """``p_harm`` after Holm's correction over the lines with a margin: the first judge's with those that need none, and
    each other judge's by themselves."""
    resolvable: float | None = None
    """The smallest margin that so many samples could prove, at power 0.8, if nothing had changed on average."""
    samples_needed: int | None = None
    """About how many samples would settle an INCONCLUSIVE line with probability 0.8, if the rates stayed; None where
    none would."""
    verdict: Verdict | None = None
    reason: str = ""
    sentence: str = ""
    """What happened, in one plain sentence with counts, for the banner."""


@dataclass(frozen=True, kw_only=True)
class Flip:
    """A sample whose score changed; ``worse`` says in which direction."""

    id: str
    kind: Literal["pair", "question", "image"]
    judge: str | None
    worse: bool
    type: str | None = None
    category: str | None = None
    image: str | None = None
    query: str | None = None
    before: str | None = None
    """The baseline's answer, for an image the guard's class and p(unsafe)."""
    after: str | None = None
    why_before: str | None = None
    """What the judge said of the baseline's answer, or which phrase matched."""
    why_after: str | None = None
    suite: str | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of a plot."""

    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class GuardCurves:
    """ROC (x FPR, y recall) and reliability (x mean p(unsafe) of a bin, y share that is unsafe) of one run."""

    roc: Curve
    reliability: Curve
    bins: tuple[int, ...]
    """Images in each bin of the reliability curve."""


@dataclass(frozen=True, kw_only=True)
class ClassRate:
    """Recall or FPR of one class, before and after; every interval is exact. See ``benchmarks.comparison.class_drift``.

    ``NOT CERTIFIED`` is no verdict on the model: so many images prove neither that it kept this class nor that it did
    not. It leaves the whole verdict alone, which ``INCONCLUSIVE`` (the class seems worse) and ``REGRESSION`` do not.
    """

    n: int
    """Images with probabilities in both runs that the rate is over; without any there is no rate."""
    missing_after: int = 0
    """Images that the candidate alone has no probabilities of: counted as bad in ``upper``."""
    before: float | None = None
    after: float | None = None
    before_interval: Interval | None = None
    after_interval: Interval | None = None
    change: float | None = None
    interval: Interval | None = None
    worse: int = 0
    better: int = 0
    upper: float = 1.0
    """One-sided bound of the worsening at ``Findings.confidence``; it must lie below the margin."""
    margin: float | None = None
    p_harm: float | None = None
    """McNemar's exact p; None without a margin."""
    p_holm: float | None = None
    """After Holm's correction over the classes."""
    verdict: ClassVerdict | None = None
    needed: int | None = None
    """Where not certified: how many images would be enough; None where more of them would not do."""
    lacking: int | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class ClassDrift:
    """A class of the guard, before and after."""

    name: str
    images: int
    """Images whose label it is, with probabilities in both runs."""
    recall: ClassRate | None
    """None for the class safe."""
    fpr: ClassRate
    """Of safe images; of the class safe, by whatever class, and without a verdict: the line ``guard/fpr`` has it."""
    named_before: float | None = None
    """Share of its blocked images whose most probable harm it is; None where none was blocked."""
    named_after: float | None = None


@dataclass(frozen=True, kw_only=True)
class JudgeSummary:
    """A judge, what it could not score, and how far it agrees with the first one."""

    name: str
    identity: Mapping[str, Any]
    pairs: int
    unscored_before: int
    unscored_after: int
    kappa: float | None = None
    """Cohen's, with the first judge, both runs' pairs together; None for the first one."""
    agreement: float | None = None
    corrected: Mapping[str, Any] | None = None
    """``asr``/``rr`` by run, from people's labels: estimate, interval, sensitivity, specificity; labelled answers."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Part of the way from baseline to candidate, with a third run in between: what changed, and what it did."""

    title: str
    """Such as ``compression``, ``engine``, ``preprocessing``, ``noise (the same again)``."""
    before: str
    after: str
    changes: Mapping[str, float]
    """Change (after - before) by key of the line."""
    flips: Mapping[str, tuple[int, int]]
    """Samples that got worse and better, by key of the line."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything a report says."""

    verdict: Verdict
    reasons: tuple[str, ...]
    """Why, in the order of the lines; sentences for a release manager."""
    anomalies: tuple[str, ...] = ()
    confidence: float = 0.95
    harm_level: float = 0.05
    """The level of significance, after Holm's correction, from which a worsening is told as harm."""
    seed: int = 0
    lines: tuple[Line, ...] = ()
    flips: tuple[Flip, ...] = ()
    judges: tuple[JudgeSummary, ...] = ()
    guard_before: GuardCurves | None = None
    guard_after: GuardCurves | None = None
    classes: tuple[ClassDrift, ...] = ()
    """The guard's, in their order; empty where no guard was measured."""
    steps: tuple[Step, ...] = ()
    cautions: tuple[str, ...] = ()
    """What a reader may not conclude."""
    judge_cautions: tuple[str, ...] = ()
    """The first ones of ``cautions``: what the judges leave open, which stands beside the verdict."""
    baseline: tuple[Mapping[str, Any], ...] = ()
    """``run.json`` of the baseline's runs."""
    candidate: tuple[Mapping[str, Any], ...] = ()
    against: tuple[Mapping[str, Any], ...] = ()
    margins: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    @property
    def exit_code(self) -> int:
        """The code that ``benchmarks.regress`` ends with."""
        return EXIT_CODES[self.verdict]

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``report.json``."""
        return {"schema_version": 1, "exit_code": self.exit_code, **asdict(self)}
