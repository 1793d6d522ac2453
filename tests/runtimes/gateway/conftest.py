"""One guard and one upstream for all tests of the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from httpx._config import DEFAULT_TIMEOUT_CONFIG

from runtimes.gateway.app import Gateway
from tests.runtimes.gateway.servers import Upstream, answer, bundle_of, serving, upstream_server


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of("tiny-safegem", tmp_path_factory.mktemp("gateway") / "guard")


@pytest.fixture(scope="session")
def shared_upstream() -> Iterator[Upstream]:
    with upstream_server() as server:
        yield server


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Upstream:
    shared_upstream.requests.clear()
    shared_upstream.headers_seen.clear()
    shared_upstream.behave = answer
    return shared_upstream


@pytest.fixture(scope="session")
def address(bundle: Path, shared_upstream: Upstream) -> Iterator[str]:
    """Of a gateway with default limits in front of the upstream."""
    with serving(Gateway.open(bundle, upstream=shared_upstream.url)) as url:
        yield url


@pytest.fixture(autouse=True)
def patient_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let httpx wait as long as a busy machine takes; by itself it gives up after 5 s."""
    for step in ("connect", "read", "write", "pool"):
        monkeypatch.setattr(DEFAULT_TIMEOUT_CONFIG, step, 600.0)
