"""Several sampled decodings of one suite on either side: which belong together.

A greedy answer is one draw of what a model might say after the slightest change. Sampled at a temperature, several
times under other seeds, its chance of a bad answer is measured instead, and less of what is compared is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from benchmarks.runs.record import Run
from safevlm.errors import InputError

__all__ = ["check_numbers", "decodings_of", "runs_by_suite"]


def runs_by_suite(runs: Sequence[Run], side: str) -> dict[str, list[Run]]:
    """Return a side's runs by suite, several decodings of one in the order of their seeds.

    Raises InputError when the side is empty, and when two runs of a suite are not sampled under two seeds.
    """
    if not runs:
        raise InputError(f"the {side} run is missing. Give --{side} a run record.")
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.record.suite.name, []).append(run)
    for name, own in found.items():
        if len(own) > 1:
            found[name] = _sampled(own, name, side)
    return found


def decodings_of(runs: Sequence[Run], suite: str) -> list[Run]:
    """Return a side's runs of one suite, in the order of their seeds."""
    own = [run for run in runs if run.record.suite.name == suite]
    return own if len(own) == 1 else sorted(own, key=lambda run: run.record.seed or 0)


def check_numbers(before: Sequence[Run], after: Sequence[Run], name: str) -> None:
    """Raise InputError where one side has more decodings of a suite than the other."""
    if len(before) != len(after):
        raise InputError(
            f"suite {name} has {len(before)} runs in the baseline and {len(after)} in the candidate. Give both sides "
            "the same number of sampled decodings."
        )


def _sampled(runs: Sequence[Run], name: str, side: str) -> list[Run]:
    greedy = [run for run in runs if run.record.seed is None]
    if greedy:
        raise InputError(
            f"{side}: {runs[0].folder} and {runs[1].folder} are both runs of suite {name}, and {greedy[0].folder} does "
            "not state a decoding seed. Give only one, or runs of benchmarks.run --temperature T with one --seed each."
        )
    ordered = sorted(runs, key=lambda run: run.record.seed or 0)
    for one, other in pairwise(ordered):
        if one.record.seed == other.record.seed:
            raise InputError(
                f"{side}: {one.folder} and {other.folder} have the same decoding seed {one.record.seed}, so they are "
                "not two decodings. Run one of them again with another --seed."
            )
    return ordered
