"""Each class of the guard by itself: what a rate counts, and what becomes of the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.comparison.class_drift import class_drift, class_reasons, with_classes
from benchmarks.comparison.comparing import compare
from benchmarks.comparison.findings import ClassDrift, ClassRate
from benchmarks.comparison.margins import Margins
from benchmarks.comparison.measured import Comparison
from benchmarks.comparison.measures import GuardRows, guard_rows
from benchmarks.comparison.pairing import Pair
from benchmarks.regress import summary_lines
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


def drifted(before: Sequence[Row], after: Sequence[Row], **margins: object) -> tuple[ClassDrift, ...]:
    pairs = [Pair("guard", one, other) for one, other in zip(before, after, strict=True)]
    rows, _ = guard_rows(pairs, None)
    assert rows is not None
    return class_drift(rows, CLASSES, Margins.model_validate(margins))


def run(folder: Path, name: str, given: Sequence[Row]) -> Run:
    return stored(folder / name, given, record_of(given, suite="guard", name=name, digest=f"{len(name):064x}"))


def recall(drift: Sequence[ClassDrift], label: int) -> ClassRate:
    found = drift[label].recall
    assert found is not None
    return found


def test_the_rates_are_those_of_a_slow_count() -> None:
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


def test_an_unchanged_guard_passes_with_every_class() -> None:
    drift = drifted(images(), images())
    assert [each.name for each in drift] == list(CLASSES)
    assert all(recall(drift, at).verdict == "PASS" == drift[at].fpr.verdict for at in range(1, 20))
    assert with_classes("PASS", drift) == "PASS" and class_reasons(drift) == ()


@pytest.mark.parametrize("size", [6, 12, EACH])
def test_a_class_that_is_lost_whole_is_a_regression(size: int) -> None:
    before = images(few={7: size})
    drift = drifted(before, told(before, missed(7, size)))
    assert with_classes("PASS", drift) == "REGRESSION" == recall(drift, 7).verdict
    assert f"class {CLASSES[7]}: {size} of {size} images newly missed" in class_reasons(drift)[0]
    others = {recall(drift, at).verdict for at in range(1, 20) if at != 7}
    assert others <= {"PASS", "NOT CERTIFIED"}


def test_a_class_that_seems_worse_is_no_pass() -> None:
    before = images(few={7: 20})
    drift = drifted(before, told(before, missed(7, 5)))
    assert with_classes("PASS", drift) == "INCONCLUSIVE" == recall(drift, 7).verdict
    assert "for this class alone" in class_reasons(drift)[0]


def test_a_class_with_too_few_images_is_named_and_leaves_the_pass_alone() -> None:
    before = images(few={7: 12, 8: 0})
    drift = drifted(before, told(before, missed(7, 1)))
    short, none = recall(drift, 7), recall(drift, 8)
    assert short.verdict == none.verdict == "NOT CERTIFIED" and none.before is None and none.n == 0
    assert short.needed == short.lacking + 12 >= 29 and none.lacking == none.needed  # type: ignore[operator]
    (reason,) = class_reasons(drift)
    assert f"2 classes are not certified: {CLASSES[7]} (12 images, lacks {short.lacking})" in reason
    assert f"{CLASSES[8]} (no images)" in reason and with_classes("PASS", drift) == "PASS"


def test_so_many_more_images_certify_the_class() -> None:
    needed = recall(drifted(images(few={7: 12}), images(few={7: 12})), 7).needed
    assert needed is not None
    again = images(few={7: needed})
    assert recall(drifted(again, again), 7).verdict == "PASS"


def test_images_that_the_candidate_lost_count_as_bad() -> None:
    before = images(each=30)
    lost: dict[str, int | None] = dict.fromkeys(("7-0", "7-1"))
    drift = drifted(before, told(before, lost))
    rate = recall(drift, 7)
    assert (rate.n, rate.missing_after, rate.verdict) == (28, 2, "NOT CERTIFIED")
    assert rate.upper > 2 / 30 and "2 images have no probabilities in the candidate. They count as bad." in rate.reason
    assert recall(drift, 6).verdict == "PASS"


def test_false_blocks_as_one_class_are_found() -> None:
    before = images(safe=200)
    drift = drifted(before, told(before, {f"0-{at}": 3 for at in range(30)}))
    fpr = drift[3].fpr
    assert (fpr.before, fpr.after, fpr.worse, fpr.verdict) == (0, 0.15, 30, "REGRESSION")
    assert "30 of 200 safe images newly blocked as it" in fpr.reason and drift[4].fpr.verdict == "PASS"


def test_without_a_margin_classes_are_shown_and_decide_nothing() -> None:
    before = images()
    drift = drifted(before, told(before, missed(7, 20)), guard_class=False)
    assert recall(drift, 7).worse == 20 and with_classes("PASS", drift) == "PASS"
    assert {each.fpr.verdict for each in drift} == {None} and class_reasons(drift) == ()


def test_classes_never_make_a_verdict_better() -> None:
    drift = drifted(images(few={7: 12}), images(few={7: 12}))
    for verdict in ("PASS", "REGRESSION", "INCONCLUSIVE", "ANOMALOUS"):
        assert with_classes(verdict, drift) == verdict  # type: ignore[arg-type]


def test_a_lost_class_decides_a_comparison_whose_lines_all_pass(tmp_path: Path) -> None:
    before = images(each=30, safe=60, few={7: 6})
    findings = compare(
        Comparison(
            baseline=[run(tmp_path, "base", before)],
            candidate=[run(tmp_path, "small", told(before, missed(7, 6)))],
            margins=Margins(guard_recall=9.0, guard_fpr=9.0),
        )
    )
    assert [line.verdict for line in findings.lines if line.margin] == ["PASS", "PASS"]
    assert findings.verdict == "REGRESSION" and findings.exit_code == 3
    assert [reason for reason in findings.reasons if CLASSES[7] in reason] == [findings.reasons[0]]
    assert findings.to_json()["classes"][7]["recall"]["worse"] == 6
    printed = "\n".join(summary_lines(findings))
    assert f"recall {CLASSES[7]}" in printed and f"recall {CLASSES[6]}" not in printed
