"""What a suite can prove, before any candidate runs: ``python -m benchmarks.plan --baseline RUN --rerun RUN``.

How often an unchanged model would be told PASS, which harm would be seen, what more rows or sampled decodings would
buy, and the cheapest plan that passes an unchanged model often enough. Churn is measured between a baseline and its
rerun, or declared. ``benchmarks/STATISTICS.md`` says how.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.comparison.expected import declared_suite, measured_suite
from benchmarks.comparison.margins import Margins, read_margins
from benchmarks.runs.record import read_run
from benchmarks.simulate import PROFILES, SUITES, build, image_share_option
from benchmarks.statistics.power import KINDS, Effort, Outlook, Plan, kind_of, look_ahead, propose
from benchmarks.statistics.simulation import Suite
from safevlm.errors import InputError
from safevlm.terminal.commandline import printable, run
from safevlm.terminal.options import json_option

__all__ = ["EFFORTS", "main"]

FOLDER = click.Path(path_type=Path, file_okay=False)
SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)
GUARD_CHURN, QUESTION_CHURN = 0.012, 0.08
EFFORTS: Sequence[Effort] = (
    Effort(pairs=2),
    Effort(guard=2),
    Effort(questions=2),
    Effort(guard=2, questions=2),
    Effort(pairs=2, guard=2, questions=2),
    Effort(decodings=2),
    Effort(decodings=3),
    Effort(decodings=5),
    Effort(guard=2, decodings=3),
)
"""What the table of options shows."""
_NAMES: Mapping[str, str] = {"pairs": "pairs", "guard": "guard images", "questions": "questions"}


@click.command()
@click.option("--baseline", type=FOLDER, multiple=True, help="Run record of the baseline, one per suite; repeatable.")
@click.option(
    "--rerun", type=FOLDER, multiple=True, help="Second run of the same artifact, to measure churn; repeatable."
)
@click.option("--suite", "name", type=click.Choice(list(SUITES)), help="Suite to plan for without --baseline.")
@click.option("--profile", type=click.Choice(list(PROFILES)), help="Rates of a baseline without --baseline.")
@click.option("--judge", help="Judge: string, exact, or a name that benchmarks.judge stored.  [default: the suite's]")
@click.option("--churn", type=SHARE, help="Share of unsafe pairs whose outcome changes between equal runs.")
@click.option("--guard-churn", type=SHARE, help=f"Share of guard images that change.  [default: {GUARD_CHURN}]")
@click.option("--question-churn", type=SHARE, help=f"Share of questions that change.  [default: {QUESTION_CHURN}]")
@click.option("--margins", type=click.Path(path_type=Path), help="TOML or JSON file of margins, in points.")
@click.option(
    "--target",
    type=SHARE,
    default=0.9,
    show_default=True,
    help="Probability of PASS that an unchanged model shall have.",
)
@click.option(
    "--max-decodings",
    type=click.IntRange(1, 20),
    default=5,
    show_default=True,
    help="Maximum number of sampled decodings per run in the plan.",
)
@image_share_option
@click.option(
    "--runs", type=click.IntRange(min=50), default=1000, show_default=True, help="Number of simulated comparisons."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed.")
@json_option("the plan")
def main(
    margins: Path | None,
    target: float,
    max_decodings: int,
    runs: int,
    seed: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Say what a suite can prove before a candidate is run, and what would be enough."""
    from rich.console import Console

    limits = Margins() if margins is None else read_margins(margins)
    suite = _suite(limits, **given)

    def simulated(wanted: Suite) -> Outlook:
        return look_ahead(
            wanted, runs=runs, confidence=limits.confidence, harm_level=limits.harm_level, seed=seed, draws=1000
        )

    with Console(stderr=True).status("simulating"):
        now = simulated(suite)
        plan = propose(now, simulated, target=target, most_decodings=max_decodings)
    if as_json:
        click.echo(json.dumps(_document(now, plan, limits, target), indent=1, allow_nan=False))
        return
    click.echo(printable("\n".join([*_now(now, limits), "", *_options(now), "", *_plan(plan, target)])))


