"""What keeps a gateway serving: clients that are slow, pictures that are large, workers that must not die."""

from __future__ import annotations

import gzip
import ipaddress
import logging
import socket
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from runtimes.gateway.app import Gateway
from runtimes.gateway.images.remote import public
from runtimes.gateway.options import GatewayOptions
from runtimes.guard.runner import GuardOutput
from tests.runtimes.gateway.servers import SAFE_URL, UNSAFE_URL, Upstream, data_url, messages, png, serving


def ask(address: str, body: Any) -> httpx.Response:
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=600)


def test_paths_and_methods_as_clients_and_probes_write_them(address: str, upstream: Upstream) -> None:
    asked = {"messages": messages(SAFE_URL)}
    found = httpx.post(f"{address}/v1/chat/completions/?api-version=1", json=asked, timeout=600)
    assert found.status_code == 200 and len(upstream.requests) == 1, "no redirect, which many clients do not follow"
    for path in ("/livez", "/readyz", "/v1/models", "/openapi.json"):
        whole, head = httpx.get(address + path), httpx.head(address + path)
        assert head.status_code == whole.status_code == 200 and not head.content, path
        assert head.headers["content-length"] == whole.headers["content-length"]


def test_a_packed_body_is_named(address: str) -> None:
    headers, content = {"content-encoding": "gzip"}, gzip.compress(b'{"messages": []}')
    for path in ("chat/completions", "responses", "guard"):
        found = httpx.post(f"{address}/v1/{path}", content=content, headers=headers)
        assert found.status_code == 415 and "'content-encoding: gzip'" in found.json()["error"]["message"]


def test_another_method_is_told_which_is_allowed(address: str) -> None:
    found = httpx.get(f"{address}/v1/chat/completions")
    assert found.status_code == 405 and found.headers["allow"] == "POST"
    assert found.json()["error"]["code"] == "method_not_allowed" and "POST" in found.json()["error"]["message"]


def test_slow_clients_that_are_turned_away_hold_no_place(bundle: Path, upstream: Upstream) -> None:
    options = GatewayOptions(max_concurrent=1, body_timeout=0.4)
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
        host, port = url.removeprefix("http://").split(":")
        held = [socket.create_connection((host, int(port))) for _ in range(4)]
        for each in held:
            each.sendall(b"POST /v1/guard HTTP/1.1\r\nhost: a\r\ncontent-length: 500\r\n\r\n{")
        statuses = []
        for each in held:
            with each:
                statuses.append(each.recv(65536).split(b" ")[1])
        assert ask(url, {"messages": messages(SAFE_URL)}).status_code == 200
    assert b"408" in statuses and set(statuses) <= {b"408", b"503"}


def test_small_files_of_large_pictures_do_not_fill_the_memory(bundle: Path, upstream: Upstream) -> None:
    options = GatewayOptions(max_pixels=10_000)
    large, whole = data_url(png(Image.new("L", (90, 90)))), data_url(png(Image.new("L", (100, 100))))
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
        assert options.max_held == 160_000
        for _ in range(6):  # 48 pictures, three times what may be held: those of earlier requests are not
            found = httpx.post(f"{url}/v1/guard", json={"images": [large] * 8}, timeout=600)
            assert found.status_code == 200, found.text
        assert ask(url, {"messages": messages(whole)}).status_code == 200
    options = GatewayOptions(max_pixels=10_000, max_images=50)
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
        found = httpx.post(f"{url}/v1/guard", json={"images": [whole] * 40}, timeout=600)
        assert found.status_code == 503 and "160000 pixels are the maximum" in found.json()["error"]["message"]
        assert httpx.post(f"{url}/v1/guard", json={"images": [whole] * 8}, timeout=600).status_code == 200


@pytest.mark.parametrize("rows", [0, 2])
def test_a_batch_of_too_few_or_many_rows_ends_no_worker(bundle: Path, upstream: Upstream, rows: int) -> None:
    gateway = Gateway.open(bundle, upstream=upstream.url, options=GatewayOptions(guard_timeout=600))
    assert gateway.gate.guard is not None
    runner: Any = gateway.gate.guard.runner
    values = np.full((rows, 20), 0.05, np.float32)
    with serving(gateway) as url:
        runner.infer = lambda _: GuardOutput(probs=values, logits=values)
        refused = ask(url, {"messages": messages(SAFE_URL)})
        del runner.infer
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "guard_error")
        assert not upstream.requests
        assert ask(url, {"messages": messages(SAFE_URL)}).status_code == 200
        assert httpx.get(f"{url}/healthz").json()["guard"] == "ready"


def test_paths_and_methods_that_there_are_none_of(address: str) -> None:
    for found, status in (
        (httpx.get(f"{address}/v1/embeddings"), 404),
        (httpx.get(f"{address}/v1/chat/completions"), 405),
    ):
        assert found.status_code == status and found.json()["error"]["type"] == "invalid_request_error"


def test_a_model_name_without_utf_8(address: str) -> None:
    content = (
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "%s"}]}]}'
    )
    found = httpx.post(f"{address}/v1/chat/completions", content=content % UNSAFE_URL.encode())
    assert found.status_code == 400 and found.json()["error"]["param"] == "model"


def test_a_bug_is_answered_and_logged_without_what_was_asked(
    bundle: Path, upstream: Upstream, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = " ".join(["private", "words"])  # a traceback shows this file's lines

    def fault(*_: Any, **__: Any) -> Any:
        raise RuntimeError(secret)

    monkeypatch.setattr("runtimes.gateway.running.safe_vlm", fault)
    with caplog.at_level(logging.DEBUG), serving(Gateway.open(bundle, upstream=upstream.url)) as url:
        found = ask(url, {"messages": messages(SAFE_URL)})
        assert found.status_code == 500 and found.json()["error"]["type"] == "server_error"
    assert not upstream.requests
    told = [record.getMessage() for record in caplog.records if record.name.startswith("runtimes")]
    assert any("RuntimeError" in each and "in fault" in each for each in told)
    assert secret not in caplog.text


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.0.1", "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1"),
        *("::1", "::", "fe80::1", "fec0::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"),
        *("2002:7f00:1::", "2001:0:1::1"),
    ],
)
def test_addresses_that_are_inside(address: str) -> None:
    assert not public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are_outside(address: str) -> None:
    assert public(ipaddress.ip_address(address))
