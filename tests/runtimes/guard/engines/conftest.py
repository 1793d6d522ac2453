"""A bundle with an engine of TensorRT-RTX, on a stand-in of its library that answers right."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.guard.bundle import Bundle, open_bundle
from tests.runtimes.bundles import RTX, engine_file, write_bundle
from tests.runtimes.guard.engines.test_verify import right
from tests.runtimes.guard.fake_tensorrt import FakeCuda, FakeRtxEngine, install_rtx


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeCuda, FakeRtxEngine]:
    cuda, engine = install_rtx(monkeypatch)
    engine.answer = right
    return cuda, engine


@pytest.fixture
def engine(installed: tuple[FakeCuda, FakeRtxEngine]) -> FakeRtxEngine:
    return installed[1]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return open_bundle(write_bundle(tmp_path / "bundle", engine_file(tmp_path / "bundle", **RTX)))
