"""``/v1/models/{id}``: one model, by whatever name it has, and nothing else of the upstream."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest

from runtimes.gateway.app import Gateway
from tests.runtimes.gateway.servers import serving

NAMES = ("fake", "org/model", "org/model:7b", "a b", "ü", "model?x=1", "a#b", "ft:gpt-4o:org::id", "a&b=c")
A_FILE = "/models/tiny.gguf"
"""What llama-server calls a model by default: only its list can be asked for it."""


class Models(BaseHTTPRequestHandler):
    """A server that has each model at its path, or only the list."""

    seen: list[str]
    alone = False

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self.seen.append(self.path)
        name = self.path.removeprefix("/v1/models")
        if not name:
            self.reply(200, {"object": "list", "data": [{"id": each, "object": "model"} for each in (*NAMES, A_FILE)]})
        elif self.alone:
            self.reply(404, {"detail": "Not Found"})
        else:
            self.reply(200, {"id": name, "object": "model"})

    def reply(self, status: int, body: Any) -> None:
        content = httpx.Response(status, json=body).content
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def models(alone: bool) -> Iterator[tuple[str, list[str]]]:
    seen: list[str] = []
    handler = type("Handler", (Models,), {"seen": seen, "alone": alone})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
        finally:
            server.shutdown()
            thread.join(600)


@pytest.fixture(scope="module", params=[False, True], ids=["by name", "by the list"])
def behind(request: pytest.FixtureRequest, bundle: Path) -> Iterator[tuple[str, list[str], bool]]:
    with models(request.param) as (upstream, seen), serving(Gateway.open(bundle, upstream=upstream)) as url:
        yield url, seen, request.param


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_found_by_its_name(behind: tuple[str, list[str], bool], name: str) -> None:
    url, seen, alone = behind
    seen.clear()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        found = client.models.retrieve(name)
    quoted = quote(name, safe="")
    assert seen[0] == f"/v1/models/{quoted}", "one segment of the path, whatever is in it"
    assert found.id == (name if alone else f"/{quoted}")


@pytest.mark.parametrize(
    "name", ["..", ".", "%2e%2e", "a/..", "a%2F..%2F..%2Fadmin", "..%2f", "%252e%252e", "%252f", "a//b", "", "a%00%25"]
)
def test_no_name_leads_elsewhere(behind: tuple[str, list[str], bool], name: str) -> None:
    url, seen, _ = behind
    seen.clear()
    host = http.client.HTTPConnection(url.removeprefix("http://"), timeout=600)  # httpx would tidy the path up
    host.request("GET", f"/v1/models/{name}")
    told = host.getresponse()
    assert told.status == 404 and json.loads(told.read())["error"]["code"] == "model_not_found"
    host.close()
    assert seen == ["/v1/models"], "the list alone was asked"


def test_a_model_that_is_called_by_its_file_is_found_in_the_list(behind: tuple[str, list[str], bool]) -> None:
    url, seen, _ = behind
    seen.clear()
    assert httpx.get(f"{url}/v1/models/{quote(A_FILE)}").json()["id"] == A_FILE and seen == ["/v1/models"]


def test_a_model_that_there_is_not(bundle: Path) -> None:
    with models(True) as (upstream, _), serving(Gateway.open(bundle, upstream=upstream)) as url:
        found = httpx.get(f"{url}/v1/models/other")
    assert found.status_code == 404 and found.json()["error"]["code"] == "model_not_found"
    assert found.json()["error"]["param"] == "model"


def test_the_model_in_this_process(bundle: Path) -> None:
    with (
        serving(Gateway.open(bundle, model="tiny-safegem")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client,
    ):
        (listed,) = client.models.list().data
        assert client.models.retrieve(listed.id) == listed
        with pytest.raises(openai.NotFoundError, match="unknown model"):
            client.models.retrieve("other")
