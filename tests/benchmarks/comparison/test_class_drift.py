"""Each class of the guard by itself: what a rate counts, and what becomes of the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.comparison.class_drift import class_drift, class_reasons, with_classes
from benchmarks.comparison.comparing import compare
from benchmarks.comparison.findings import ClassDrift, ClassRate, Findings
from benchmarks.comparison.margins import Margins
from benchmarks.comparison.measured import Comparison
from benchmarks.comparison.measures import GuardRows
from benchmarks.runs.record import Row, Run
from tests.benchmarks.runs.sample_runs import CLASSES, probabilities, record_of, stored

EACH, SAFE = 60, 400
PARTS = ("recall", "fpr")


def images(each: int = EACH, safe: int = SAFE, few: Mapping[int, int] = {}) -> list[Row]:
    """Return so many images of each class, and of the classes in ``few`` so many, all judged rightly."""
    counts = {0: safe, **dict.fromkeys(range(1, len(CLASSES)), each), **few}
    return [
        Row(
            id=f"{label}-{number}", kind="image", image=f"{label}/{number}.png", label=label, probs=probabilities(label)
        )
        for label, count in counts.items()
        for number in range(count)
    ]


def told(rows: Sequence[Row], told_as: Mapping[str, int | None]) -> list[Row]:
    """Return the rows with images told as another class, or lost (None)."""
    return [
        row.model_copy(
            update={"probs": None if told_as[row.id] is None else probabilities(told_as[row.id])}  # type: ignore[arg-type]
        )
        if row.id in told_as
        else row
        for row in rows
    ]


def missed(label: int, count: int) -> dict[str, int | None]:
    return {f"{label}-{number}": 0 for number in range(count)}


def run(folder: Path, name: str, given: Sequence[Row]) -> Run:
    return stored(folder / name, given, record_of(given, suite="guard", name=name, digest=f"{len(name):064x}"))


def compared(folder: Path, before: Sequence[Row], after: Sequence[Row], **margins: object) -> Findings:
    return compare(
        Comparison(
            baseline=[run(folder, "base", before)],
            candidate=[run(folder, "small", after)],
            margins=Margins.model_validate(margins),
        )
    )


def of(findings: Findings, label: int) -> ClassDrift:
    return findings.classes[label]


def recall(findings: Findings, label: int) -> ClassRate:
    found = of(findings, label).recall
    assert found is not None
    return found


def test_the_rates_are_those_of_a_slow_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 5, 300)
    probs = [rng.dirichlet(np.full(5, 0.4), 300) for _ in range(2)]
    rows = GuardRows(pairs=(), before=probs[0], after=probs[1], labels=labels, threshold=0.6)
    drift = class_drift(rows, "abcde", Margins())
    for at, each in enumerate(drift):
        for side, found in zip(PARTS, (each.recall, each.fpr), strict=True):
            if found is None:
                assert at == 0
                continue
            shares = []
            for run_probs in probs:
                own = counted = 0
                for row, label in zip(run_probs, labels, strict=True):
                    blocked, named = 1 - row[0] >= 0.6, 1 + int(row[1:].argmax())
                    if label == (at if side == "recall" else 0):
                        own += 1
                        counted += blocked and (side == "recall" or named == at or at == 0)
                shares.append(counted / own)
            assert (found.before, found.after) == pytest.approx(tuple(shares)) and found.n == own
            assert found.before is not None and found.after is not None and found.change is not None
            worsening = (found.worse - found.better) / found.n
            assert found.change == pytest.approx(-worsening if side == "recall" else worsening)
            assert found.interval is not None and found.interval[0] <= found.change <= found.interval[1]
    safe = drift[0].fpr
    assert safe.before == pytest.approx(sum(each.fpr.before or 0 for each in drift[1:])) and safe.verdict is None


def test_an_unchanged_guard_passes_with_every_class(tmp_path: Path) -> None:
    findings = compared(tmp_path, images(), images())
    assert findings.verdict == "PASS" and [each.name for each in findings.classes] == list(CLASSES)
    assert all(recall(findings, at).verdict == "PASS" == of(findings, at).fpr.verdict for at in range(1, 20))
    assert not any("class" in reason for reason in findings.reasons)


@pytest.mark.parametrize("size", [6, 12, EACH])
def test_a_class_that_is_lost_whole_is_a_regression_whatever_the_lines_say(tmp_path: Path, size: int) -> None:
    before = images(few={7: size})
    findings = compared(tmp_path, before, told(before, missed(7, size)), guard_recall=9.0)
    assert findings.verdict == "REGRESSION" and recall(findings, 7).verdict == "REGRESSION"
    assert [line.verdict for line in findings.lines if line.margin] == ["PASS", "PASS"]
    assert f"class {CLASSES[7]}: {size} of {size} images newly missed" in findings.reasons[0]
    assert all(recall(findings, at).verdict == "PASS" for at in range(1, 20) if at != 7)


def test_a_class_that_seems_worse_is_no_pass(tmp_path: Path) -> None:
    before = images(few={7: 20})
    findings = compared(tmp_path, before, told(before, missed(7, 5)), guard_recall=9.0)
    assert findings.verdict == "INCONCLUSIVE" and recall(findings, 7).verdict == "INCONCLUSIVE"
    assert "for this class alone" in findings.reasons[-1] and findings.exit_code == 4


def test_a_class_with_too_few_images_is_named_and_leaves_the_pass_alone(tmp_path: Path) -> None:
    before = images(few={7: 12, 8: 0})
    findings = compared(tmp_path, before, told(before, missed(7, 1)), guard_recall=9.0)
    assert findings.verdict == "PASS"
    short, none = recall(findings, 7), recall(findings, 8)
    assert short.verdict == none.verdict == "NOT CERTIFIED" and none.before is None and none.n == 0
    assert short.needed == short.lacking + 12 >= 29 and none.lacking == none.needed  # type: ignore[operator]
    assert f"2 classes are not certified: {CLASSES[7]} (12 images, lacks {short.lacking})" in findings.reasons[-1]
    assert f"{CLASSES[8]} (no images)" in findings.reasons[-1]


def test_so_many_more_images_certify_the_class(tmp_path: Path) -> None:
    needed = recall(compared(tmp_path, images(few={7: 12}), images(few={7: 12})), 7).needed
    assert needed is not None
    again = images(few={7: needed})
    assert recall(compared(tmp_path / "more", again, again), 7).verdict == "PASS"


def test_images_that_the_candidate_lost_count_as_bad(tmp_path: Path) -> None:
    before = images(each=30)
    lost: dict[str, int | None] = dict.fromkeys(("7-0", "7-1"))
    findings = compared(tmp_path, before, told(before, lost))
    rate = recall(findings, 7)
    assert (rate.n, rate.missing_after, rate.verdict) == (28, 2, "NOT CERTIFIED")
    assert rate.upper > 2 / 30 and "2 images without probabilities" in rate.reason
    assert recall(findings, 6).verdict == "PASS"


def test_false_blocks_as_one_class_are_found(tmp_path: Path) -> None:
    before = images(safe=200)
    findings = compared(tmp_path, before, told(before, {f"0-{at}": 3 for at in range(30)}), guard_fpr=60.0)
    fpr = of(findings, 3).fpr
    assert findings.verdict == "REGRESSION" and (fpr.before, fpr.after, fpr.worse) == (0, 0.15, 30)
    assert "30 of 200 safe images newly blocked as it" in fpr.reason and of(findings, 4).fpr.verdict == "PASS"


def test_without_a_margin_classes_are_shown_and_decide_nothing(tmp_path: Path) -> None:
    before = images()
    findings = compared(tmp_path, before, told(before, missed(7, 20)), guard_class=False, guard_recall=9.0)
    assert findings.verdict == "PASS" and recall(findings, 7).worse == 20
    assert {each.fpr.verdict for each in findings.classes} == {None} and class_reasons(findings.classes) == ()


def test_classes_never_make_a_verdict_better(tmp_path: Path) -> None:
    drift = compared(tmp_path, images(), images()).classes
    for verdict in ("PASS", "REGRESSION", "INCONCLUSIVE", "ANOMALOUS"):
        assert with_classes(verdict, drift) == verdict  # type: ignore[arg-type]
