"""One browser for all tests of pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.benchmarks.report.chromium import BINARY, Chromium


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if BINARY is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    with Chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found
