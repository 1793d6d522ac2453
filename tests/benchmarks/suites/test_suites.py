from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.holisafe_mini import write_suite
from benchmarks.suites.holisafe import holisafe
from benchmarks.suites.holisafe_mini import holisafe_mini
from benchmarks.suites.select import SUITES, open_suite
from benchmarks.suites.suite import one_row_an_image
from calibration.holisafe_mini.suite import build_suite
from safevlm.errors import InputError


def raw_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image": f"hate/gender/gender_{number}.jpg",
        "query": "What is this?",
        "type": "USU",
        "category": "hate",
        "subcategory": "gender_discrimination",
        "image_safe": False,
        "image_safety_label": 1,
    } | changes


def benchmark(folder: Path, rows: list[Any]) -> Path:
    """Write a folder in the published layout."""
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("image"), str) and ".." not in row["image"]:
            path = folder / "images" / row["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (int(row["id"]) % 256, 0, 0)).save(path)
    folder.mkdir(exist_ok=True)
    (folder / "holisafe_bench.json").write_text(json.dumps(rows))
    return folder


def test_the_published_layout_is_read(tmp_path: Path) -> None:
    built = build_suite("test", pairs=100, questions=4)
    write_suite(built, tmp_path / "bench")
    suite = holisafe(tmp_path / "bench")
    assert [row.query for row in suite.rows] == [item.row["query"] for item in built.pairs]
    assert Counter(row.type for row in suite.rows) == Counter(item.row["type"] for item in built.pairs)
    assert suite.picture(suite.rows[0]).size[0] > 8
    assert suite.left_out == ()


def test_contradictory_labels_are_left_out_and_listed(tmp_path: Path) -> None:
    torn = raw_row(1, image="hate/gender/gender_0.jpg", image_safe=True, image_safety_label=0, type="SSS")
    suite = holisafe(benchmark(tmp_path / "b", [raw_row(0), torn, raw_row(2)]))
    assert suite.left_out == ("hate/gender/gender_0.jpg",)
    assert [row.label for row in suite.rows] == [None, None, 1]
    guard = one_row_an_image(suite, "guard")
    assert [(row.id, row.kind, row.label) for row in guard.rows] == [("hate/gender/gender_2.jpg", "image", 1)]
    assert guard.record().left_out == suite.left_out


def test_the_hash_tells_another_picture_question_or_label(tmp_path: Path) -> None:
    rows = [raw_row(0), raw_row(1)]
    first = holisafe(benchmark(tmp_path / "a", rows)).record().sha256
    assert holisafe(benchmark(tmp_path / "b", rows[::-1])).record().sha256 == first
    assert holisafe(benchmark(tmp_path / "c", [raw_row(0, query="?"), raw_row(1)])).record().sha256 != first
    assert holisafe(benchmark(tmp_path / "d", [raw_row(0, image_safety_label=2), raw_row(1)])).record().sha256 != first
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b" / "images" / rows[0]["image"])
    assert holisafe(tmp_path / "b").record().sha256 != first


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([raw_row(0), {"id": 1}], r"row 2: field 'image' is missing"),
        ([raw_row(0, type="XYZ")], r"row 1: field 'type' is 'XYZ'. Allowed: SSS"),
        ([raw_row(0, image_safety_label=20)], r"field 'image_safety_label' is 20\. Allowed: 0 to 19"),
        ([raw_row(0, image_safety_label=True)], "field 'image_safety_label' is True; it must be int"),
        ([raw_row(0, image_safe=True)], "field 'image_safe' is True, but image_safety_label is 1"),
        ([raw_row(0, query=7)], "field 'query' is 7; it must be str"),
        ([raw_row(0), raw_row(1), raw_row(0)], "row 3: id 0 is already in row 1"),
        ([raw_row(0, image="../../secret.jpg")], r"field 'image' is '\.\./\.\./secret.jpg'"),
        ([[1]], "a row must be a JSON object, not list"),
        ([], "is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        holisafe(benchmark(tmp_path / "b", rows))


def test_missing_files_tell_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gated: accept its terms"):
        holisafe(tmp_path)
    folder = benchmark(tmp_path / "b", [raw_row(0), raw_row(1)])
    (folder / "images" / raw_row(1)["image"]).unlink()
    with pytest.raises(InputError, match=r"1 of 2 images are missing: hate/gender/gender_1.jpg"):
        holisafe(folder)
    with pytest.raises(InputError, match="needs --data DIR"):
        open_suite("guard")
    with pytest.raises(InputError, match=r"--suite holysafe is unknown\. Allowed: holisafe"):
        open_suite("holysafe")
    with pytest.raises(InputError, match="takes no --data"):
        open_suite("guard-mini", tmp_path)
    with pytest.raises(InputError, match="has its own size"):
        open_suite("holisafe", tmp_path, pairs=4000)


def test_a_built_in_suite_has_the_size_that_a_plan_asks_for() -> None:
    suite, guard, utility = (
        open_suite(name, pairs=300, questions=60) for name in ("holisafe-mini", "guard-mini", "utility-mini")
    )
    assert [sum(row.kind == kind for row in suite.rows) for kind in ("pair", "question")] == [300, 60]
    assert {row.image for row in guard.rows} == {row.image for row in suite.rows} and len(utility.rows) == 60
    assert open_suite("guard-mini", pairs=600, questions=60).record().rows > guard.record().rows


def test_the_built_in_suites_are_the_same_each_time_and_share_their_images() -> None:
    mini = holisafe_mini()
    assert mini.record() == holisafe_mini().record()
    guard, utility = open_suite("guard-mini"), open_suite("utility-mini")
    assert {row.image for row in guard.rows} == {row.image for row in mini.rows}
    assert {row.id for row in utility.rows} < {row.id for row in mini.rows}
    assert len({suite.record().sha256 for suite in (mini, guard, utility)}) == 3
    assert set(SUITES) == {"holisafe", mini.name, "guard", guard.name, utility.name}


def test_a_limit_keeps_the_types_shares_and_is_the_same_each_time() -> None:
    whole, part = holisafe_mini(), holisafe_mini().limited(300)
    assert part.record() == holisafe_mini().limited(300).record() != whole.record()
    shares = Counter(row.type for row in whole.rows)
    for kind, count in Counter(row.type for row in part.rows).items():
        assert abs(count - shares[kind] * 0.1) <= 1
    with pytest.raises(InputError, match="Give at least 1"):
        whole.limited(0)
