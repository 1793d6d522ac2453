"""The compose file's parts, started by hand: Caddy with the Caddyfile → the gateway with compose's options → a model.

The model's server is one that a test can hold up, a ``llama-server`` where there is one (on PATH, or named by
SAFEVLM_LLAMA_SERVER), or a second gateway that answers with the same GGUF files.
"""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.deploy.parts import DEPLOY, GIVEN, services, tool
from tests.runtimes.gateway.servers import (
    ANSWER,
    SAFE_URL,
    UNSAFE_URL,
    Upstream,
    answer,
    bundle_of,
    free_port,
    messages,
    piece,
    upstream_server,
)
from tests.runtimes.gateway.test_command import gateway

KEY = GIVEN["SAFEVLM_CLIENT_KEY"]
PATIENCE = 600


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of("tiny-safegem", tmp_path_factory.mktemp("deploy") / "bundle")


@contextmanager
def caddy(to: str, place: Path) -> Iterator[tuple[str, ssl.SSLContext]]:
    """Run Caddy with the Caddyfile in front of ``to``, and yield its address and the trust in its certificate."""
    http, https = free_port(), free_port()
    here = {"HOME": str(place), "XDG_DATA_HOME": str(place), "XDG_CONFIG_HOME": str(place), "PATH": os.environ["PATH"]}
    here |= {"HTTP_PORT": str(http), "HTTPS_PORT": str(https), "GATEWAY": to}
    command = [tool("caddy"), "run", "--adapter", "caddyfile", "--config", str(DEPLOY / "Caddyfile")]
    with (
        (place / "caddy.log").open("wb") as log,
        subprocess.Popen(command, env=here, stdout=log, stderr=log) as process,
    ):
        try:
            root = place / "caddy" / "pki" / "authorities" / "local" / "root.crt"
            until = time.monotonic() + PATIENCE
            while True:
                assert process.poll() is None and time.monotonic() < until, (place / "caddy.log").read_text()
                time.sleep(0.05)
                try:
                    trust = ssl.create_default_context(cafile=root)
                    httpx.get(f"https://localhost:{https}/", verify=trust, trust_env=False, timeout=PATIENCE)
                    break
                except (OSError, httpx.TransportError):  # no certificate yet, or nothing that listens
                    continue
            yield f"https://localhost:{https}", trust
        finally:
            process.terminate()


@contextmanager
def started(bundle: Path, upstream: str, place: Path) -> Iterator[tuple[openai.OpenAI, subprocess.Popen[str]]]:
    """Start gateway and proxy, and yield a client over TLS, and the gateway's process."""
    paths = [f"--bundle={bundle}", f"--upstream={upstream}", "--host=127.0.0.1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEVLM_CLIENT_KEY", KEY)
        with (
            gateway(*services()["gateway"]["command"], *paths) as (process, url),
            caddy(url.removeprefix("http://"), place) as (address, trust),
            httpx.Client(verify=trust, trust_env=False, timeout=PATIENCE) as http,
            openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, http_client=http, max_retries=0) as client,
        ):
            yield client, process


@pytest.fixture(scope="module")
def shared(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[openai.OpenAI, Upstream]]:
    tool("caddy")
    with upstream_server() as server, started(bundle, server.url, tmp_path_factory.mktemp("caddy")) as (client, _):
        yield client, server


@pytest.fixture
def client(shared: tuple[openai.OpenAI, Upstream]) -> openai.OpenAI:
    shared[1].requests.clear()
    shared[1].behave = answer
    return shared[0]


@pytest.fixture
def upstream(client: openai.OpenAI, shared: tuple[openai.OpenAI, Upstream]) -> Upstream:
    return shared[1]


def ask(client: openai.OpenAI, url: str, **more: Any) -> Any:
    return client.chat.completions.create(model="fake", messages=messages(url), **more)  # type: ignore[arg-type]


def said(stream: Any) -> str:
    with stream:
        return "".join(each.choices[0].delta.content or "" for each in stream if each.choices)


def test_an_allowed_image_is_answered_and_an_unsafe_one_refused(client: openai.OpenAI, upstream: Upstream) -> None:
    assert ask(client, SAFE_URL).choices[0].message.content == ANSWER
    assert said(ask(client, SAFE_URL, stream=True)).strip() == ANSWER
    assert len(upstream.requests) == 2
    refused = ask(client, UNSAFE_URL).choices[0]
    assert refused.finish_reason == "content_filter" and "can't help with this image" in refused.message.content
    assert "can't help with this image" in said(ask(client, UNSAFE_URL, stream=True))
    assert len(upstream.requests) == 2
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="sk-other"), SAFE_URL)


