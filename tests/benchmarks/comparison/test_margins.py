from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.comparison.margins import Margins, read_margins
from safevlm.errors import InputError


def test_the_defaults_are_the_declared_ones() -> None:
    margins = Margins()
    assert (margins.masr, margins.rr, margins.type, margins.guard_recall, margins.utility) == (2, 3, 5, 1.5, 2.5)
    assert margins.share("type") == 0.05


def test_a_file_changes_them_and_can_leave_one_out(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"masr": 1.5, "guard_recall": False}))
    margins = read_margins(path)
    assert margins.share("masr") == 0.015
    assert margins.share("guard_recall") is None
    assert margins.share("rr") == 0.03
    toml = tmp_path / "m.toml"
    toml.write_text("masr = 1.5\nguard_recall = false\n")
    assert read_margins(toml) == margins


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"marsr": 2}', "marsr: Extra inputs are not permitted.*Known keys: masr, rr"),
        ('{"masr": 0}', r"masr: Input should be greater than 0"),
        ('{"masr": true}', "masr: "),
        ('{"confidence": 0.5}', "confidence"),
        ('{"relative": 0}', "relative: Input should be greater than 0"),
        ("[1]", "a table of names and points, not list"),
        ("{", "cannot be parsed"),
    ],
)
def test_what_is_not_allowed_is_named(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(InputError, match=told):
        read_margins(path)
