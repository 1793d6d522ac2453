"""An upstream that is down, slow, broken or gone: an error of OpenAI's shape, never a silent end."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from runtimes.gateway.app import Gateway
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.upstream.address import check_speaks_http
from safevlm.errors import InputError
from tests.runtimes.gateway.servers import SAFE_URL, Upstream, _Upstream, answer, free_port, messages, piece, serving


@contextlib.contextmanager
def waiting(bundle: Path, upstream: Upstream, seconds: float) -> Iterator[str]:
    """A gateway that waits so long for its upstream."""
    options = GatewayOptions(idle_timeout=seconds, total_timeout=seconds, max_reply=100_000)
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
        yield url


@pytest.fixture(scope="module")
def patient(bundle: Path, shared_upstream: Upstream) -> Iterator[str]:
    with waiting(bundle, shared_upstream, 600.0) as url:
        yield url


@pytest.fixture(scope="module")
def impatient(bundle: Path, shared_upstream: Upstream) -> Iterator[str]:
    """For what never comes: whatever a busy machine delays is late here, too."""
    with waiting(bundle, shared_upstream, 2.0) as url:
        yield url


@pytest.fixture
def client(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    """Of a gateway that waits, except for an upstream that says no more."""
    fault = request.node.callspec.params.get("fault") if hasattr(request.node, "callspec") else None
    url = request.getfixturevalue("impatient" if fault in ("silent", "stalls", "drips") else "patient")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-none", max_retries=0, timeout=600) as client:
        yield client


def ask(client: openai.OpenAI, *, stream: bool = False) -> Any:
    return client.chat.completions.create(model="fake", messages=messages(SAFE_URL), stream=stream)  # type: ignore[call-overload]


def silent(handler: Any, _: Any) -> None:
    wait_until_left(handler)


def wait_until_left(handler: Any) -> None:
    """Return when the gateway has closed its connection; what it may still send is read."""
    handler.connection.settimeout(600)
    with contextlib.suppress(OSError):
        while handler.connection.recv(1):
            pass
    handler.close_connection = True


def hung_up(handler: Any, _: Any) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def cut_off(handler: Any, _: Any) -> None:
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    hung_up(handler, None)


def redirected(handler: Any, _: Any) -> None:
    handler.send_response(307)
    handler.send_header("location", "http://elsewhere.example/v1/chat/completions")
    handler.send_header("content-length", "0")
    handler.end_headers()


def dripping(handler: Any, _: Any) -> None:
    handler.begin_stream()
    handler.event(piece("The "))
    with contextlib.suppress(OSError):  # who is told nothing whole for too long hangs up
        while True:
            handler.wfile.write(b"d")
            handler.wfile.flush()
            time.sleep(0.2)
    handler.close_connection = True


WHOLE = {
    "garbage": (lambda h, _: h.reply(b"<html>", kind="text/html"), 502, "not JSON"),
    "no completion": (lambda h, _: h.reply({"hello": 1}), 502, "not a chat completion"),
    "a list": (lambda h, _: h.reply([1]), 502, "not a JSON object"),
    "deep": (lambda h, _: h.reply(b"[" * 50_000), 502, "not JSON"),
    "no number": (lambda h, _: h.reply(b'{"choices": [{"logprob": -Infinity}]}'), 502, "not JSON"),
    "huge": (lambda h, _: h.reply(b" " * 300_000), 502, "more than 100000 bytes"),
    "500 without an error": (lambda h, _: h.reply({}, status=500), 500, "HTTP 500"),
    "redirects": (redirected, 502, "redirect"),
    "silent": (silent, 504, "in time"),
    "hangs up": (hung_up, 502, "broke"),
    "dies midway": (cut_off, 502, "broke"),
}


@pytest.mark.parametrize("fault", WHOLE)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_that_is_none(client: openai.OpenAI, upstream: Upstream, fault: str, stream: bool) -> None:
    upstream.behave, status, word = WHOLE[fault]
    with pytest.raises(openai.APIStatusError) as told:
        ask(client, stream=stream)
    assert told.value.status_code == status
    body: Any = told.value.body
    assert body["type"] == "upstream_error"
    if not stream:
        assert word in body["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_upstreams_own_errors_pass(client: openai.OpenAI, upstream: Upstream, stream: bool) -> None:
    error = {"error": {"message": "no such model", "type": "invalid_request_error", "code": None, "param": "model"}}
    upstream.behave = lambda handler, _: handler.reply(error, status=404)
    with pytest.raises(openai.NotFoundError, match="no such model"):
        ask(client, stream=stream)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (422, "application/json", {"detail": [{"loc": ["body", "n"], "msg": "no such thing", "type": "x"}]}),
        (400, "application/json", {"object": "error", "message": "no such thing", "type": "BadRequest", "code": 400}),
        (503, "text/html", b"<html><body>no such thing</body></html>"),
        (500, "text/plain", b"no such thing"),
    ],
)
def test_errors_in_other_shapes_pass(
    client: openai.OpenAI, upstream: Upstream, stream: bool, status: int, kind: str, body: Any
) -> None:
    upstream.behave = lambda handler, _: handler.reply(body, status, kind)
    with pytest.raises(openai.APIStatusError, match="no such thing") as told:
        ask(client, stream=stream)
    assert told.value.status_code == status


def test_a_whole_answer_may_be_silent_for_longer_than_a_stream(bundle: Path, upstream: Upstream) -> None:
    def pausing(handler: Any, body: Any) -> None:
        time.sleep(0.6)
        answer(handler, body)

    options = GatewayOptions(idle_timeout=0.1, total_timeout=600)
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
        for stream, behave, status in ((False, pausing, 200), (True, silent, 504)):
            upstream.behave = behave
            body = {"messages": messages(SAFE_URL), "stream": stream}
            assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == status


def test_comments_keep_a_stream_open_and_errors_in_it_have_the_usual_shape(patient: str, upstream: Upstream) -> None:
    flat = {"object": "error", "message": "out of memory", "type": "InternalServerError", "code": 500}
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}

    def behave(handler: Any, body: Any) -> None:
        handler.begin_stream()
        handler.wfile.write(b": ping\n\n: ping\r\n\r\n")
        for each in (piece("The "), usage, flat, b"[DONE]"):
            handler.event(each)
        handler.close_connection = True

    upstream.behave = behave
    found = httpx.post(f"{patient}/v1/chat/completions", json={"messages": messages(SAFE_URL), "stream": True}).text
    lines = [line for line in found.split("\n") if line]
    assert lines[:2] == [": keep-alive"] * 2 and lines[-1] == "data: [DONE]"
    assert json.loads(lines[3][6:]) == usage
    assert json.loads(lines[4][6:])["error"]["message"] == "out of memory"


def test_a_key_that_is_no_ascii_is_no_fault_of_this_server(address: str, upstream: Upstream) -> None:
    found = httpx.post(
        f"{address}/v1/chat/completions",
        json={"messages": messages(SAFE_URL)},
        headers={b"authorization": "Bearer \xfc".encode("latin-1")},
    )
    assert found.status_code == 200 and upstream.headers_seen[-1]["authorization"] == "Bearer \xfc"


@pytest.mark.parametrize("name", ["req_1.2:a/b", "x" * 201, "a b", "<script>", "\xff", "a\tb"])
def test_a_request_id_goes_upstream_only_where_a_log_can_hold_it(name: str, address: str, upstream: Upstream) -> None:
    headers = {b"x-request-id": name.encode("latin-1")}
    found = httpx.post(f"{address}/v1/chat/completions", json={"messages": messages(SAFE_URL)}, headers=headers)
    kept = upstream.headers_seen[-1].get("x-request-id")
    assert found.status_code == 200 and kept == (name if name == "req_1.2:a/b" else None)


def events(*bodies: Any, end: Any = None) -> Any:
    def behave(handler: Any, _: Any) -> None:
        handler.begin_stream()
        for body in bodies:
            if callable(body):
                body()
            else:
                handler.event(body)
        if end is not None:
            handler.wfile.write(end)
        handler.close_connection = True

    return behave


def stalling(handler: Any, _: Any) -> None:
    handler.begin_stream()
    handler.event(piece("The "))
    wait_until_left(handler)


STREAMS = {
    "dies midway": (events(piece("The ")), "ended before it was complete"),
    "garbage": (events(piece("The "), b"<html>"), "not JSON"),
    "no events": (events(piece("The "), end=b"what is this\n\n"), "something other than events"),
    "stalls": (stalling, "in time"),
    "drips": (dripping, "in time"),
    "never ends": (events(piece("The "), *[piece("x" * 5000)] * 40), "more than 100000 bytes"),
}


@pytest.mark.parametrize("fault", STREAMS)
def test_a_stream_that_fails_says_so(client: openai.OpenAI, upstream: Upstream, fault: str) -> None:
    upstream.behave, word = STREAMS[fault]
    said = ""
    with pytest.raises(openai.APIError, match=word), ask(client, stream=True) as stream:
        for each in stream:
            said += each.choices[0].delta.content or ""
    assert said.startswith("The "), "what came before was passed on"


def test_other_fields_of_events_are_no_garbage(client: openai.OpenAI, upstream: Upstream) -> None:
    def behave(handler: Any, _: Any) -> None:
        handler.begin_stream()
        handler.wfile.write(b"event: message\nid: 3\nretry: 10\n")
        handler.event(piece("The ", "stop"))
        handler.event(b"[DONE]")
        handler.close_connection = True

    upstream.behave = behave
    with ask(client, stream=True) as stream:
        assert [each.choices[0].delta.content for each in stream] == ["The "]


def test_half_a_surrogate_pair_goes_through(client: openai.OpenAI, upstream: Upstream) -> None:
    broken = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "a \ud83d"}, "finish_reason": "stop"}]
    }
    upstream.behave = lambda handler, _: handler.reply(json.dumps(broken).encode())
    assert ask(client).choices[0].message.content == "a \ud83d"


def test_when_to_come_again_is_passed_on(patient: str, upstream: Upstream) -> None:
    def busy(handler: Any, _: Any) -> None:
        content = b'{"error": {"message": "too many"}}'
        handler.send_response(429)
        handler.send_header("retry-after", "7")
        handler.send_header("set-cookie", "a=b")
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    upstream.behave = busy
    for stream in (False, True):
        body = {"messages": messages(SAFE_URL), "stream": stream}
        found = httpx.post(f"{patient}/v1/chat/completions", json=body)
        assert (found.status_code, found.headers["retry-after"]) == (429, "7") and "set-cookie" not in found.headers


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_upstream_that_quotes_this_servers_key(bundle: Path, upstream: Upstream, stream: bool) -> None:
    """A client may see what is said of its own key, and nothing of ours."""
    error = {"error": {"message": "no such key: sk-of-the-server", "type": "invalid_request_error"}}
    upstream.behave = lambda handler, _: handler.reply(error, status=401)
    body = {"messages": messages(SAFE_URL), "stream": stream}
    with serving(Gateway.open(bundle, upstream=upstream.url, key="sk-of-the-server")) as url:
        found = httpx.post(f"{url}/v1/chat/completions", json=body)
        own = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer mine"})
    assert found.status_code == 502 and "sk-of" not in found.text and "server's key" in found.text
    assert own.status_code == 401 and upstream.headers_seen[-1]["authorization"] == "Bearer mine"


def test_an_upstream_that_is_down(bundle: Path) -> None:
    with serving(Gateway.open(bundle, upstream=f"http://127.0.0.1:{free_port()}/v1")) as url:
        found = httpx.post(f"{url}/v1/chat/completions", json={"messages": messages(SAFE_URL)})
        assert found.status_code == 502 and found.json()["error"]["code"] == "upstream_unreachable"
        health = httpx.get(f"{url}/healthz")
        assert health.status_code == 200 and health.json()["upstream"] == "unreachable"
        assert "127.0.0.1" not in found.text
        judged = httpx.post(f"{url}/v1/guard", json={"images": [SAFE_URL]})
        assert judged.json()["data"][0]["verdict"] == "allow", "the guard needs no upstream"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_leaves_ends_its_request_upstream(address: str, upstream: Upstream, stream: bool) -> None:
    begun, ended = threading.Event(), threading.Event()

    def watch(handler: Any, _: Any) -> None:
        if stream:
            handler.begin_stream()
            handler.event(piece("The "))
        begun.set()
        wait_until_left(handler)
        ended.set()

    upstream.behave = watch
    body = json.dumps({"messages": messages(SAFE_URL), "stream": stream}).encode()
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        assert begun.wait(600)
    assert ended.wait(600), "the request went on upstream after its client had left"


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://x", "http://user:pw@x/v1", "http://x/v1?key=1", "http://x/v1#part", "nonsense", "http://"),
        *("http://x:99999/v1", "http://x:0/v1", "http://a..b/v1", f"http://{'a' * 70}.example/v1", "http://[::1/v1"),
    ],
)
def test_addresses_that_are_none(bundle: Path, url: str) -> None:
    from runtimes.gateway.app import create_app

    with pytest.raises(InputError, match="--upstream"):
        create_app(Gateway.open(bundle, upstream=url))


@pytest.mark.parametrize(("status", "ready"), [(200, True), (401, True), (404, True), (503, False), (502, False)])
def test_an_upstream_that_is_still_loading_is_not_ready(
    bundle: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, status: int, ready: bool
) -> None:
    monkeypatch.setattr(_Upstream, "do_GET", lambda handler: handler.reply({}, status))
    with serving(Gateway.open(bundle, upstream=upstream.url)) as url:
        assert (httpx.get(f"{url}/readyz").status_code == 200) == ready
        assert httpx.get(f"{url}/livez").status_code == 200


def test_a_base_url_without_models_is_warned_of_before_the_start(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_speaks_http(upstream.url)
    assert not caplog.text
    monkeypatch.setattr(_Upstream, "do_GET", lambda handler: handler.reply({}, 404))
    check_speaks_http(upstream.url)
    assert "ends in /v1" in caplog.text


def test_certificates_that_cannot_be_read_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(InputError, match="SSL_CERT_FILE"):
        check_speaks_http("https://127.0.0.1:9/v1")
    check_speaks_http("http://127.0.0.1:9/v1")
