"""Sampled decodings: they average noise away and change nothing else, and what is no set of them is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.comparison.comparing import compare
from benchmarks.comparison.findings import Findings, Line
from benchmarks.comparison.measured import Comparison
from benchmarks.runs.record import Row, Run
from safevlm.errors import InputError
from tests.benchmarks.runs.sample_runs import HELP, changed, pair_rows, question_rows, record_of, stored

EACH = 60
ROWS = [*pair_rows(EACH, EACH), *question_rows(40)]
SAMPLED = {"sampling": "temperature", "temperature": 0.7, "max_new_tokens": 32}


def sampled(folder: Path, seed: int | None, rows: Sequence[Row], *, name: str = "a", **values: object) -> Run:
    decoding = dict(SAMPLED) if seed is None else {**SAMPLED, "seed": seed}
    record = record_of(rows, name=name, digest=f"{len(name):064x}")
    return stored(folder, rows, record.model_copy(update={"decoding": decoding, **values}))


def noisy(seed: int, share: float = 0.2) -> list[Row]:
    """Return rows of which each unsafe pair is answered with this chance."""
    chosen = np.random.default_rng(seed).random(len(ROWS)) < share
    lost = {row.id for row, each in zip(ROWS, chosen, strict=True) if each and row.type != "SSS"}
    return changed(ROWS, lambda row: row.id in lost and row.kind == "pair", answer=HELP)


def side(folder: Path, name: str, seeds: Sequence[int]) -> list[Run]:
    return [sampled(folder / f"{name}-{seed}", seed, noisy(seed), name=name) for seed in seeds]


def line(findings: Findings, key: str) -> Line:
    return next(each for each in findings.lines if each.key == key)


def test_badness_is_averaged_for_each_sample_whatever_the_order_of_the_runs(tmp_path: Path) -> None:
    before, after = side(tmp_path, "a", [1, 2, 3]), side(tmp_path, "bb", [4, 5, 6])
    findings = compare(Comparison(baseline=before, candidate=after))
    assert findings.anomalies == ()
    for key, kind in (("asr/SSU", "SSU"), ("asr/USU", "USU")):
        found = line(findings, key)
        shares = [
            np.mean([row.answer == HELP for run in runs for row in run.rows if row.type == kind])
            for runs in (before, after)
        ]
        assert (found.before, found.after) == pytest.approx(shares)
        assert found.n == found.clusters == EACH  # three answers a sample are one sample
    assert line(findings, "guard/recall").n == EACH
    assert line(findings, "utility/holisafe").n == 40
    again = compare(Comparison(baseline=before[::-1], candidate=[after[1], after[2], after[0]]))
    assert again.lines == findings.lines and again.flips == findings.flips
    flips = [(flip.judge, flip.id) for flip in findings.flips]
    assert len(set(flips)) == len(flips)


def test_more_decodings_bring_bounds_nearer(tmp_path: Path) -> None:
    before, after = side(tmp_path, "a", range(1, 6)), side(tmp_path, "bb", range(11, 16))
    reach = []
    for count in (1, 5):
        found = line(compare(Comparison(baseline=before[:count], candidate=after[:count])), "masr")
        reach.append(max(bound.upper for bound in found.bounds) - found.change)
    assert reach[1] < 0.6 * reach[0]  # the root of a fifth is 0.45


def test_one_sampled_run_a_side_is_compared_as_it_is(tmp_path: Path) -> None:
    one, other = sampled(tmp_path / "a", 1, ROWS), sampled(tmp_path / "b", 2, ROWS, name="bb")
    assert compare(Comparison(baseline=[one], candidate=[other])).anomalies == ()
    greedy = stored(tmp_path / "g", ROWS, record_of(ROWS, name="bb"))
    assert "differ in decoding" in compare(Comparison(baseline=[one], candidate=[greedy])).anomalies[0]


def test_what_is_no_set_of_decodings_is_refused(tmp_path: Path) -> None:
    before, after = side(tmp_path, "a", [1, 2]), side(tmp_path, "bb", [3, 4, 5])
    with pytest.raises(InputError, match="2 runs in the baseline and 3 in the candidate"):
        compare(Comparison(baseline=before, candidate=after))
    with pytest.raises(InputError, match="same decoding seed 1"):
        compare(Comparison(baseline=[before[0], before[0]], candidate=after[:2]))
    greedy = [stored(tmp_path / name, ROWS, record_of(ROWS)) for name in ("x", "y")]
    with pytest.raises(InputError, match=r"both runs of suite holisafe.*does not state a decoding seed"):
        compare(Comparison(baseline=greedy, candidate=after[:2]))
    pretended = {"sampling": "greedy", "max_new_tokens": 32}
    seeded = [
        sampled(tmp_path / f"z{seed}", seed, ROWS, decoding={**pretended, "seed": seed}) for seed in (1, 2)
    ]  # a seed does not make greedy decoding a draw
    with pytest.raises(InputError, match="does not state a decoding seed"):
        compare(Comparison(baseline=seeded, candidate=after[:2]))
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"id": "SSU-0", "ok": true}\n')
    with pytest.raises(InputError, match="these runs have several"):
        compare(Comparison(baseline=before, candidate=after[:2], labels=labels))


def test_decodings_of_different_things_are_an_anomaly(tmp_path: Path) -> None:
    before, after = side(tmp_path, "a", [1, 2]), side(tmp_path, "bb", [3])
    stranger = sampled(tmp_path / "c", 4, ROWS, name="ccc")
    hotter = sampled(tmp_path / "d", 4, ROWS, name="bb", decoding={**SAMPLED, "temperature": 1.0, "seed": 4})
    for odd in (stranger, hotter):
        findings = compare(Comparison(baseline=before, candidate=[*after, odd]))
        assert findings.verdict == "ANOMALOUS"
        assert any("decodings of the candidate are not of the same thing" in told for told in findings.anomalies)


def test_a_sample_that_lacks_a_decoding_is_left_out(tmp_path: Path) -> None:
    before, after = side(tmp_path, "a", [1, 2]), side(tmp_path, "bb", [3])
    failed = changed(noisy(4), lambda row: row.id == "SSU-7", answer=None, error="timed out")
    findings = compare(Comparison(baseline=before, candidate=[*after, sampled(tmp_path / "f", 4, failed, name="bb")]))
    assert line(findings, "asr/SSU").n == EACH - 1 and line(findings, "asr/USU").n == EACH


def test_a_baseline_s_decoding_among_the_candidate_s_is_a_run_compared_with_itself(tmp_path: Path) -> None:
    before = side(tmp_path, "a", [1, 2])
    findings = compare(Comparison(baseline=before, candidate=[before[0], sampled(tmp_path / "c", 3, noisy(3))]))
    assert findings.verdict == "ANOMALOUS" and "compared with itself" in findings.anomalies[0]
