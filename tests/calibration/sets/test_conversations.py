"""Calibration conversations: three shapes of rows, one sample each, and what a bad row is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from calibration.sets.conversations import Drawn, Sample, built_in_conversations, read_conversations
from safevlm.errors import ImageFileError, InputError

WORLD = Path(__file__).parents[2] / "fixtures" / "world" / "rows"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, colour in (("a.png", "red"), ("images/b.png", "blue")):
        Image.new("RGB", (20, 10), colour).save(tmp_path / name)
    return tmp_path


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    text = "\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]"
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def messages(question: str, answer: str | None = None, image: str | None = None, **fields: Any) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": "text", "text": question}]
    if image is not None:
        content.insert(0, {"type": "image", "image": image})
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return {"messages": turns, **fields}


def llava(*turns: str, **fields: Any) -> dict[str, Any]:
    speakers = ("human", "gpt")
    return {"conversations": [{"from": speakers[i % 2], "value": turn} for i, turn in enumerate(turns)], **fields}


def short(sample: Sample) -> tuple[Any, ...]:
    return sample.kind, sample.question, sample.answer, sample.name


ROWS = (
    messages("Why?", "Because.", "a.png"),
    llava("<image>\nWhy?", "So.", image="a.png"),
    {"query": "Why?", "image": "a.png", "type": "SSU"},
    {"query": "Why?", "image": "a.png", "image_safe": False},
    {"query": "Why?", "answer": "I'm sorry, no.", "image": "a.png"},
    {"query": "Why?", "answer": "So."},
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (messages("Why?", "Because.", "a.png", kind="safe"), ("safe", "Why?", "Because.", "a.png")),
        (messages("Why?", "I'm sorry, no.", "a.png"), ("unsafe", "Why?", "I'm sorry, no.", "a.png")),
        (messages("Why?", "It is red.", "b.png"), ("safe", "Why?", "It is red.", "b.png")),
        (messages("Why?"), ("text", "Why?", None, "")),
        (llava("<image>\nWhy?", "So.", image="a.png"), ("safe", "Why?", "So.", "a.png")),
        (llava("Why?\n<image>", "So.", "And?", "Yes.", image="a.png"), ("safe", "Why?", "So.", "a.png")),
        (llava("Why?", "   "), ("text", "Why?", None, "")),
        ({"query": "Why?", "image": "a.png", "type": "SSU"}, ("unsafe", "Why?", None, "a.png")),
        ({"query": "Why?", "image": "a.png", "type": "SSS"}, ("safe", "Why?", None, "a.png")),
        ({"query": "Why?", "image": "a.png", "image_safe": "FALSE"}, ("unsafe", "Why?", None, "a.png")),
        ({"query": "Why?", "image": "a.png", "type": "ssu "}, ("unsafe", "Why?", None, "a.png")),
        ({"query": "Why?", "image": "images\\b.png", "kind": "Safe"}, ("safe", "Why?", None, "images\\b.png")),
        ({"query": "Why?", "image": "a.png", "image_safe": False}, ("unsafe", "Why?", None, "a.png")),
        ({"query": "Why?", "answer": "So."}, ("text", "Why?", "So.", "")),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, "Why?"]}]}
            | {"kind": "safe"},
            ("safe", "Why?", None, "a.png"),
        ),
    ],
)
def test_rows_of_every_shape_become_samples(folder: Path, row: Any, expected: tuple[Any, ...]) -> None:
    for name in ("rows.jsonl", "rows.json"):
        read = read_conversations(written(folder, row, name=name))
        assert [short(sample) for sample in read.samples] == [expected]
        picture = read.samples[0].picture()
        assert (picture is None) == (expected[3] == "")
        assert read.sha256 is not None and len(read.sha256) == 64


@pytest.mark.parametrize("path", sorted(WORLD.glob("*.[jc]*")), ids=lambda path: path.name)
def test_rows_of_the_world(folder: Path, path: Path) -> None:
    """The right answer of each file stands in the folder's README."""
    right = dict(re.findall(r"^- `([^`]+)`.*→ `(.+)`$", (WORLD / "README.md").read_text(encoding="utf-8"), re.M))
    (folder / path.name).write_bytes(path.read_bytes())
    try:
        (sample,) = read_conversations(folder / path.name).samples
    except InputError as error:
        assert right[path.name] in str(error)
    else:
        assert json.loads(right[path.name]) == list(short(sample))
        assert isinstance(sample.image, Path) and sample.image.is_file()


FORMS = ("Picture 1: <img>{}</img>", "<img>{}</img>\n", "<image>{}</image>")
NOTHING = st.sampled_from([None, "", " ", [], [None], float("nan")])
OTHERS = ("image", "images", "messages", "conversations", "query", "answer", "kind", "type", "image_safe")


@given(row=st.sampled_from(ROWS), empty=st.dictionaries(st.sampled_from(OTHERS), NOTHING))
@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_column_that_holds_nothing_changes_nothing(folder: Path, row: Any, empty: Any) -> None:
    expected = read_conversations(written(folder, row)).samples
    assert read_conversations(written(folder, {**empty, **row})).samples == expected


