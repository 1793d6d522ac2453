"""A table of labels says the same whoever wrote it, or is refused with the line: never another label in silence."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from calibration.labelled.labels import read_labels
from safevlm.errors import InputError

CLASSES = ("safe", "self-harm", "Weapon Violence", "sexual_content")
NAMES = (
    "a.png",
    "b, c.png",
    "d;e.png",
    'f "g".png',
    "ä ö.png",
    "sub/h.png",
    "#i.png",
    "1.png",
    "j|'k'.png",
    "l%20m.png",
)
SETTINGS = settings(
    deadline=None, derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WORLD = Path(__file__).parents[2] / "fixtures" / "world"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Images of different content under all of :data:`NAMES`."""
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "sub").mkdir()
        for number, name in enumerate(NAMES):
            Image.new("RGB", (2, 2), (number, 0, 0)).save(Path(made) / name)
        yield Path(made)


def read(path: Path) -> list[tuple[str, int]]:
    labels = read_labels(path, CLASSES)
    assert not labels.contradictory and not labels.duplicates
    return [(image.path.relative_to(path.parent.resolve()).as_posix(), image.label) for image in labels.images]


@dataclass(frozen=True)
class Table:
    """A header, rows, and what they say."""

    header: list[str]
    rows: list[list[str]]
    expected: list[tuple[str, int]]


