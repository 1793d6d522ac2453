"""Cross-origin requests: pages of listed origins read every answer, others none, and credentials are never allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from runtimes.gateway.app import Gateway
from runtimes.gateway.options import GatewayOptions
from safevlm.errors import InputError
from tests.runtimes.gateway.servers import SAFE_URL, UNSAFE_URL, Upstream, messages, serving

PAGE, OTHER = "https://app.example", "https://app.example.evil.test"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def listed(bundle: Path, shared_upstream: Upstream) -> Iterator[str]:
    options = GatewayOptions(cors_origins=(PAGE, "http://localhost:3000"))
    with serving(Gateway.open(bundle, upstream=shared_upstream.url, options=options, client_key="sk-page")) as url:
        yield url


def test_a_preflight_needs_no_key(listed: str) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-stainless-os"}
    found = httpx.options(f"{listed}{CHAT}", headers={"Origin": PAGE, **asked})
    assert found.status_code == 200 and found.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in found.headers["access-control-allow-headers"]
    other = httpx.options(f"{listed}{CHAT}", headers={"Origin": OTHER, **asked})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("key", ["sk-page", "wrong", None])
@pytest.mark.parametrize("body", [{"messages": messages(SAFE_URL)}, {"messages": messages(UNSAFE_URL)}, {}])
@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/nowhere"])
def test_whatever_is_answered_can_be_read_by_a_listed_page_alone(
    listed: str, upstream: Upstream, key: str | None, body: dict[str, object], path: str
) -> None:
    shown = {} if key is None else {"Authorization": f"Bearer {key}"}
    for origin in (PAGE, "http://localhost:3000", OTHER, "null", "http://localhost:3001"):
        found = httpx.post(f"{listed}{path}", json=body, headers={"Origin": origin, **shown})
        allowed = found.headers.get("access-control-allow-origin")
        assert allowed == (origin if origin in (PAGE, "http://localhost:3000") else None)
        assert "access-control-allow-credentials" not in found.headers and "Origin" in found.headers["vary"]
        if allowed:
            assert {"X-Safe-VLM", "X-Request-Id"} <= set(found.headers["access-control-expose-headers"].split(", "))


def test_streams_too(listed: str, upstream: Upstream) -> None:
    body = {"messages": messages(SAFE_URL), "stream": True}
    found = httpx.post(f"{listed}{CHAT}", json=body, headers={"Origin": PAGE, "Authorization": "Bearer sk-page"})
    assert found.headers["access-control-allow-origin"] == PAGE and "x-safe-vlm" in found.headers


def test_off_by_default(address: str) -> None:
    found = httpx.get(f"{address}/v1/models", headers={"Origin": PAGE})
    assert found.status_code == 200 and not [name for name in found.headers if name.startswith("access-control")]
    assert httpx.options(f"{address}{CHAT}", headers={"Origin": PAGE}).status_code == 405


def test_all_pages_only_by_saying_so(bundle: Path, upstream: Upstream) -> None:
    with serving(Gateway.open(bundle, upstream=upstream.url, options=GatewayOptions(cors_origins=("*",)))) as url:
        found = httpx.get(f"{url}/v1/models", headers={"Origin": OTHER, "Cookie": "a=b"})
    assert found.headers["access-control-allow-origin"] in ("*", OTHER)
    assert "access-control-allow-credentials" not in found.headers


@pytest.mark.parametrize("origin", ["http://[::1]:8080", "http://10.0.0.1", "https://a-b.c_d.example:8443"])
def test_origins(origin: str) -> None:
    assert GatewayOptions(cors_origins=(origin,)).cors_origins == (origin,)


NO_ORIGINS = (
    *(
        "",
        "null",
        "app.example",
        "https://app.example/",
        "https://app.example/x",
        "https://*.example",
        "ftp://a.example",
    ),
    *("https://APP.example", "https://a.example:443", "http://a.example:80", "https://u@a.example", "https://a..b"),
    *("https://a.example https://b.example", "https://a.example:0", "https://a.example\n", "https://", "**"),
)


@pytest.mark.parametrize("origin", NO_ORIGINS)
def test_origins_that_are_none(origin: str) -> None:
    with pytest.raises(InputError, match="--cors-origin"):
        GatewayOptions(cors_origins=(origin,))
    with pytest.raises(InputError, match="--cors-origin"):
        GatewayOptions(cors_origins=("*", "https://app.example"))
