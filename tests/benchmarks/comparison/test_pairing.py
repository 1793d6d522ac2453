from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.comparison.pairing import changed_part, pair_runs
from benchmarks.runs.record import Run
from safevlm.errors import InputError
from tests.benchmarks.runs.sample_runs import changed, pair_rows, question_rows, record_of, stored


def runs(folder: Path) -> tuple[Run, Run]:
    rows = pair_rows(5)
    one = stored(folder / "a", rows, record_of(rows))
    other = stored(folder / "b", rows[::-1], record_of(rows, name="model-b", digest="b" * 64))
    return one, other


def test_the_same_samples_are_paired_whatever_their_order(tmp_path: Path) -> None:
    one, other = runs(tmp_path)
    pairing = pair_runs([one], [other])
    assert pairing.anomalies == ()
    assert len(pairing.pairs) == len(one.rows)
    assert all(pair.before.id == pair.after.id for pair in pairing.pairs)
    again = pair_runs([one], [Run(folder=other.folder, record=other.record, rows=other.rows[::-1])])
    assert [pair.key for pair in pairing.pairs] == [pair.key for pair in again.pairs]


def test_what_may_differ_and_what_may_not(tmp_path: Path) -> None:
    one, other = runs(tmp_path)
    for change, told in [
        ({"prompt": "Q: {question}"}, r"differ in prompt: .*USER.* against .*Q:"),
        ({"preprocessing": {"height": 96}}, "differ in preprocessing: height 84 against 96"),
        ({"decoding": None}, "differ in decoding: .* against not stated"),
        ({"suite": other.record.suite.model_copy(update={"sha256": "1" * 64})}, "differ in suite: sha256"),
        ({"runtime": other.record.runtime.model_copy(update={"name": "llama.cpp"})}, None),
        ({"machine": "another"}, None),
    ]:
        moved = Run(folder=other.folder, record=other.record.model_copy(update=change), rows=other.rows)
        anomalies = pair_runs([one], [moved]).anomalies
        if told is None:
            assert anomalies == ()
        else:
            with pytest.raises(AssertionError, match=told):
                assert not anomalies, anomalies[0]
    moved = Run(folder=other.folder, record=other.record.model_copy(update={"preprocessing": {}}), rows=other.rows)
    assert pair_runs([one], [moved], free=("preprocessing",)).anomalies == ()


def test_guards_that_judged_large_images_otherwise_are_no_fair_pair(tmp_path: Path) -> None:
    one, other = runs(tmp_path)

    def side(run: Run, kind: str, view: str | None) -> Run:
        artifact = run.record.artifact.model_copy(update={"kind": kind})
        return Run(
            folder=run.folder, record=run.record.model_copy(update={"artifact": artifact, "view": view}), rows=run.rows
        )

    for before, after, told in (
        (("gated", "whole"), ("gated", "tiles"), "differ in view: whole and tiles"),
        (("bundle", None), ("bundle", "tiles"), "differ in view: whole and tiles"),  # from before there were tiles
        (("gated", None), ("gated", "whole"), None),
        (("checkpoint", None), ("gated", "tiles"), None),  # a whole model has no view of its own
    ):
        pair = side(one, *before), side(other, *after)
        anomalies = pair_runs([pair[0]], [pair[1]]).anomalies
        assert bool(anomalies) == (told is not None) and (told is None or told in anomalies[0])
        assert pair_runs([pair[0]], [pair[1]], free=("view",)).anomalies == ()
        assert ("view" in changed_part(pair[0].record, pair[1].record)) == (told is not None)


def test_missing_rows_and_another_question_are_anomalies(tmp_path: Path) -> None:
    one, other = runs(tmp_path)
    short = Run(folder=other.folder, record=other.record, rows=other.rows[3:])
    pairing = pair_runs([one], [short])
    assert len(pairing.pairs) == len(one.rows) - 3
    assert any("22 of 25 rows and lacks rows" in told for told in pairing.anomalies)
    assert any("3 rows are in only one of the runs" in told for told in pairing.anomalies)
    unfinished = Run(folder=short.folder, record=short.record.model_copy(update={"finished": None}), rows=short.rows)
    assert any("run it again with --resume" in told for told in pair_runs([one], [unfinished]).anomalies)
    asked = changed(other.rows, lambda row: row.id == "USU-1", query="something else")
    anomalies = pair_runs([one], [Run(folder=other.folder, record=other.record, rows=tuple(asked))]).anomalies
    assert anomalies == (
        'holisafe: 1 samples differ between the runs, such as USU-1: query "question 1" against "something else"',
    )


def test_a_leaked_calibration_set_and_a_suite_on_one_side_are_anomalies(tmp_path: Path) -> None:
    one, other = runs(tmp_path)
    artifact = other.record.artifact.model_copy(update={"leaked": True})
    leaked = Run(folder=other.folder, record=other.record.model_copy(update={"artifact": artifact}), rows=other.rows)
    assert pair_runs([one], [leaked]).anomalies == (
        "holisafe: the candidate (model-b) was calibrated on samples of an evaluation suite",
    )
    questions = question_rows(4)
    extra = stored(tmp_path / "c", questions, record_of(questions, suite="mmstar"))
    assert pair_runs([one, extra], [other]).anomalies == ("suite mmstar was run on only one side",)
    with pytest.raises(InputError, match=r"are both runs of suite holisafe"):
        pair_runs([one, one], [other])
    with pytest.raises(InputError, match="the candidate run is missing"):
        pair_runs([one], [])


def test_random_weights_on_either_side_are_anomalies(tmp_path: Path) -> None:
    one, other = runs(tmp_path)
    artifact = other.record.artifact.model_copy(update={"random_weights": True})
    noise = Run(folder=other.folder, record=other.record.model_copy(update={"artifact": artifact}), rows=other.rows)
    told = "(model-b) has random weights, so its answers mean nothing"
    assert pair_runs([one], [noise]).anomalies == (f"holisafe: the candidate {told}",)
    assert pair_runs([noise], [one]).anomalies == (f"holisafe: the baseline {told}",)


def test_what_changed_is_named(tmp_path: Path) -> None:
    one, other = (run.record for run in runs(tmp_path))
    engine = one.model_copy(update={"runtime": one.runtime.model_copy(update={"name": "llama.cpp"})})
    cpu, gpu = (
        one.model_copy(update={"runtime": one.runtime.model_copy(update={"provider": f"{name}ExecutionProvider"})})
        for name in ("CPU", "CUDA")
    )
    assert changed_part(cpu, gpu) == "engine"
    assert changed_part(one, gpu) == "noise (the same again)", "the older record states no provider"
    assert changed_part(one, other) == "compression"
    assert changed_part(one, engine) == "engine"
    assert changed_part(engine, other) == "compression and engine"
    assert changed_part(one, one.model_copy(update={"preprocessing": {}})) == "preprocessing"
    assert changed_part(one, one) == "noise (the same again)"
