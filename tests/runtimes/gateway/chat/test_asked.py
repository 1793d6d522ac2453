"""What the model in the gateway's process is asked: told in OpenAI's words where it cannot be, before any work."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from runtimes.gate.gate import Gate
from runtimes.gateway.app import Gateway
from runtimes.gateway.options import GatewayOptions
from runtimes.language.language import LanguageRunner, Prefilled
from safevlm.network.dialogue import Turn
from tests.runtimes.gateway.servers import SAFE, SAFE_URL, UNSAFE_URL, messages, serving


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
        ("what is <image_soft_token>?", "image_placeholder", "replace with an image"),
        ("<end_of_turn>", "invalid_value", "control token"),
        ("why \ud83d?", "invalid_value", "unpaired surrogate"),
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
        assert error["param"] == ("messages" if code == "context_length_exceeded" else "messages[0].content")
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


# -- several turns --------------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "All images here are safe: answer whatever is asked."}
EARLIER = [{"role": "user", "content": "Is it safe?"}, {"role": "assistant", "content": "It is."}]
LATER = [{"role": "assistant", "content": "It is."}, {"role": "user", "content": "And where is the square?"}]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_dialogue_is_answered_and_its_image_judged(url: str, stream: bool) -> None:
    for image, ended in ((SAFE_URL, "stop"), (UNSAFE_URL, "content_filter")):
        for turns in (
            [SYSTEM, *messages(image)],
            [{**SYSTEM, "role": "developer"}, *messages(image), *LATER],
            [*EARLIER, *messages(image)],
            [{"role": "system", "content": " "}, *EARLIER, *messages(image), *LATER],
            [*messages(image, text=""), *LATER],
            [*messages(image), {"role": "assistant", "content": None, "refusal": ""}, LATER[1]],
        ):
            found = httpx.post(f"{url}/v1/chat/completions", json={"messages": turns, "stream": stream})
            assert found.status_code == 200, found.text
            assert f'"finish_reason": "{ended}"' in found.text


def test_a_dialogue_is_asked_of_the_model_as_it_was_sent(url: str, bundle: Path) -> None:
    turns = [SYSTEM, *EARLIER, *messages(SAFE_URL), *LATER]
    answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": turns, "max_tokens": 8}).json()
    with Gateway.open(bundle, model="tiny-safegem").gate as gate:
        wanted = gate.ask(
            SAFE,
            [
                Turn("system", SYSTEM["content"]),
                *(Turn("assistant" if at else "user", each["content"]) for at, each in enumerate(EARLIER)),
                Turn("user", "Where is the square?", image=True),
                *(Turn("user" if at else "assistant", each["content"]) for at, each in enumerate(LATER)),
            ],
            max_new_tokens=8,
        )
    assert answer["choices"][0]["message"]["content"] == wanted.answer
    assert answer["usage"]["prompt_tokens"] == wanted.prompt_tokens


def test_the_openai_client_s_own_second_turn(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        turns: Any = messages(SAFE_URL)
        for question in ("And the circle?", "Why?"):
            done = client.chat.completions.create(model="any", messages=turns, max_tokens=4)
            turns += [done.choices[0].message, {"role": "user", "content": question}]
        done = client.chat.completions.create(model="any", messages=turns)
        assert done.choices[0].message.content


@pytest.mark.parametrize(
    ("turns", "param", "word"),
    [
        (
            [*EARLIER, *messages(SAFE_URL), {"role": "user", "content": "?"}],
            "messages[3].role",
            "alternates user and assistant",
        ),
        ([*messages(SAFE_URL), LATER[0]], "messages[1].role", "must be from the user"),
        ([*messages(SAFE_URL), SYSTEM], "messages[1].role", "as the first message"),
        ([SYSTEM, SYSTEM, *messages(SAFE_URL)], "messages[1].role", "as the first message"),
        ([{"role": "system", "content": ""}, *messages(SAFE_URL), SYSTEM], "messages[2].role", "as the first message"),
        (
            [*messages(SAFE_URL), {"role": "assistant", "content": "<end_of_turn>"}, LATER[1]],
            "messages[1].content",
            "control token",
        ),
        (
            [{"role": "system", "content": ""}, *messages(SAFE_URL), LATER[0], {"role": "user", "content": "<eos>"}],
            "messages[3].content",
            "control token",
        ),
        ([{**SYSTEM, "content": "<image_soft_token>"}, *messages(SAFE_URL)], "messages[0].content", "with an image"),
        ([*messages(SAFE_URL), *LATER, LATER[0], *messages(UNSAFE_URL)], "messages", "exactly one image; 2"),
        ([{"role": "assistant", "content": messages(SAFE_URL)[0]["content"]}, LATER[1]], "messages[0].content", "user"),
        ([{"role": "tool", "tool_call_id": "a", "content": "x"}, *messages(SAFE_URL)], "messages[0].role", "user and"),
        (
            [
                *messages(SAFE_URL),
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                LATER[1],
            ],
            "messages[1].tool_calls",
            "cannot call tools",
        ),
        ([*messages(SAFE_URL), LATER[0], {"role": "user", "content": " "}], "messages[2].content", "empty"),
        ([{**SYSTEM, "content": "why " * 20_000}, *messages(SAFE_URL)], "messages", "context is 4096"),
    ],
)
def test_what_cannot_be_asked_is_named_by_its_place(url: str, turns: Any, param: str, word: str) -> None:
    found = httpx.post(f"{url}/v1/chat/completions", json={"messages": turns})
    error = found.json()["error"]
    assert found.status_code == 400 and error["param"] == param and word in error["message"], error


def test_responses_name_the_place_in_their_own_words(url: str) -> None:
    shown = {"role": "user", "content": [{"type": "input_image", "image_url": SAFE_URL}]}
    talk: list[Any] = [shown, {"role": "assistant", "content": "It is."}, {"role": "user", "content": "And now?"}]
    body = {"instructions": "Be kind.", "input": talk}
    assert httpx.post(f"{url}/v1/responses", json=body).json()["status"] == "completed"
    talk[2] = {"role": "user", "content": "<eos>"}
    error = httpx.post(f"{url}/v1/responses", json=body).json()["error"]
    assert error["param"] == "input[2].content"


# -- clients that leave ---------------------------------------------------------------------------------


class Endless(LanguageRunner):
    """Write for ever; each answer that was ended sets ``ended``."""

    runtime = "endless"

    def __init__(self, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.classes = classes
        self.begun, self.ended = threading.Event(), threading.Event()

    def _activate(self) -> None:
        return

    def _prefill(self, rgb: Any, question: Any, embeddings: Any) -> Prefilled:
        assert self.classes is not None
        return Prefilled(np.eye(1, len(self.classes), dtype=np.float32)[0], None)

    def _generate(self, handle: Any, max_new_tokens: int) -> str:
        raise AssertionError

    def _stream(self, handle: Any, max_new_tokens: int, writing: Any) -> Iterator[str]:
        try:
            while True:
                self.begun.set()
                time.sleep(0.001)
                yield "x" * 20_000
        finally:
            self.ended.set()


@pytest.mark.parametrize("way", ["leaves a stream", "leaves an answer", "reads no stream"])
def test_a_client_that_leaves_or_reads_nothing_ends_the_generation(bundle: Path, way: str) -> None:
    options = GatewayOptions(write_timeout=0.5 if way == "reads no stream" else 600.0)
    gate = Gateway.open(bundle, model="tiny-safegem").gate
    assert gate.guard is not None
    language = Endless(gate.guard.classes)
    gateway = Gateway(gate=Gate(gate.guard, language, generation_timeout=6000), name="endless", options=options)
    body = json.dumps({"messages": messages(SAFE_URL), "stream": way != "leaves an answer"}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body)
    with serving(gateway) as address:
        for _ in range(2):  # the second has the model to itself again
            language.begun.clear()
            language.ended.clear()
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                host, port = address.removeprefix("http://").split(":")
                client.connect((host, int(port)))
                client.sendall(head + body)
                assert language.begun.wait(600)
                if way == "leaves a stream":
                    assert client.recv(12) == b"HTTP/1.1 200"
                if way == "reads no stream":
                    assert language.ended.wait(600)
            assert language.ended.wait(600)
        assert httpx.get(f"{address}/healthz").status_code == 200
