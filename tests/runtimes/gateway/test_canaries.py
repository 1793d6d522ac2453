"""What clients and upstream say stands in no log and no metric: secrets in every place, in good requests and bad."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import PngImagePlugin

from runtimes.gateway.serving.clients import digest_of
from tests.runtimes.gateway.servers import SAFE, SAFE_URL, UNSAFE_URL, Upstream, data_url, messages, piece
from tests.runtimes.gateway.test_command import gateway
from tests.runtimes.gateway.test_reload import wait_for

CANARY = "canary{:03}"
"""With a number of its own for each place, so that a find says where it came from."""
CLIENT_KEY, UPSTREAM_KEY, OTHER_KEY = "sk-canary-client", "sk-canary-upstream", "sk-canary-other"
CHAT = "/v1/chat/completions"


def marked_image() -> str:
    """Return a data URL of a safe image whose file holds a canary beside its pixels."""
    buffer, about = io.BytesIO(), PngImagePlugin.PngInfo()
    about.add_text("Comment", "canary-image")
    SAFE.save(buffer, "PNG", pnginfo=about)
    return data_url(buffer.getvalue())


def bodies() -> Iterator[Any]:
    """Yield requests, good and bad, with a canary in one place each."""
    number = itertools.count()

    def canary() -> str:
        return CANARY.format(next(number))

    def body(**more: Any) -> dict[str, Any]:
        return {"messages": messages(marked_image(), text=canary()), **more}

    function = {"name": canary(), "description": canary(), "parameters": {"type": "object", "title": canary()}}
    call = {"id": canary(), "type": "function", "function": {"name": canary(), "arguments": f'{{"a": "{canary()}"}}'}}
    yield body()
    yield body(model=canary(), user=canary(), metadata={canary(): canary()}, stop=[canary()])
    yield body(tools=[{"type": "function", "function": function}])
    yield {"messages": [*body()["messages"], {"role": "assistant", "tool_calls": [call]}]}
    yield body(stream=True)
    yield {"messages": messages(UNSAFE_URL, text=canary()), "model": canary()}
    yield {"messages": messages(UNSAFE_URL, text=canary()), "model": canary(), "stream": True}
    yield body(**{canary(): canary()})  # from here on what is refused
    yield body(temperature=canary())
    yield body(model={canary(): canary()})
    yield body(tools=[{"type": canary()}])
    yield body(tools=[{"type": "function", "function": {**function, "description": SAFE_URL + canary()}}])
    yield {"messages": [{"role": canary(), "content": canary()}]}
    yield {"messages": [{"role": "user", "content": [{"type": canary(), canary(): canary()}]}]}
    yield {"messages": [{"role": "user", "content": f"![](data:image/png;base64,{canary()})"}]}
    for url in (
        "http://{0}.invalid/{0}.png?{0}",
        "data:image/png;base64,{0}",
        "data:{0};base64,AAAA",
        "{0}",
        "file:///{0}",
    ):
        yield {"messages": messages(url.format(canary()))}
    yield {"messages": messages(SAFE_URL[:200] + "canaryimage" + SAFE_URL[200:])}
    yield f'{{"messages": "{canary()}'
    yield canary()


def upstream_faults() -> Iterator[Callable[[Any, Any], None]]:
    """Yield what an upstream may do that quotes a canary, or what it was sent."""
    quoted = f"canary-upstream {UPSTREAM_KEY}"

    def says(status: int, **headers: str) -> Callable[[Any, Any], None]:
        def behave(handler: Any, body: Any) -> None:
            content = json.dumps({"error": {"message": quoted, "code": quoted, "type": quoted, "you": body}}).encode()
            handler.send_response(status)
            for name, value in {"content-length": str(len(content)), "x-canary": quoted, **headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(content)

        return behave

    yield from (says(status) for status in (400, 401, 404, 422, 429, 500, 503, 200, 204))
    yield says(302, location=f"http://canary-location.invalid/{UPSTREAM_KEY}")
    yield says(200, **{"content-type": "text/event-stream"})
    yield says(200, **{"content-encoding": "canary"})
    yield lambda handler, _: handler.reply(quoted.encode())
    yield lambda handler, _: handler.reply({"choices": quoted})

    def raw(content: bytes) -> Callable[[Any, Any], None]:
        def behave(handler: Any, _: Any) -> None:
            handler.wfile.write(content)
            handler.close_connection = True

        return behave

    yield raw(b"canary-raw is no HTTP\r\n\r\n")
    yield raw(b"HTTP/1.1 200 canary-raw\r\ncanary-header\r\n\r\n")
    yield raw(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\ncanary-raw")
    yield raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\ncanary-raw\r\n")

    def broken_stream(last: bytes) -> Callable[[Any, Any], None]:
        def behave(handler: Any, _: Any) -> None:
            handler.begin_stream()
            handler.event(piece("canary-piece"))
            handler.wfile.write(last)
            handler.close_connection = True

        return behave

    for last in (
        b"canary-line\n\n",
        b"data: canary-data\n\n",
        b'data: {"error": {"message": "canary-error"}}\n\n',
        b"",
    ):
        yield broken_stream(last)


RAW = (
    b"canary-method /v1/models HTTP/1.1\r\nhost: a\r\n\r\n",
    b"CANARY-METHOD /v1/models HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /canary-path?canary-query HTTP/1.1\r\nhost: canary-host\r\ncookie: canary-cookie\r\n\r\n",
    b"GET /v1/models/canary-model HTTP/1.1\r\nhost: a\r\nauthorization: Bearer sk-canary-client\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nhost: a\r\nauthorization: Bearer sk-canary-wrong\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nhost: a\r\nauthorization: canary-scheme\xff\r\nx-request-id: canary-id\r\n\r\n",
    b"GET /\xff\xfecanary HTTP/1.1\r\n\r\n",
    b"GET http://canary-host:canary/ HTTP/1.1\r\nhost: a\r\n\r\n",
    b"canary-no-http\r\n\r\n",
    b"\x16\x03\x01canary\r\n\r\n",
    b"GET / HTTP/1.1\r\ncanary-header\r\n\r\n",
    b"GET / HTTP/9.canary\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x-canary: canary\r\n" * 200 + b"\r\n",
    b"POST /v1/guard HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\ncanary\r\n",
    b"POST /v1/guard HTTP/1.1\r\nhost: a\r\ncontent-length: canary\r\n\r\n",
    b"GET /canary-half HTTP/1.1\r\nx-canary: ",
)


def spoken(url: str, content: bytes) -> bytes:
    """Send bytes as they are, and return what comes until the connection is closed."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 600) as client, contextlib.suppress(ConnectionError):
        client.sendall(content.replace(b"host:", b"connection: close\r\nhost:"))
        return b"".join(iter(lambda: client.recv(65536), b""))
    return b""


