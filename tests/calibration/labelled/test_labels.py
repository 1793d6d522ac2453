"""Labels are read the same from every format, each content once, and what is wrong is refused with its place."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from calibration.labelled import labels
from calibration.labelled.labels import read_labels
from safevlm.errors import InputError

CLASSES = ("safe", "weapon", "drug")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures ``0.png`` to ``2.png``, of different content."""
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(folder: Path, *rows: tuple[str, Any]) -> Path:
    return written(folder, "labels.jsonl", "\n".join(json.dumps({"image": i, "label": label}) for i, label in rows))


def read(path: Path, **options: Any) -> list[tuple[str, int]]:
    return [(image.path.name, image.label) for image in read_labels(path, CLASSES, **options).images]


def test_every_format_says_the_same(folder: Path) -> None:
    expected = [("0.png", 0), ("1.png", 1), ("2.png", 2)]
    labels: list[Any] = ["SAFE", 1, " drug "]
    rows = [{"image": f"{k}.png", "label": label} for k, label in enumerate(labels)]
    with (folder / "l.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["note", "image", "label"])
        writer.writeheader()
        writer.writerows({**row, "note": 'two\nlines, "quoted"'} for row in rows)
    bench = [{"image": f"{k}.png", "image_safety_label": k, "query": "?", "id": k} for k in range(3)]
    assert read(folder / "l.csv") == expected
    assert read(written(folder, "l.json", json.dumps(rows))) == expected
    assert read(written(folder, "bench.json", json.dumps(bench))) == expected
    lines = "\n\n".join(json.dumps({**row, "q": "a\u2028b"}, ensure_ascii=False) for row in rows)
    assert read(written(folder, "l.jsonl", "\ufeff" + lines)) == expected


def test_the_hash_is_that_of_the_file(folder: Path) -> None:
    path = jsonl(folder, ("0.png", 0))
    assert read_labels(path, CLASSES).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_images_lie_beside_the_file_in_images_or_where_stated(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "images" / "deep").mkdir(parents=True)
    (folder / "0.png").rename(other / "images" / "deep" / "0.png")
    path = jsonl(other, ("deep/0.png", 1))
    assert read(path) == [("0.png", 1)]
    assert read(jsonl(other, ("0.png", 1)), images=other / "images" / "deep") == [("0.png", 1)]
    with pytest.raises(InputError, match=r"line 1: image 1\.png is missing .*--images"):
        read(jsonl(other, ("1.png", 1)))


def test_rows_about_one_image_and_copies_of_it_are_one(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    labels = read_labels(jsonl(folder, ("1.png", 1), ("0.png", 0), ("./1.png", "weapon"), ("copy.png", 1)), CLASSES)
    assert [(image.path.name, image.label) for image in labels.images] == [("1.png", 1), ("0.png", 0)]
    assert labels.duplicates == 1 and labels.contradictory == ()


@pytest.mark.parametrize("second", ["1.png", "copy.png"])
def test_contradictory_labels_leave_an_image_out_by_name_or_by_content(folder: Path, second: str) -> None:
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    labels = read_labels(jsonl(folder, ("0.png", 0), ("1.png", 1), (second, 2)), CLASSES)
    assert [image.path.name for image in labels.images] == ["0.png"]
    assert {Path(name).name for name in labels.contradictory} == {"1.png", second}


@pytest.mark.parametrize(
    "label",
    [3, -1, "-1", "3", "gun", "²", "1" * 5000, True, "yes", 1.5, "3,7", "1 000", [1], {"a": 1}, float("inf")],
    ids=lambda v: str(v)[:9],
)
def test_a_label_outside_the_classes_is_refused_with_its_row(folder: Path, label: Any) -> None:
    with pytest.raises(InputError, match=r"line 2: label .* is not among .*0 to 2, or one of safe, weapon, drug"):
        read(jsonl(folder, ("0.png", 0), ("1.png", label)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.json", "", "is not valid JSON"),
        ("l.json", "[" * 100_000, "is not valid JSON"),
        ("l.json", "{}", "must hold a list of rows, not dict"),
        ("l.json", "[]", "has no rows"),
        ("l.json", '[{"image": "0.png", "label": 0}, {"label": 0}]', "row 2: 'image' is missing"),
        ("l.json", '[{"image": "0.png"}]', "row 1: 'label' is missing"),
        ("l.json", '[{"image": "0.png", "label": null}]', "row 1: 'label' is missing"),
        ("l.json", '[{"image": "' + "a" * 5000 + '", "label": 0}]', "row 1: image a+… cannot be looked up"),
        ("l.json", '[{"image": "0\\u0000.png", "label": 0}]', "row 1: image .* is missing"),
        ("l.json", '[{"image": ".", "label": 0}]', "row 1: image . is missing"),
        ("l.jsonl", '{"image": "0.png", "label": 0}\n{', "line 2 is not valid JSON"),
        ("l.jsonl", "[1]", "row 1: 'image' is missing"),
        ("l.csv", "", "has no rows"),
        ("l.csv", "image,label\n", "has no rows"),
        ("l.csv", "0.png,1\n1.png,2\n", "line 1: the first line of a CSV file must name its columns"),
        ("l.csv", "image,label\n0.png\n", "line 2: 'label' is missing"),
        ("l.csv", "image,label\n" + "a" * 200_000 + ",1\n", "is not valid CSV"),
        ("l.csv", b"image,label\n\xff,1\n", "is not UTF-8 text"),
        ("l.xml", "0.png 1", r"unknown file type\. Give .* \.json, \.jsonl, \.csv"),
    ],
    ids=range(19),
)
def test_bad_input_is_refused_with_its_place(folder: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(written(folder, name, text))


def test_a_missing_file_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv cannot be read: No such file"):
        read(folder / "none.csv")


def test_an_image_that_cannot_be_opened_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(folder, ("0.png", 0))

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(labels, "sha256_of", refuse)
    with pytest.raises(InputError, match=r"0\.png cannot be read: Permission denied"):
        read(path)