@given(
    row=st.sampled_from([row for row in ROWS if "image" in json.dumps(row)]),
    form=st.sampled_from(
        ["image", "images", "object", "list", "Picture 1: <img>{}</img>", "<img>{}</img>\n", "<image>{}</image>"]
    ),
)
@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_image_is_found_wherever_a_row_names_it(folder: Path, row: Any, form: str) -> None:
    (expected,) = read_conversations(written(folder, row)).samples
    fields = {key: row[key] for key in ("kind", "type", "image_safe") if key in row}
    question = form.format("a.png") + expected.question if "{" in form else expected.question
    named = {
        "image": {"image": "a.png"},
        "images": {"images": ["a.png"]},
        "list": {"image": ["a.png"], "images": ["a.png"]},
    }
    named["object"] = {"image": {"path": "a.png", "bytes": None}, "images": None}
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": expected.answer or ""}]
    (found,) = read_conversations(written(folder, {"conversations": turns, **fields, **named.get(form, {})})).samples
    assert (found.question, found.answer, found.name) == (expected.question, expected.answer, "a.png")
    assert found.kind == expected.kind


def test_what_is_left_out_and_what_was_guessed_is_counted(folder: Path) -> None:
    system = {"messages": [{"role": "system", "content": "Be nice."}, *messages("Why?", "So.")["messages"]]}
    read = read_conversations(
        written(folder, system, llava("<image>Why?", "So.", "And?", "Yes.", image="a.png"), messages("A?", "B."))
    )
    assert read.left_out == {"system turns": 1, "later turns": 2}
    assert read.kinds_from_answers == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[]", "line 2: a row must be a JSON object, not list"),
        ({}, "line 2: the row has none of messages, conversations, query"),
        ({"query": "?", "messages": [{}]}, "line 2: the row has both"),
        ({"messages": [], "query": None}, "line 2: the row has none of .*It has nothing"),
        ({"messages": [{"role": "assistant", "content": "?"}]}, "line 2: the conversation must begin"),
        ({"messages": [{"role": "robot", "content": "?"}]}, "line 2: 'role' is 'robot'"),
        ({"messages": [{"role": "user", "content": 5}]}, "line 2: 'content' must be a string"),
        ({"messages": "Hello"}, "line 2: 'messages' must be a list of turns"),
        (messages(" "), "line 2: the question is empty"),
        (messages("Why?", image="c.png", kind="safe"), "line 2: image c.png is missing"),
        (messages("Why?", image="https://example.com/a.png"), "line 2: .*not a file"),
        (messages("Why?", image="a.png"), "line 2: it is unknown whether this pair should be refused"),
        (messages("Why?", image="a.png", kind="bad"), "line 2: kind 'bad' is unknown"),
        (messages("Why?", kind="safe"), "line 2: kind safe, but the row has no image"),
        (messages("Why?", image="a.png", kind="text"), "line 2: kind text, but the row has an image"),
        ({"query": "?", "image": "a.png", "image_safe": "maybe"}, "line 2: 'image_safe' is 'maybe'; true or false"),
        ({"query": "?", "image": "a.png", "images": ["images/b.png"]}, "line 2: the question shows several images"),
        ({"query": "<img>a.png</img><img>b.png</img>?"}, "line 2: the question shows several images"),
        ({"query": "?", "image": 5}, "line 2: the image is '5'. Give the name of an image file"),
        ('{"query": "?", "query": "!"}', "line 2 is not valid JSON .the key 'query' appears twice in one object"),
        (llava("<image>Why?"), "line 2: the question shows an image, but the row names none"),
        (llava("<image><image>Why?", image="a.png"), "line 2: the question shows several images"),
        (llava("Why?", "So.", "<image>And?", image="a.png"), "line 2: the image is shown in a later turn"),
    ],
)
def test_a_bad_row_is_named(folder: Path, row: Any, message: str) -> None:
    path = written(folder, messages("A?"), row)
    with pytest.raises(InputError, match=message):
        read_conversations(path)


def test_a_picture_that_cannot_be_opened_names_its_row(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"nothing")
    (sample,) = read_conversations(written(folder, messages("Why?", "So.", "a.png"))).samples
    with pytest.raises(ImageFileError, match="line 1: "):
        sample.picture()


def test_files_that_hold_no_rows_are_refused(folder: Path) -> None:
    for text in ("", "\n\n"):
        with pytest.raises(InputError, match="has no rows"):
            read_conversations(written(folder, text))
    with pytest.raises(InputError, match="cannot be read"):
        read_conversations(folder / "nowhere.jsonl")
    (folder / "rows.xml").write_text("{}")
    with pytest.raises(InputError, match=r"unknown file type. Give .* .json, .jsonl, .csv"):
        read_conversations(folder / "rows.xml")


def test_built_in_samples_are_the_calibration_part_and_texts() -> None:
    built_in = built_in_conversations()
    kinds = {kind: sum(sample.kind == kind for sample in built_in.samples) for kind in ("unsafe", "safe", "text")}
    assert min(kinds.values()) >= 100
    pair = built_in.samples[0]
    picture = pair.picture()
    assert isinstance(pair.image, Drawn) and picture is not None and picture.mode == "RGB"
    assert all(sample.answer for sample in built_in.samples if sample.kind != "text")
    questions = [sample.question for sample in built_in.samples if sample.kind == "text"]
    assert len(set(questions)) == len(questions)