def test_a_stream_is_not_held_back(client: openai.OpenAI, upstream: Upstream) -> None:
    """The first words arrive while the model has not said the next."""
    release = threading.Event()

    def slow(handler: Any, _: Any) -> None:
        handler.begin_stream()
        handler.event(piece("The "))
        assert release.wait(PATIENCE)
        handler.event(piece(ANSWER[4:], "stop"))
        handler.event(b"[DONE]")
        handler.close_connection = True

    upstream.behave = slow
    try:
        with ask(client, SAFE_URL, stream=True) as stream:
            words = (each.choices[0].delta.content for each in stream)
            assert next(words) == "The "
            release.set()
            assert next(words) == ANSWER[4:]
    finally:
        release.set()


def test_a_client_that_leaves_ends_the_models_work(client: openai.OpenAI, upstream: Upstream) -> None:
    ended = threading.Event()

    def endless(handler: Any, _: Any) -> None:
        handler.begin_stream()
        try:
            while True:
                handler.event(piece("and "))
                time.sleep(0.01)
        except OSError:
            handler.close_connection = True
            ended.set()

    upstream.behave = endless
    with ask(client, SAFE_URL, stream=True) as stream:
        next(iter(stream))
    assert ended.wait(PATIENCE)


def test_clients_see_what_is_theirs_alone(client: openai.OpenAI) -> None:
    address = str(client.base_url).removesuffix("/v1/")
    for path in (
        "/metrics",
        "/healthz",
        "/readyz",
        "/",
        "/v2/models",
        "/V1/../metrics",
        "/v1/%2e%2e/metrics",
        "/v1/..%2fmetrics",
        "//metrics",
    ):
        found = client._client.get(f"{address}{path}")
        assert found.status_code in (400, 404) and found.json()["error"]["code"], path
        assert "safevlm_gateway" not in found.text
    assert client._client.get(f"{address}/livez").json() == {"status": "ok"}


def test_a_gateway_that_is_gone_is_said_in_openais_form(bundle: Path, tmp_path: Path) -> None:
    tool("caddy")
    with upstream_server() as server, started(bundle, server.url, tmp_path) as (client, process):
        process.kill()
        process.wait(PATIENCE)
        with pytest.raises(openai.InternalServerError) as failed:
            ask(client, SAFE_URL)
    assert failed.value.status_code == 502 and failed.value.code == "gateway_unreachable"


@contextmanager
def llama_server(folder: Path, log: Path) -> Iterator[str]:
    """Run the one that there is as compose does, on a port of this machine."""
    program = os.environ.get("SAFEVLM_LLAMA_SERVER") or shutil.which("llama-server")
    if program is None:
        pytest.skip("no llama-server on PATH, and no SAFEVLM_LLAMA_SERVER")
    port, given = free_port(), list(services()["llama-server"]["command"])
    for option, value in (
        ("--model", str(folder / "model.f16.gguf")),
        ("--mmproj", str(folder / "mmproj.f16.gguf")),
        ("--host", "127.0.0.1"),
        ("--port", str(port)),
    ):
        given[given.index(option) + 1] = value
    with log.open("wb") as output, subprocess.Popen([program, *given], stdout=output, stderr=output) as process:
        try:
            until = time.monotonic() + PATIENCE
            while True:
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.05)
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE).status_code == 200:
                        break
                except httpx.TransportError:
                    continue
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


@pytest.mark.parametrize("server", ["llama-server", "a second gateway"])
def test_a_real_model_behind_it(bundle: Path, gguf_folder: Callable[[str], Path], tmp_path: Path, server: str) -> None:
    tool("caddy")
    folder = gguf_folder("tiny-safegem")
    if server == "llama-server":
        with llama_server(folder, tmp_path / "llama.log") as upstream:
            ask_all_ways(bundle, upstream, tmp_path)
    else:
        with gateway("--bundle", str(bundle), "--model", str(folder)) as (_, url):
            ask_all_ways(bundle, f"{url}/v1", tmp_path)


def ask_all_ways(bundle: Path, upstream: str, place: Path) -> None:
    with started(bundle, upstream, place) as (client, _):
        settings = {"max_tokens": 12, "temperature": 0}
        whole = ask(client, SAFE_URL, **settings).choices[0].message.content
        assert whole.startswith("The square is") and said(ask(client, SAFE_URL, stream=True, **settings)) == whole
        assert ask(client, UNSAFE_URL, **settings).choices[0].finish_reason == "content_filter"
        model = client.models.list().data[0].id
        assert client.models.retrieve(model).id == model
