"""A guard suite under corruptions has each image as it is and once under each."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.suites.corrupted import corrupted
from benchmarks.suites.select import open_suite
from calibration.labelled.corruptions import parse_corruptions
from safevlm.errors import InputError


def test_each_image_is_there_as_it_is_and_under_each_corruption() -> None:
    plain = open_suite("guard-mini", limit=20)
    corruptions = parse_corruptions("jpeg:30,noise")
    suite = corrupted(plain, corruptions)
    assert suite.name == "guard-mini+jpeg:30+noise:10" and len(suite.rows) == 3 * len(plain.rows)
    assert len({row.id for row in suite.rows}) == len(suite.rows)
    assert suite.record().sha256 != corrupted(plain, corruptions[:1]).record().sha256
    assert suite.record() == corrupted(plain, corruptions[::-1]).record()
    for row in suite.rows[:: len(plain.rows)]:
        as_it_is = plain.pictures[row.image or ""]()
        wanted = next((each(as_it_is) for each in corruptions if str(each) == row.under), as_it_is)
        assert np.array_equal(np.asarray(suite.picture(row)), np.asarray(wanted))
    assert corrupted(plain, ()) is plain


def test_a_suite_for_the_language_model_is_refused() -> None:
    with pytest.raises(InputError, match="--under is for the guard's suites, guard and guard-mini, not utility-mini"):
        corrupted(open_suite("utility-mini", limit=5), parse_corruptions("jpeg"))
