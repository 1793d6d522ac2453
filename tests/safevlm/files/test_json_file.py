"""Small files are replaced whole or not at all, and what is wrong with one is said in a line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field, ValidationError, model_validator

from safevlm.errors import StorageError
from safevlm.files.json_file import first_problem, replace_file


def test_a_file_gets_another_content_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"run\.json: the disk is full: .* Nothing there was changed"):
        replace_file(path, b"three")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path], "nothing unfinished is left"


class Inner(BaseModel):
    side: int = Field(gt=0)
    name: str


class Outer(BaseModel):
    inner: Inner
    sides: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Outer:
        if self.inner.side > 9:
            raise ValueError("too large")
        return self


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"inner": {"side": 1}}, "inner.name: Field required"),
        ({"inner": {"side": 0, "name": "a"}}, "inner.side: Input should be greater than 0 (given: 0)"),
        ({"inner": {"side": 10, "name": "a"}}, "the whole: too large"),
        (
            {"inner": {"side": "x" * 200}, "sides": ["y"]},
            "inner.side: Input should be a valid integer, unable to parse string as an integer "
            f'(given: "{"x" * 79}) (and 2 more problems)',
        ),
    ],
)
def test_the_first_problem_is_told_with_its_place(given: Any, told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(given)
    assert first_problem(caught.value) == told
