"""Clients that send half, never read, flood or babble: they are told or cut off, and all others are served."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtimes.gateway.app import Gateway
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.server import Connection
from runtimes.gateway.serving import ACCESS
from tests.runtimes.gateway.servers import SAFE_URL, Upstream, answer, messages, piece, serving

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n"
BODY = json.dumps({"messages": messages(SAFE_URL)}).encode()
STREAMED = json.dumps({"messages": messages(SAFE_URL), "stream": True}).encode()


def connected(url: str, *, buffer: int = 0) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    client = socket.socket()
    client.settimeout(600)
    if buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.connect((host, int(port)))
    return client


def asked(url: str, body: bytes, **more: Any) -> socket.socket:
    client = connected(url, **more)
    client.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
    return client


def until_closed(client: socket.socket) -> bytes:
    """Return all that comes until the server closes, or resets, the connection."""
    content = bytearray()
    with client, contextlib.suppress(ConnectionError):
        while piece := client.recv(65536):
            content += piece
    return bytes(content)


def told(answer: bytes) -> tuple[int, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split(b" ")[1]), json.loads(body)["error"]


@pytest.fixture(scope="module")
def hasty(bundle: Path, shared_upstream: Upstream) -> Iterator[str]:
    """A gateway that waits for heads for a moment only."""
    options = GatewayOptions(header_timeout=0.3, max_body=1000)
    with serving(Gateway.open(bundle, upstream=shared_upstream.url, options=options)) as url:
        yield url


@pytest.mark.parametrize("head", [b"P", b"POST /v1/chat", HEAD, HEAD + b"x-a: " + b"a" * 1000])
def test_half_a_head_gets_an_answer_and_no_more_time(hasty: str, head: bytes) -> None:
    client = connected(hasty)
    client.sendall(head)
    status, error = told(until_closed(client))
    assert (status, error["code"]) == (408, "timeout") and "0.3 s" in error["message"]


def test_a_client_that_says_nothing_is_closed(hasty: str) -> None:
    assert until_closed(connected(hasty)) == b""


def test_dripping_wins_no_time(hasty: str) -> None:
    client, stop = connected(hasty), threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.05):
                client.sendall(b"G")

    thread = threading.Thread(target=drip)
    thread.start()
    found = until_closed(client)
    stop.set()
    thread.join()
    assert not found or told(found)[0] == 408


def test_half_a_second_head_on_a_connection_that_was_served(hasty: str) -> None:
    client = connected(hasty)
    client.sendall(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\nGET /hea")
    found = until_closed(client)
    assert found.startswith(b"HTTP/1.1 200") and told(found[found.rindex(b"HTTP/1.1") :])[0] == 408


def test_the_rest_of_a_refused_body_is_not_waited_for_without_end(hasty: str) -> None:
    client = connected(hasty)
    client.sendall(HEAD + b"content-length: 500000\r\n\r\n{")
    assert client.recv(65536).split(b" ")[1] == b"413"
    with contextlib.suppress(ConnectionError):
        client.sendall(b"{")
    until_closed(client)


BABBLE = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "a long head": (HEAD + b"x-a: " + b"a" * 300_000 + b"\r\n\r\n", 431),
    "a long head without an end": (b"GET /" + b"a" * 100_000, 431),
    "many headers": (HEAD + b"".join(b"x-%d: 1\r\n" % number for number in range(500)) + b"\r\n", 431),
    "tiny chunks": (HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 50_000, 400),
    "a broken chunk": (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    "two lengths": (HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
    "length and chunks": (HEAD + b"content-length: x\r\ntransfer-encoding: chunked\r\n\r\n", 400),
}


@pytest.mark.parametrize("kind", BABBLE)
def test_what_is_no_request_gets_an_error_of_the_usual_shape(address: str, kind: str) -> None:
    content, status = BABBLE[kind]
    client = connected(address)
    with contextlib.suppress(ConnectionError):
        client.sendall(content)
    found = until_closed(client)
    if len(content) < 50_000:  # otherwise the reset of what was not read may overtake the answer
        assert told(found)[0] == status
    else:
        assert not found or told(found)[0] == status
    assert httpx.get(f"{address}/healthz").status_code == 200


def floods(handler: Any, body: Any) -> None:
    """Stream without end, to whoever asks for a stream."""
    if not body.get("stream"):
        answer(handler, body)
        return
    handler.begin_stream()
    with contextlib.suppress(OSError):
        while True:
            handler.event(piece("x" * 50_000))
    handler.close_connection = True


@pytest.mark.parametrize(
    "times", [{"write_timeout": 0.5}, {"write_timeout": 600.0, "total_timeout": 2.0}], ids=["write", "total"]
)
def test_a_client_that_never_reads_loses_its_place(bundle: Path, upstream: Upstream, times: dict[str, float]) -> None:
    options = GatewayOptions(max_concurrent=1, max_reply=2**40, **times)  # type: ignore[arg-type]
    upstream.behave = floods
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
        with asked(url, STREAMED, buffer=4096) as client:
            assert client.recv(12) == b"HTTP/1.1 200"
            while (found := httpx.post(f"{url}/v1/chat/completions", content=BODY)).status_code == 503:
                assert found.json()["error"]["code"] == "overloaded"
            assert found.status_code == 200
        assert "in_flight 0.0" in httpx.get(f"{url}/metrics").text


def test_the_log_says_of_a_stream_how_it_ended(
    bundle: Path, upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks_off(handler: Any, _: Any) -> None:
        handler.begin_stream()
        handler.event(piece("The "))
        handler.close_connection = True

    options = GatewayOptions(write_timeout=0.5, max_reply=2**40)
    with (
        caplog.at_level(logging.INFO, ACCESS),
        serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url,
    ):
        httpx.post(f"{url}/v1/chat/completions", content=STREAMED)
        upstream.behave = breaks_off
        httpx.post(f"{url}/v1/chat/completions", content=STREAMED)
        content = json.dumps({"input": "Hello", "stream": True})
        httpx.post(f"{url}/v1/responses", content=content)
        upstream.behave = floods
        with asked(url, STREAMED, buffer=4096) as client:
            assert client.recv(12) == b"HTTP/1.1 200"
            while "in_flight 0.0" not in httpx.get(f"{url}/metrics").text:
                time.sleep(0.05)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == ACCESS]
    ends = [line["outcome"] for line in lines if line["path"] != "/metrics"]
    assert ends == ["allowed", "stream_failed", "stream_failed", "client_gone"]


def test_an_answer_that_is_not_taken_is_thrown_away(
    bundle: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, check = threading.Event(), Connection._check_written

    def checked(self: Connection, size: int, since: float) -> None:
        check(self, size, since)
        if self.transport.is_closing():
            lost.set()

    monkeypatch.setattr(Connection, "_check_written", checked)
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "x" * 12_000_000}}]}
    upstream.behave = lambda handler, _: handler.reply(body)
    options = GatewayOptions(write_timeout=0.3)
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
        client = asked(url, BODY, buffer=4096)
        assert client.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
        assert lost.wait(600)
        assert len(until_closed(client)) < 12_000_000


def test_idle_connections_make_room(bundle: Path, upstream: Upstream) -> None:
    options = GatewayOptions(max_connections=8)
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url, httpx.Client() as client:
        assert client.get(f"{url}/healthz").status_code == 200
        held = [connected(url) for _ in range(100)]
        for each in held[:50]:
            with contextlib.suppress(ConnectionError):
                each.sendall(HEAD)
        assert client.post(f"{url}/v1/chat/completions", content=BODY).status_code == 200
        assert httpx.post(f"{url}/v1/chat/completions", content=BODY).status_code == 200
        found = until_closed(held[0])
        assert not found or told(found)[0] == 503
        for each in held:
            each.close()


@pytest.mark.parametrize("body", [BODY, STREAMED], ids=["whole", "streamed"])
def test_a_place_is_free_when_its_answer_is_read(bundle: Path, upstream: Upstream, body: bytes) -> None:
    options = GatewayOptions(max_concurrent=1)
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
        for _ in range(64):
            with httpx.stream("POST", f"{url}/v1/chat/completions", content=body) as response:
                assert response.status_code == 200
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        break


@pytest.mark.parametrize("content", [b"[],", b'{"a":', b'"",', b"1,"])
def test_small_bodies_that_become_large_are_refused(address: str, content: bytes) -> None:
    found = httpx.post(f"{address}/v1/chat/completions", content=b"[" + content * 2_000_000)
    assert (found.status_code, found.json()["error"]["code"]) == (400, "json_too_large")


def test_a_third_of_64_clients_attacks_and_all_others_are_served(bundle: Path, upstream: Upstream) -> None:
    options = GatewayOptions(
        header_timeout=1, write_timeout=1, body_timeout=1, max_connections=200, guard_timeout=600, max_reply=2**40
    )
    upstream.behave = floods
    stop = threading.Event()
    failed: list[Any] = []

    def attack(url: str, number: int) -> None:
        kinds = [HEAD, b"\x00garbage\r\n\r\n", HEAD + b"content-length: 500\r\n\r\n{", b""]
        while not stop.wait(0.05):
            with contextlib.suppress(OSError):
                if number % 6 < 4:
                    with connected(url) as client:
                        client.sendall(kinds[number % 6])
                        client.settimeout(1)
                        client.recv(100)
                elif number % 6 == 4:  # never reads
                    with asked(url, STREAMED, buffer=4096):
                        stop.wait(2)
                else:  # resets
                    client = asked(url, BODY)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    client.close()

    def be_honest(url: str) -> None:
        try:
            with httpx.Client(base_url=url) as client:
                for _ in range(3):
                    while (found := client.post("/v1/chat/completions", content=BODY)).status_code == 503:
                        stop.wait(float(found.headers["retry-after"]))  # as the openai client does
                    assert found.status_code == 200, found.text
        except Exception as error:
            failed.append(error)

    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
        attackers = [threading.Thread(target=attack, args=(url, number)) for number in range(21)]
        honest = [threading.Thread(target=be_honest, args=(url,)) for _ in range(43)]
        for each in (*attackers, *honest):
            each.start()
        for each in honest:
            each.join()
        assert httpx.get(f"{url}/healthz").status_code == 200
        stop.set()
        for each in attackers:
            each.join()
    assert not failed
