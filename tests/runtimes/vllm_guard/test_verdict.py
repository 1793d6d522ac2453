"""Only a whole row of probabilities of the expected guard is a verdict."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from runtimes.vllm_guard.verdict import FIELD, Identity, VerdictError, image_stated, read_identity, read_images, stated

GUARD = Identity(head="ab" * 32, classes=("safe", "violence", "hate"))


def said(*rows: Any, usual: bool = True) -> dict[str, Any]:
    written = stated(GUARD, [image_stated(row, GUARD.classes, usual=usual) for row in rows])
    return json.loads(json.dumps(written))  # type: ignore[no-any-return]


def test_what_is_stated_is_read_again() -> None:
    params = said([0.5, 0.25, 0.25], [0.1, 0.1, 0.8])
    assert read_identity(params) == GUARD
    assert read_images(params, GUARD, 2) == [([0.5, 0.25, 0.25], True), ([0.1, 0.1, 0.8], True)]
    assert [each["label"] for each in params[FIELD]["images"]] == ["safe", "hate"]
    assert read_images(said([1, 0, 0], usual=False), GUARD, 1) == [([1, 0, 0], False)]


@pytest.mark.parametrize(
    "row", [None, [], [1.0, 0.0], [math.nan] * 3, [0.5, 0.5, 0.5], [1.5, -0.5, 0.0], ["1", 0, 0], [True, 0, 0]]
)
def test_numbers_that_are_no_probabilities_are_stated_as_an_error(row: Any) -> None:
    params = said(row)
    assert list(params[FIELD]["images"][0]) == ["error"]
    with pytest.raises(VerdictError, match="no exact verdict on an image"):
        read_images(params, GUARD, 1)


@pytest.mark.parametrize("params", [None, {}, [], {"safe_vlm": None}, {"safe_vlm": []}, {"safe_vlm": {}}, "safe_vlm"])
def test_an_answer_without_verdicts_is_an_error(params: Any) -> None:
    with pytest.raises(VerdictError):
        read_images(params, GUARD, 1)


def test_another_number_of_images_is_an_error() -> None:
    for count in (0, 2):
        with pytest.raises(VerdictError):
            read_images(said([1, 0, 0]), GUARD, count)
    with pytest.raises(VerdictError, match="storage is full"):
        read_images(stated(GUARD, None, "storage is full"), GUARD, 1)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 2),
        (("head",), "cd" * 32),
        (("head",), 5),
        (("classes",), ["safe", "hate", "violence"]),
        (("classes",), "safe"),
        (("images", 0, "probs"), [1, 0, 0]),
        (("images", 0, "probs"), {"violence": 0.25, "safe": 0.5, "hate": 0.25}),
        (("images", 0, "probs", "safe"), 5),
        (("images", 0), "safe"),
        (("images",), {"0": {}}),
    ],
)
def test_anything_altered_is_an_error(path: tuple[Any, ...], value: Any) -> None:
    params = copy.deepcopy(said([0.5, 0.25, 0.25]))
    inner: Any = params[FIELD]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(VerdictError):
        read_images(params, GUARD, 1)


@pytest.mark.parametrize("usual", [None, 1, "true"])
def test_only_true_is_usual(usual: Any) -> None:
    params = said([1, 0, 0])
    params[FIELD]["images"][0]["usual"] = usual
    assert read_images(params, GUARD, 1) == [([1, 0, 0], False)]
