"""What the model in the gateway's process is asked: told in OpenAI's words where it cannot be, before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtimes.gateway.app import Gateway
from tests.runtimes.gateway.servers import SAFE_URL, UNSAFE_URL, messages, serving


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    with serving(Gateway.open(bundle, model="tiny-safegem")) as address:
        yield address


def ask(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={"messages": messages(SAFE_URL), **body})


@pytest.mark.parametrize(
    ("text", "code", "word"),
    [
        ("why " * 20_000, "context_length_exceeded", "context is 4096 tokens"),
        ("x" * 2_000_000, "context_length_exceeded", "context is 4096 tokens"),
        ("what is <image_soft_token>?", "image_placeholder", "the place of an image"),
        ("<end_of_turn>", "invalid_value", "control token"),
        ("why \ud83d?", "invalid_value", "half a character"),
        (" \n ", "invalid_value", "empty"),
        ("", "invalid_value", "empty"),
    ],
)
def test_a_bad_question_is_the_users_fault(url: str, text: str, code: str, word: str) -> None:
    for image in (SAFE_URL, UNSAFE_URL):  # before the guard, too
        content = b'{"messages": ' + _ascii(messages(image, text=text)) + b"}"
        found = httpx.post(f"{url}/v1/chat/completions", content=content)
        error = found.json()["error"]
        assert (found.status_code, error["code"]) == (400, code) and word in error["message"]
        assert error["param"].startswith("messages")
    assert httpx.get(f"{url}/healthz").status_code == 200


def _ascii(value: Any) -> bytes:

    return json.dumps(value).encode("ascii")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -1),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_p", "1"),
        ("seed", 1.5),
        ("seed", 2**63),
        ("stop", ["a"] * 5),
        ("stop", [""]),
        ("stop", {"a": 1}),
        ("max_tokens", 0),
        ("max_completion_tokens", True),
        ("frequency_penalty", 0.5),
        ("logit_bias", {"5": 1}),
        ("top_logprobs", 3),
    ],
)
def test_a_value_out_of_range_is_named(url: str, key: str, value: Any) -> None:
    found = ask(url, **{key: value})
    assert found.status_code == 400 and found.json()["error"]["param"].split("[")[0] == key


def test_an_answer_says_why_it_ended_and_what_it_used(url: str) -> None:
    whole = ask(url, max_tokens=3).json()
    assert whole["choices"][0]["finish_reason"] == "length" and whole["usage"]["completion_tokens"] == 3
    assert (
        whole["usage"]["prompt_tokens"] > 16 and whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + 3
    )
    streamed = ask(url, max_tokens=3, stream=True, stream_options={"include_usage": True}).text
    assert f'"usage": {_ascii(whole["usage"]).decode()}' in streamed and '"finish_reason": "length"' in streamed
    sampled = {
        ask(url, temperature=1.5, seed=7, max_tokens=12).json()["choices"][0]["message"]["content"] for _ in "ab"
    }
    assert len(sampled) == 1
    answer = ask(url).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    stop = answer["message"]["content"][3:5]
    cut = ask(url, stop=[stop]).json()["choices"][0]
    assert cut["finish_reason"] == "stop" and stop not in cut["message"]["content"]
