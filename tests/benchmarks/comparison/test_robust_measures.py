"""Whether a candidate's guard is less robust is a line for each corruption, paired by image."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.comparison.comparing import compare
from benchmarks.comparison.findings import Findings, Line
from benchmarks.comparison.margins import Margins
from benchmarks.comparison.measured import Comparison, measure
from benchmarks.runs.record import Row
from tests.benchmarks.runs.sample_runs import changed, probabilities, record_of, stored

UNDER = ("jpeg:50", "blur:1.5")
EACH = 120
SUITE = "guard+jpeg:50+blur:1.5"


def rows() -> list[Row]:
    """Return images that a perfect guard judges as they are and under each corruption, half of them unsafe."""
    images = [
        Row(id=f"{n}.png", kind="image", image=f"{n}.png", label=n % 2, probs=probabilities(n % 2))
        for n in range(2 * EACH)
    ]
    under = [row.model_copy(update={"id": f"{row.id}+{name}", "under": name}) for name in UNDER for row in images]
    return [*images, *under]


def comparison(folder: Path, after: list[Row], **margins: object) -> Comparison:
    sides = [
        stored(folder / name, given, record_of(given, suite=SUITE, name=name, digest=name[0] * 64))
        for name, given in (("fp32", rows()), ("int8", after))
    ]
    return Comparison(baseline=sides[:1], candidate=sides[1:], margins=Margins.model_validate(margins))


def line(findings: Findings, key: str) -> Line:
    return next(each for each in findings.lines if each.key == key)


def lost(count: int, under: str | None) -> list[Row]:
    """Return the rows with so many unsafe images no longer blocked under a corruption."""
    names = {f"{2 * n + 1}.png" for n in range(count)}
    return changed(rows(), lambda row: row.image in names and row.under == under, probs=probabilities(0))


def test_a_corruption_s_losses_stand_in_its_own_line_and_decide_nothing_without_a_margin(tmp_path: Path) -> None:
    found = compare(comparison(tmp_path, lost(18, "blur:1.5"), guard_recall=4.0, guard_fpr=4.0))
    assert (line(found, "guard/recall/blur:1.5").worse, line(found, "guard/recall/jpeg:50").worse) == (18, 0)
    assert line(found, "guard/recall").worse == 0 and line(found, "guard/recall").n == EACH, "each image once, as it is"
    assert line(found, "guard/fpr/blur:1.5").worse == 0
    assert line(found, "guard/recall/blur:1.5").after == pytest.approx(1 - 18 / EACH)
    mean = line(found, "guard/robust_recall")
    assert mean.change == pytest.approx(-9 / EACH) and mean.clusters == EACH
    assert mean.interval is not None and mean.interval[1] < 0, "less robust, by more than chance"
    assert found.verdict == "PASS"
    assert all(each.margin is None for each in found.lines if "/recall/" in each.key or "robust" in each.key)


def test_with_a_margin_a_loss_under_one_corruption_is_a_regression(tmp_path: Path) -> None:
    found = compare(comparison(tmp_path, lost(18, "blur:1.5"), robust_recall=4.0, guard_recall=4.0, guard_fpr=4.0))
    assert found.verdict == "REGRESSION"
    assert line(found, "guard/recall/jpeg:50").verdict == "PASS"
    assert any("guard recall under blur:1.5" in reason for reason in found.reasons)


def test_rows_without_probabilities_are_counted_for_their_corruption(tmp_path: Path) -> None:
    after = changed(rows(), lambda row: row.under == "jpeg:50", probs=None, error="the guard failed")
    asked = comparison(tmp_path, after)
    found = measure(asked.baseline, asked.candidate, asked)
    missing = {each.what: each.after for each in found.unscored}
    assert missing["images by the guard under jpeg:50"] == 2 * EACH
    assert missing["images by the guard under blur:1.5"] == missing["images by the guard"] == 0


def test_rows_of_another_corruption_are_not_paired(tmp_path: Path) -> None:
    asked = comparison(tmp_path, changed(rows(), lambda row: row.under == "jpeg:50", under="jpeg:51"))
    assert any(": under " in each for each in measure(asked.baseline, asked.candidate, asked).anomalies)


def test_a_declared_margin_without_corrupted_images_is_an_anomaly(tmp_path: Path) -> None:
    plain = [row for row in rows() if row.under is None]
    run = stored(tmp_path / "run", plain, record_of(plain, suite="guard"))
    asked = Comparison(baseline=[run], candidate=[run], margins=Margins(robust_recall=2.0))
    assert any("robust_recall" in each for each in measure([run], [run], asked).anomalies)
    assert not any(
        "robust_recall" in each for each in measure([run], [run], Comparison(baseline=[run], candidate=[run])).anomalies
    )


def test_what_only_the_candidate_did_not_judge_under_a_corruption_counts_as_missed_in_a_bound(tmp_path: Path) -> None:
    gone = {f"{2 * n + 1}.png" for n in range(12)}
    after = changed(rows(), lambda row: row.image in gone and row.under == "jpeg:50", probs=None, error="timed out")
    margins = {"robust_recall": 4.0, "guard_recall": 4.0, "guard_fpr": 4.0, "max_unscored": 100.0}
    own = line(compare(comparison(tmp_path, after, **margins)), "guard/recall/jpeg:50")
    assert own.missing_after == 12 and own.worse == 0
    assert {each.name: each.upper for each in own.bounds}["missing rows"] > 12 / EACH and own.verdict != "PASS"