@st.composite
def tables(draw: Any) -> Table:
    """Images and labels spelled as people spell them, between columns that have nothing to do with them."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True))
    others = draw(st.lists(st.sampled_from(["note", "score", "", "by whom"]), max_size=3, unique=True))
    spell = draw(st.sampled_from([str.lower, str.upper, str.title, lambda name: f" {name} ", lambda name: f"“{name}”"]))
    columns = draw(st.permutations([("image", spell("image")), ("label", spell("label")), *((o, o) for o in others)]))
    text = st.text(alphabet=",;\t|\"' #\\01234.ab\n", max_size=8)
    rows, expected = [], []
    for name in names:
        label = draw(st.integers(0, len(CLASSES) - 1))
        words = re.split(r"[-_ ]", CLASSES[label])
        spellings = [f"{label}", f"{label}.0", f"{label},0", f" {label}\u00a0", f"«{label}»"]
        spellings += [sign.join(words) for sign in "-_ "] + [CLASSES[label].upper()]
        cells = {"image": name, "label": draw(st.sampled_from(spellings))}
        rows.append([cells[kind] if kind in cells else draw(text) for kind, _ in columns])
        expected.append((name, label))
    if not columns[-1][0]:  # pandas' index, which comes first
        columns = [columns[-1], *columns[:-1]]
        rows = [[row[-1], *row[:-1]] for row in rows]
    trailing = draw(st.integers(0, 2))
    return Table([stated for _, stated in columns] + [""] * trailing, [row + [""] * trailing for row in rows], expected)


FAIR = st.fixed_dictionaries(
    {
        "delimiter": st.sampled_from(",;\t|"),
        "lineterminator": st.sampled_from(["\r\n", "\n", "\r"]),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    }
).filter(lambda it: it["lineterminator"] != "\r" or it["quoting"] != csv.QUOTE_MINIMAL)  # which leaves a \n bare there
FOUL = st.fixed_dictionaries(
    {
        "delimiter": st.sampled_from(",;\t|"),
        "lineterminator": st.sampled_from(["\r\n", "\n"]),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_NONE]),
        "quotechar": st.sampled_from("\"'"),
        "escapechar": st.just("\\"),
        "doublequote": st.booleans(),
    }
)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])


def written(rows: Sequence[Sequence[str]], dialect: Any) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, **dialect).writerows(rows)
    return stream.getvalue()


@given(table=tables(), dialect=FAIR, encoding=ENCODINGS, sep=st.booleans(), blank=st.integers(0, 2))
@SETTINGS
def test_a_table_means_the_same_in_every_dialect(
    folder: Path, table: Table, dialect: Any, encoding: str, sep: bool, blank: int
) -> None:
    text = written([table.header, *table.rows], dialect)
    end = dialect["lineterminator"]
    first = f"sep={dialect['delimiter']}{end}" if sep else ""
    (folder / "labels.csv").write_bytes((first + text + (dialect["delimiter"] + end) * blank).encode(encoding))
    assert read(folder / "labels.csv") == table.expected


@given(table=tables(), dialect=FOUL)
@SETTINGS
def test_what_was_written_for_another_reader_is_never_misread(folder: Path, table: Table, dialect: Any) -> None:
    """Escapes and other quotes are not understood: then rows do not fit, and none of them gives a label."""
    (folder / "labels.csv").write_text(written([table.header, *table.rows], dialect), encoding="utf-8", newline="")
    try:
        found = read(folder / "labels.csv")
    except InputError as error:
        assert re.search(r"labels\.csv, line [1-9]", str(error))
    else:
        assert found == table.expected


@given(
    table=tables(), dialect=FAIR, wrong=st.sampled_from(["3.7", "TRUE", "gun", "", "4", "-1", "1 000"]), at=st.data()
)
@SETTINGS
def test_a_label_that_is_none_is_refused_with_the_line_its_row_begins_in(
    folder: Path, table: Table, dialect: Any, wrong: str, at: Any
) -> None:
    number = at.draw(st.integers(0, len(table.rows) - 1))
    column = next(i for i, name in enumerate(table.header) if name.strip(" “”").lower() == "label")
    table.rows[number][column] = wrong
    before = written([table.header, *table.rows[:number]], dialect)
    after = written(table.rows[number:], dialect)
    (folder / "labels.csv").write_bytes((before + after).encode())
    line = 1 + len(re.findall(r"\r\n|\r|\n", before))
    reason = f"label '{wrong}' is not among .* 0 to 3, or one of safe" if wrong else "'label' is missing"
    with pytest.raises(InputError, match=rf"labels\.csv, line {line}: {reason}"):
        read(folder / "labels.csv")


# -- pandas, which nobody here wrote ------------------------------------------------------------------------


def frame(*labels: Any) -> Any:
    names = list(NAMES[: len(labels)])
    return pandas.DataFrame({"note": ["x, y"] * len(labels), "image": names, "label": list(labels)})


@pytest.mark.parametrize("labels", [(0, 3, 1), (0.0, 3.0, 1.0), ("safe", "Sexual Content", "self_harm")], ids=str)
def test_what_pandas_writes_is_read(folder: Path, labels: tuple[Any, ...]) -> None:
    made, expected = frame(*labels), list(zip(NAMES, (0, 3, 1), strict=False))
    for number, options in enumerate(
        (
            {},
            {"index": False},
            {"sep": ";", "decimal": ",", "encoding": "utf-8-sig", "lineterminator": "\r\n"},
            {"sep": "\t", "encoding": "utf-16", "index": False, "float_format": "%.3f"},
            {"quoting": csv.QUOTE_NONNUMERIC, "index_label": "id"},
        )
    ):
        made.to_csv(folder / f"{number}.csv", **options)
        assert read(folder / f"{number}.csv") == expected, options
    for number, options in enumerate(
        [{"orient": orient} for orient in ("records", "columns", "index", "split", "table")]
        + [{"orient": "records", "lines": True}, {"orient": "records", "indent": 2}]
    ):
        for ending in ("json", "jsonl"):
            made.to_json(folder / f"{number}.{ending}", **options)
            assert read(folder / f"{number}.{ending}") == expected, options
    (folder / "lists.json").write_text(json.dumps(made.to_dict("list")), encoding="utf-16")
    assert read(folder / "lists.json") == expected


def test_what_pandas_writes_without_names_or_with_holes_is_refused(folder: Path) -> None:
    frame(0, 1).to_json(folder / "values.json", orient="values")
    with pytest.raises(InputError, match=r"values\.json, row 1: 'image' is missing"):
        read(folder / "values.json")
    holes = frame(0, None, 2)
    holes.to_csv(folder / "holes.csv", index=False)
    with pytest.raises(InputError, match=r"holes\.csv, line 3: 'label' is missing"):
        read(folder / "holes.csv")
    holes.to_json(folder / "holes.json", orient="records")
    with pytest.raises(InputError, match=r"holes\.json, row 2: 'label' is missing"):
        read(folder / "holes.json")
    (folder / "nan.json").write_text(json.dumps([{"image": "a.png", "label": float("nan"), "image_safety_label": 1}]))
    assert read(folder / "nan.json") == [("a.png", 1)]


# -- what else people have ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\na.png,1,2\n", "line 2 has 3 values, but the header names 2 columns"),
        ("image,label,note\na.png,1,0,5\n", "line 2 has 4 values, but the header names 3 columns"),
        ("note,label,image,more\nx,1,a.png,,\n", "line 2 has 5 values, but the header names 4 columns"),
        ("image,label,Label\na.png,1,2\n", "line 1: 2 columns are named 'label'"),
        ("image,label,image_safety_label\na.png,1,2\n", "line 2: 'label' is '1' and 'image_safety_label' is '2'"),
        (
            "file;class\na.png;1\n",
            "line 1: the first line .* 'image' and 'label', separated .* is 'file;class'",
        ),
        ("sep=;\nimage,label\na.png,1\n", "line 2: the first line of a CSV file must name its columns"),
        ('image,label\na.png,1\n"b, c.png,2\n1.png,3\n', "line 3 is not valid CSV"),
        ("image,label\nC:\\me\\a.png,1\n", "line 2: .* is an absolute Windows path: write it relative"),
        ("image,label\nhttps://host/a.png,1\n", "line 2: .* not a file"),
        ("image,label\na.png,wahr\n", "It names no class: which harm, or safe"),
    ],
    ids=lambda value: value[:20],
)
def test_a_table_that_could_be_misread_is_refused_with_its_line(folder: Path, text: str, message: str) -> None:
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read(folder / "labels.csv")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# made by hand\n\nimage label\na.png 1\n", [("a.png", 1)]),
        ("image,label\na.png,1\n# the rest\n1.png,2\n", [("a.png", 1), ("1.png", 2)]),
        ("image,label,image_safety_label\na.png,,1\n1.png,2,2.0\n", [("a.png", 1), ("1.png", 2)]),
        ('image, "label"\n"b, c.png", "1"\n', [("b, c.png", 1)]),
        ("image,label\n.\\sub\\h.png,1\n", [("sub/h.png", 1)]),
        ("image,label\na%CC%88 %c3%b6.png,1\nl%20m.png,2\n", [("ä ö.png", 1), ("l%20m.png", 2)]),
        ("image,label\nu\u0308.png,1\n", None),
    ],
    ids=range(7),
)
def test_what_people_write_is_read(folder: Path, text: str, expected: Any) -> None:
    (folder / "labels.tsv").write_text(text, encoding="utf-8")
    if expected is None:
        with pytest.raises(InputError, match="is missing"):
            read(folder / "labels.tsv")
        return
    assert read(folder / "labels.tsv") == expected


def test_a_number_that_is_also_a_name_is_refused(folder: Path) -> None:
    (folder / "labels.csv").write_text("image,label\na.png,1\n")
    with pytest.raises(InputError, match=r"label '1' is ambiguous: class 0 \(1\) or 1 \(0\)"):
        read_labels(folder / "labels.csv", ("1", "0"))


@pytest.mark.parametrize("path", sorted((WORLD / "labels").glob("*.*")), ids=lambda path: path.name)
def test_files_of_the_world(folder: Path, tmp_path: Path, path: Path) -> None:
    """The right answer of each file stands in the folder's README."""
    if path.name == "README.md":
        return
    right = dict(re.findall(r"^- `([^`]+)`.*→ (.+)$", (path.parent / "README.md").read_text(encoding="utf-8"), re.M))
    (folder / path.name).write_bytes(path.read_bytes())
    try:
        found = json.dumps(read(folder / path.name), ensure_ascii=False)
    except InputError as error:
        found = str(error).removeprefix(str(folder))
    assert right[path.name].strip("`") in found