def _suite(
    margins: Margins,
    *,
    baseline: Sequence[Path],
    rerun: Sequence[Path],
    name: str | None,
    profile: str | None,
    judge: str | None,
    churn: float | None,
    guard_churn: float | None,
    question_churn: float | None,
    image_share: float,
) -> Suite:
    """Return the suite that the options ask for. Raises InputError for options that contradict each other."""
    if baseline and (name or profile):
        raise InputError("--baseline has its own suites and rates. Leave out --suite and --profile.")
    if not baseline:
        if rerun or judge:
            raise InputError("--rerun and --judge need --baseline, whose rows they are about.")
        base = PROFILES[profile or ("tiny" if name == "holisafe-mini" else "safellava")]
        base = replace(
            base,
            churn=churn or base.churn,
            guard_churn=guard_churn or base.guard_churn,
            wrong_churn=question_churn or base.wrong_churn,
        )
        return build(name or "holisafe", base, image_share=image_share, margins=margins)
    runs = [read_run(folder) for folder in baseline]
    if rerun:
        if guard_churn is not None or question_churn is not None:
            raise InputError("--guard-churn and --question-churn are measured where --rerun is given. Leave them out.")
        again = [read_run(folder) for folder in rerun]
        return measured_suite(runs, again, judge=judge, margins=margins, churn=churn, image_share=image_share)
    if churn is None:
        raise InputError("how much changes between equal runs is not known. Give --rerun, or declare --churn.")
    shares = churn, guard_churn or GUARD_CHURN, question_churn or QUESTION_CHURN
    return declared_suite(runs, shares, judge=judge, margins=margins, image_share=image_share)


def _now(now: Outlook, margins: Margins) -> list[str]:
    lines = [
        f"An unchanged model, {now.comparisons:,} simulated comparisons; PASS needs a one-sided bound of "
        f"{100 * margins.confidence:g} % below every margin.",
        f"{'':28}{'samples':>9}{'margin':>8}{'churn':>9}{'P(PASS)':>9}{'harm seen':>11}",
    ]
    lines += [
        f"{line.key[:27]:28}{line.n:>9,}{100 * line.margin:>8g}{100 * line.churn:>8.1f}%{100 * line.passes:>8.1f}%"
        f"{100 * line.harm:>11.1f}"
        for line in now.lines
    ]
    lines.append(f"{'overall':28}{'':>26}{100 * now.passes:>8.1f}%")
    lines.append("Harm seen: the worsening, in points, that is a REGRESSION with 80 % probability.")
    if now.regressions:
        lines.append(f"REGRESSION is reported of an unchanged model in {100 * now.regressions:.1f} % of comparisons.")
    return lines


def _options(now: Outlook) -> list[str]:
    rows = [f"{'what more would buy (predicted)':46}{'P(PASS)':>9}"]
    return rows + [f"{_said(each):46}{100 * now.predicted(each):>8.1f}%" for each in _possible(now)]


def _plan(plan: Plan, target: float) -> list[str]:
    share = f"{100 * plan.outlook.passes:.1f} %"
    if plan.effort == Effort():
        return [f"plan: the suite as it is. P(PASS) of an unchanged model is {share}."]
    if not plan.reached:
        return [
            f"no plan within these limits reaches {100 * target:g} %. The best is {_said(plan.effort)}: {share}.",
            "Declare wider margins, or allow more with --max-decodings.",
        ]
    lines = [f"plan: {_said(plan.effort)}. P(PASS) of an unchanged model, simulated: {share}."]
    if plan.effort.decodings > 1:
        lines.append(
            f"  Run each suite {plan.effort.decodings} times a side with benchmarks.run --temperature T --seed N, the "
            "temperature at which the churn holds, and give benchmarks.regress all of them."
        )
    grown = [line for line in plan.outlook.lines if getattr(plan.effort, kind_of(line.key)) > 1 and line.key != "masr"]
    lines += [f"  {line.key}: {line.n:,} samples" for line in grown]
    if grown:
        lines.append("  The built-in suites grow with benchmarks.run --pairs N --questions N.")
    return lines


def _possible(now: Outlook) -> list[Effort]:
    """Return the efforts of the table about what the suite has."""
    there = {kind_of(line.key) for line in now.lines}
    return [each for each in EFFORTS if all(getattr(each, kind) == 1 or kind in there for kind in KINDS)]


def _said(effort: Effort) -> str:
    parts = [f"{getattr(effort, kind):g} x {_NAMES[kind]}" for kind in KINDS if getattr(effort, kind) != 1]
    parts += [f"{effort.decodings} sampled decodings"] if effort.decodings > 1 else []
    return ", ".join(parts) or "as it is"


def _document(now: Outlook, plan: Plan, margins: Margins, target: float) -> dict[str, Any]:
    def told(outlook: Outlook) -> dict[str, Any]:
        lines = [asdict(line) for line in outlook.lines]
        return {"pass": outlook.passes, "regression": outlook.regressions, "lines": lines}

    return {
        "schema_version": 1,
        "confidence": margins.confidence,
        "harm_level": margins.harm_level,
        "comparisons": now.comparisons,
        "target": target,
        "now": told(now),
        "options": [{**asdict(each), "predicted_pass": now.predicted(each)} for each in _possible(now)],
        "plan": {**asdict(plan.effort), "reached": plan.reached, **told(plan.outlook)},
    }


if __name__ == "__main__":
    run(main)
