"""Hostile requests over a real socket into an upstream that records: no image arrives that was not judged.

The same through LiteLLM's proxy, from ``.venv-litellm`` (``make peers``), which merges and rewrites requests.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import secrets
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from runtimes.gateway.app import Gateway
from runtimes.gateway.judging import Judged, Judging
from tests.runtimes.gateway.attacks import HOST, HOSTILE_URL, UNJUDGED, attacks, images_seen, pixels, written
from tests.runtimes.gateway.chat_bodies import every_key
from tests.runtimes.gateway.hidden_images import PACKED, URLS, WRAPPED, encoded
from tests.runtimes.gateway.servers import SAFE_URL, Upstream, free_port, messages, serving

ROOT = Path(__file__).parents[3]
PROXY = ROOT / ".venv-litellm" / "bin" / "litellm"
PROXY_KEY = f"sk-{secrets.token_hex(32)}"
"""Without a key of its own the proxy does not start."""


class Recorded:
    """What the guard judged and let pass, by its pixels, and what became of each request."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream, self.judged, self.outcomes = upstream, set[str](), Counter[str]()

    def send(self, url: str, content: str) -> None:
        """Send one request, and look at all that arrived for it."""
        self.upstream.requests.clear()
        with patched_judging(self.judged):
            answer = httpx.post(f"{url}/v1/chat/completions", content=content.encode("utf-8", "surrogatepass"))
        self.outcomes[str(answer.status_code)] += 1
        assert answer.status_code in (200, 400, 413) or answer.json()["error"]["code"], answer.text
        for body in self.upstream.requests:
            self.outcomes["arrived"] += 1
            for place, found in images_seen(body):
                assert found in self.judged, (place, found, content[:3000])
                self.outcomes["images"] += 1


@contextmanager
def patched_judging(judged: set[str]) -> Iterator[None]:
    inner = Judging.judge

    async def judge(self: Judging, *given: Any, **more: Any) -> list[Judged]:
        found: Sequence[Judged] = await inner(self, *given, **more)
        for each in found:
            if each.finding.verdict != "block":
                judged.add(pixels(base64.b64decode(each.url.partition(",")[2])) or "")
        return list(found)

    with patch.object(Judging, "judge", judge):
        yield


def test_the_reader_of_what_arrives_finds_images() -> None:
    """The upstream's reader is no use if it is blind."""
    hostile = pixels(encoded("PNG", UNJUDGED))
    for body in (
        {"messages": messages(HOSTILE_URL)},
        {"a": [{"b": HOSTILE_URL}]},
        {"a": f"![]({HOSTILE_URL})"},
        {HOSTILE_URL: 1},
        {"a": HOSTILE_URL.upper()[:5] + HOSTILE_URL[5:]},
        {"a": [HOSTILE_URL[:30], HOSTILE_URL[30:]]},
        {"a": HOSTILE_URL.replace(":", "&#58;")},
        {"a": HOSTILE_URL.split(",")[1]},
        {"a": list(encoded("PNG", UNJUDGED))},
    ):
        assert any(str(hostile) in found for _, found in images_seen(body)), body
    assert [*images_seen({"a": f"![]({'https://' + HOST})"})]
    assert not [*images_seen({"a": "hello", "b": [1, 2, "a picture"]})]


def test_no_hostile_request_carries_an_image_past_the_guard(address: str, upstream: Upstream) -> None:
    recorded = Recorded(upstream)
    recorded.send(address, json.dumps({"model": "fake", "messages": messages(SAFE_URL)}))
    assert recorded.outcomes == {"200": 1, "arrived": 1, "images": 1}, "what is allowed arrives, and is seen"

    @settings(deadline=None, derandomize=True, max_examples=520, suppress_health_check=list(HealthCheck), database=None)
    @given(attacks())
    def attack(content: str) -> None:
        recorded.send(address, content)

    attack()
    counts = recorded.outcomes
    assert sum(counts[status] for status in ("200", "400", "413", "503")) >= 500, counts
    assert counts["400"] >= 200 and counts["arrived"] > 1, counts


def test_each_wrapping_in_each_place(address: str, upstream: Upstream) -> None:
    """The same text in every place where a text may stand."""
    recorded = Recorded(upstream)
    texts = [*(put(HOSTILE_URL) for put in WRAPPED.values()), *PACKED.values(), *URLS.values()]
    for number, words in enumerate(texts):
        body = copy.deepcopy(every_key())
        body.pop("stream")
        place = number % 6
        if place == 0:
            body["messages"][number % 2]["content"] = words
        elif place == 1:
            body["metadata"] = {"a": words}
        elif place == 2:
            body["tools"][0]["function"]["description"] = words
        elif place == 3:
            body["messages"][3]["tool_calls"][0]["function"]["arguments"] = json.dumps({"a": words})
        elif place == 4:
            body["response_format"]["json_schema"]["schema"] = {"enum": [words]}
        else:
            body["messages"][4]["content"] = words
        recorded.send(address, written(body))
    assert recorded.outcomes == {"400": len(texts)}


# -- LiteLLM --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxy(shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not PROXY.exists():
        pytest.skip("no .venv-litellm; make peers")
    folder, port = tmp_path_factory.mktemp("litellm"), free_port()
    params = {"model": "openai/fake", "api_base": shared_upstream.url, "api_key": "none", "max_retries": 0}
    config = {"model_list": [{"model_name": name, "litellm_params": params} for name in ("fake", "m")]}
    (folder / "config.yaml").write_text(
        json.dumps({**config, "litellm_settings": {"num_retries": 0, "telemetry": False}})
    )
    command = [str(PROXY), "--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        **os.environ,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HOME": str(folder),
        "LITELLM_MASTER_KEY": PROXY_KEY,
    }
    with (folder / "log").open("wb") as log:
        started = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 600
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health/liveliness").status_code == 200:
                    break
            except httpx.TransportError:
                assert started.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-3000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        started.terminate()
        started.wait(60)


@pytest.fixture(scope="module")
def behind_proxy(bundle: Path, proxy: str) -> Iterator[str]:
    with serving(Gateway.open(bundle, upstream=proxy, key=PROXY_KEY)) as url:
        yield url


def test_no_image_passes_through_litellm(behind_proxy: str, upstream: Upstream) -> None:
    recorded = Recorded(upstream)
    recorded.send(behind_proxy, json.dumps({"model": "fake", "messages": messages(SAFE_URL)}))
    assert recorded.outcomes == {"200": 1, "arrived": 1, "images": 1}, "LiteLLM passes a request on"
    for more in (
        {"extra_body": {"messages": messages(HOSTILE_URL)}},
        {"extra_body": {"images": [HOSTILE_URL]}},
        {"api_base": f"http://{HOST}"},
        {"fallbacks": [{"model": "fake", "messages": messages(HOSTILE_URL)}]},
    ):
        recorded.send(behind_proxy, json.dumps({"model": "fake", "messages": messages(SAFE_URL), **more}))

    @settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck), database=None)
    @given(attacks())
    def attack(content: str) -> None:
        recorded.send(behind_proxy, content)

    attack()
    assert sum(recorded.outcomes[status] for status in ("200", "400", "413")) >= 60, recorded.outcomes
