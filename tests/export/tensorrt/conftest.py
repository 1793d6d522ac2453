"""NVIDIA's own builder, where its package is installed."""

from __future__ import annotations

from typing import Any

import pytest

from runtimes.guard.engines.library import import_tensorrt
from safevlm.errors import MissingExtraError


@pytest.fixture(scope="module")
def rtx() -> Any:
    try:
        return import_tensorrt("tensorrt_rtx")
    except MissingExtraError as error:
        pytest.skip(str(error))
