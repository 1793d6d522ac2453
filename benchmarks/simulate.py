"""The verdict's error rates, from runs whose truth is known: ``python -m benchmarks.simulate``.

False PASS: how often a line passes whose truth lies exactly at its margin. False REGRESSION: how often harm is reported
where nothing changed but churn. Power: how often a harm of 1, 2 or 5 points is reported, and how often no change
passes. ``benchmarks/STATISTICS.md`` keeps the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
import numpy as np

from benchmarks.comparison.margins import Margins
from benchmarks.statistics.judged_simulation import (
    DRAWINGS,
    Drawing,
    JudgeError,
    judged_lines,
    judged_summary,
    measure_judged,
)
from benchmarks.statistics.power import Effort, enlarged
from benchmarks.statistics.simulation import MEAN, Sampled, Suite, Tally, keep_for_churn, simulate, spread_over
from benchmarks.suites.holisafe_mini import PAIRS, QUESTIONS
from safevlm.errors import InputError
from safevlm.terminal.commandline import run
from safevlm.terminal.options import json_option

__all__ = ["PROFILES", "SUITES", "Profile", "build", "image_share_option", "measure_errors", "summary"]

POINTS = (1, 2, 5)
SUITES: Mapping[str, tuple[int, int, int]] = {"holisafe": (4031, 1500, 1), "holisafe-mini": (PAIRS, QUESTIONS, 2)}
"""Pairs, questions of a utility suite (of MMStar's size, or the built-in one), and questions an image."""
_TYPES: Mapping[str, tuple[int, str]] = {
    "SSU": (718, "safe"),
    "USU": (971, "unsafe"),
    "UUU": (761, "unsafe"),
    "SUU": (899, "safe"),
    "SSS": (682, "safe"),
}
"""Pairs in HoliSafe-Bench, and the images that they ask about."""
_IMAGES: Mapping[str, int] = {"safe": 834, "unsafe": 957}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Rates of bad answers of a baseline, 0..1, and churn: the share of samples that change between equal runs."""

    asr: tuple[float, float, float, float]
    """SSU, USU, UUU, SUU."""
    rr: float
    churn: float
    """Of unsafe pairs together; harmless pairs keep as much as they do."""
    guard: float = 0.03
    """Of unsafe images let through, and of safe images blocked."""
    guard_churn: float = 0.012
    wrong: float = 0.4
    wrong_churn: float = 0.08


PROFILES: Mapping[str, Profile] = {
    "safellava": Profile(asr=(0.1657, 0.4367, 0.0026, 0.0100), rr=0.0029, churn=0.12),
    "safeqwen": Profile(asr=(0.1936, 0.2533, 0.0010, 0.0200), rr=0.0191, churn=0.12),
    "tiny": Profile(
        asr=(0.005, 0.010, 0.001, 0.001), rr=0.004, churn=0.004, guard=0.01, guard_churn=0.006, wrong=0.02,
        wrong_churn=0.01,
    ),
}  # fmt: skip
"""The first two from the published answers (SafeQwen's UUU, none of 761 there, as 0.1 %), guard and utility assumed."""


def build(
    suite: str,
    profile: Profile,
    *,
    pairs: int | None = None,
    questions: int | None = None,
    image_share: float = 0.3,
    seed: int = 0,
    margins: Margins | None = None,
) -> Suite:
    """Return a suite's lines at ``margins``, its samples spread over images as HoliSafe-Bench spreads them."""
    own_pairs, own_questions, each = SUITES[suite]
    margins, scale = margins or Margins(), (pairs or own_pairs) / SUITES["holisafe"][0]
    asked = questions or own_questions
    rng = np.random.default_rng([seed, 5])
    sizes = {name: round(count * scale) for name, (count, _) in _TYPES.items()}
    images = {pool: round(count * scale) for pool, count in _IMAGES.items()}
    unsafe = [name for name in _TYPES if name != "SSS"]
    keep = keep_for_churn(profile.asr, [sizes[name] for name in unsafe], profile.churn)
    rates = dict(zip(unsafe, profile.asr, strict=True)) | {"SSS": profile.rr}
    lines = [
        Sampled(
            key="rr" if name == "SSS" else f"asr/{name}",
            pool=pool,
            images=spread_over(images[pool], sizes[name], rng),
            rate=rates[name],
            keep=keep,
            margin=_share(margins, "rr" if name == "SSS" else "type"),
            typed=name != "SSS",
        )
        for name, (_, pool) in _TYPES.items()
    ]
    for key, pool, count, rate, churn, rows in (
        ("guard_recall", "unsafe", images["unsafe"], profile.guard, profile.guard_churn, images["unsafe"]),
        ("guard_fpr", "safe", images["safe"], profile.guard, profile.guard_churn, images["safe"]),
        ("utility", "questions", -(-asked // each), profile.wrong, profile.wrong_churn, asked),
    ):
        own = keep_for_churn([rate], [1], churn)
        drawn = spread_over(count, rows, rng)
        lines.append(Sampled(key=key, pool=pool, images=drawn, rate=rate, keep=own, margin=_share(margins, key)))
    return Suite(lines=tuple(lines), mean_margin=_share(margins, "masr"), image_share=image_share)


def measure_errors(
    suite: Suite,
    *,
    runs: int,
    seed: int,
    draws: int,
    advance: Callable[[int], None] = lambda _: None,
    points: Sequence[int] = POINTS,
) -> dict[str, Any]:
    """Return, 0..1: rates where nothing changed, false PASS at each margin, and power at each number of points."""

    def told(worsening: Mapping[str, float]) -> Tally:
        return simulate(suite, worsening, runs=runs, seed=seed, draws=draws, report=advance)

    null = told({})
    found: dict[str, Any] = {
        "unchanged": {
            "overall": {"PASS": null.share("PASS"), "REGRESSION": null.share("REGRESSION")},
            **{key: {v: null.share(v, key) for v in ("PASS", "REGRESSION")} for key in suite.keys},
        },
        "at_margin": {},
        "power": {},
    }
    for key in suite.keys:
        at = told(suite.worsening(key, suite.margin(key)))
        found["at_margin"][key] = {"line PASS": at.share("PASS", key), "overall PASS": at.share("PASS")}
        found["power"][key] = {}
        for amount in points:
            harmed = told(suite.worsening(key, amount / 100))
            found["power"][key][str(amount)] = {
                "line REGRESSION": harmed.share("REGRESSION", key),
                "overall REGRESSION": harmed.share("REGRESSION"),
                "overall PASS": harmed.share("PASS"),
            }
    return found


def _share(margins: Margins, key: str) -> float:
    """Return a margin, infinite where the measure was left out of the verdict."""
    found = margins.share(key)
    return math.inf if found is None else found


def summary(suite: Suite, found: Mapping[str, Any], runs: int) -> str:
    """Return a Markdown table, percent of comparisons."""
    head = ["line", "n", "margin", "same: PASS", "same: REGR.", "at margin: PASS", "overall PASS"]
    head += [f"REGR. at {amount}" for amount in found["power"][MEAN]]
    sizes = {line.key: len(line.images) for line in suite.lines}
    sizes[MEAN] = sum(len(line.images) for line in suite.lines if line.typed)
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for key in suite.keys:
        own, edge, power = found["unchanged"][key], found["at_margin"][key], found["power"][key]
        shares = [own["PASS"], own["REGRESSION"], edge["line PASS"], edge["overall PASS"]]
        shares += [each["line REGRESSION"] for each in power.values()]
        rows.append([key, f"{sizes[key]:,}", f"{100 * suite.margin(key):g}", *(f"{100 * each:.1f}" for each in shares)])
    whole = found["unchanged"]["overall"]
    told = [f"{100 * whole[verdict]:.1f}" for verdict in ("PASS", "REGRESSION")]
    rows.append(["overall", "", "", *told, *[""] * (len(head) - 5)])
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    noise = 100 * math.sqrt(0.05 * 0.95 / runs)
    return "\n".join(
        [*lines, "", f"{runs:,} comparisons each; a rate of 5 % has a standard error of {noise:.2f} points."]
    )


image_share_option = click.option(
    "--image-share",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Share of the variance between images.",
)


@click.command()
@click.option(
    "--suite", "name", type=click.Choice(list(SUITES)), default="holisafe", show_default=True, help="Suite to simulate."
)
@click.option(
    "--profile", type=click.Choice(list(PROFILES)), help="Profile of the baseline.  [default: safellava, tiny for mini]"
)
@click.option("--pairs", type=click.IntRange(min=100), help="Number of pairs.  [default: 4031, 2400 for mini]")
@click.option(
    "--questions", type=click.IntRange(min=10), help="Number of utility questions.  [default: 1500, 600 for mini]"
)
@click.option(
    "--churn", type=click.FloatRange(0, 1, min_open=True), help="Share of unsafe pairs whose outcome changes."
)
@image_share_option
@click.option(
    "--decodings",
    type=click.IntRange(1, 20),
    default=1,
    show_default=True,
    help="Number of sampled decodings per run.",
)
@click.option(
    "--runs", type=click.IntRange(min=1), default=2000, show_default=True, help="Number of comparisons per truth."
)
@click.option(
    "--draws",
    type=click.IntRange(min=99),
    default=2000,
    show_default=True,
    help="Number of bootstrap and permutation draws.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed.")
@click.option("--judge-sensitivity", type=click.FloatRange(0, 1), help="Share of bad answers that the judge calls bad.")
@click.option(
    "--judge-specificity", type=click.FloatRange(0, 1), help="Share of good answers that the judge calls good."
)
@click.option(
    "--labels", type=click.IntRange(min=20), default=400, show_default=True, help="Number of answers people labelled."
)
@click.option(
    "--labelled",
    type=click.Choice(list(DRAWINGS)),
    default="random",
    show_default=True,
    help="Labels: of the baseline at random, by the judge's words, or of both runs by its words.",
)
@click.option("--power/--no-power", default=True, show_default=True, help="Also measure harms of 1, 2 and 5 points.")
@json_option("the result")
def main(
    name: str,
    profile: str | None,
    pairs: int | None,
    questions: int | None,
    churn: float | None,
    image_share: float,
    decodings: int,
    runs: int,
    draws: int,
    seed: int,
    power: bool,
    judge_sensitivity: float | None,
    judge_specificity: float | None,
    labels: int,
    labelled: Drawing,
    as_json: bool,
) -> None:
    """Measure how often the verdict of benchmarks.regress is wrong, and what it can see."""
    from rich.console import Console
    from rich.progress import Progress

    base = PROFILES[profile or ("safellava" if name == "holisafe" else "tiny")]
    if churn is not None:
        base = replace(base, churn=churn)
    suite = build(name, base, pairs=pairs, questions=questions, image_share=image_share, seed=seed)
    if judge_sensitivity is not None or judge_specificity is not None:
        if judge_sensitivity is None or judge_specificity is None:
            raise InputError("give --judge-sensitivity and --judge-specificity together.")
        judge = JudgeError(sensitivity=judge_sensitivity, specificity=judge_specificity)
        _tell_judged(suite, judge, labels, labelled, runs=runs, seed=seed, draws=draws, as_json=as_json)
        return
    suite = enlarged(suite, Effort(decodings=decodings))
    points = POINTS if power else ()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=runs * (1 + len(suite.keys) * (1 + len(points))))

        def advance(done: int) -> None:
            progress.update(task, advance=done)

        found = measure_errors(suite, runs=runs, seed=seed, draws=draws, points=points, advance=advance)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(summary(suite, found, runs))


def _tell_judged(
    suite: Suite, judge: JudgeError, labels: int, drawing: Drawing, *, runs: int, seed: int, draws: int, as_json: bool
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=2 * runs * len(judged_lines(suite)))
        found = measure_judged(
            suite,
            judge,
            labels=labels,
            drawing=drawing,
            runs=runs,
            seed=seed,
            draws=draws,
            report=lambda done: progress.update(task, advance=done),
        )
    if as_json:
        click.echo(json.dumps({key: {at: asdict(told) for at, told in own.items()} for key, own in found.items()}))
        return
    click.echo(judged_summary(found, labels, drawing))


if __name__ == "__main__":
    run(main)