def ask(url: str, body: Any, key: str = CLIENT_KEY) -> httpx.Response:
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"authorization": f"Bearer {key}", "x-canary": "canary-header", "cookie": "canary-cookie"}
    return httpx.post(f"{url}{CHAT}", content=content, headers=headers)


def test_no_log_and_no_metric_repeats_what_anybody_said(bundle: Path, upstream: Upstream, tmp_path: Path) -> None:
    clients, key = tmp_path / "clients.toml", tmp_path / "key"
    clients.write_text(f'[[client]]\nname = "shop"\nkey_sha256 = "{digest_of(CLIENT_KEY)}"\n')
    key.write_text(f"{UPSTREAM_KEY}\n")
    for each in (clients, key):
        each.chmod(0o600)
    served = ["--bundle", str(bundle), "--upstream", upstream.url, "--header-timeout", "1", "--idle-timeout", "600"]
    ids: list[str] = []
    with gateway(*served, "--client-keys", str(clients), "--upstream-key-file", str(key)) as (process, url):
        for body in bodies():
            ids.append(ask(url, body).headers["x-request-id"])
            ids.append(ask(url, body, OTHER_KEY).headers["x-request-id"])
        assert {each["authorization"] for each in upstream.headers_seen} == {f"Bearer {UPSTREAM_KEY}"}
        assert any("canary000" in json.dumps(each) for each in upstream.requests), "the places are looked at"
        for upstream.behave, stream in itertools.product(upstream_faults(), (False, True)):
            found = ask(url, {"messages": messages(SAFE_URL, text="canary-prompt"), "stream": stream})
            assert UPSTREAM_KEY not in found.text
            ids.append(found.headers["x-request-id"])
        unread = [spoken(url, each) for each in RAW]
        assert [sent for sent, each in zip(RAW, unread, strict=True) if b"x-request-id: " not in each.lower()] == []
        ids += [each.lower().split(b"x-request-id: ")[1].split(b"\r\n")[0].decode() for each in unread]
        clients.write_text(f'[[client]]\nname = "canary-name!"\nkey_sha256 = "{CLIENT_KEY}"\nkey = "{CLIENT_KEY}"\n')
        process.send_signal(signal.SIGHUP)
        wait_for(url, "failed", 1)
        metrics = httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    logged = [line["id"] for line in lines]
    assert len(set(logged)) == len(logged) and set(ids) <= set(logged)
    told = {"stdout": out, "stderr": err, "metrics": metrics}
    for place, text in told.items():
        found_in = [line for line in text.splitlines() if "canary" in line.lower()]
        assert not found_in, f"{place}: {found_in[:3]}"
        for secret in (marked_image()[30:70], digest_of(CLIENT_KEY), "127.0.0.1:", "Traceback"):
            allowed = place == "stderr" and secret == "127.0.0.1:"  # the address that is served on
            assert allowed or secret not in text, f"{place}: {secret}"


@pytest.mark.parametrize("option", ["--api-key-env", "--upstream-key-env"])
def test_a_key_in_place_of_its_variables_name_is_not_repeated(
    option: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from runtimes.gateway.__main__ import main
    from safevlm.terminal.commandline import run

    with pytest.raises(SystemExit) as ended:
        run(main, ["--bundle", str(bundle), "--upstream", "http://127.0.0.1:9/v1", option, UPSTREAM_KEY])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "not the key itself" in err and UPSTREAM_KEY not in err
