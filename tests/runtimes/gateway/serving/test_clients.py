"""Clients' own packages over a real socket: questions with images, streams, second turns, and what a block becomes.

The packages live in environments of their own, ``.venv-clients`` and, for Node, ``.venv-vercel`` (``make peers``).
Their tests skip where these are missing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.runtimes.gateway.servers import ANSWER, SAFE_URL, UNSAFE_URL, Upstream, messages

ROOT = Path(__file__).parents[4]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
PACKAGES = ("litellm", "langchain", "inspect_ai", "vercel")
SENTENCE = "I can't help with this image"


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="sk-none", max_retries=0, timeout=600) as client:
        yield client


@pytest.mark.parametrize("dumped", [False, True], ids=["as it is", "model_dump()"])
def test_openais_second_turn(client: openai.OpenAI, upstream: Upstream, dumped: bool) -> None:
    turns: list[Any] = messages(SAFE_URL)
    for text in ("And its color?", "Why?"):
        said = client.chat.completions.create(model="fake", messages=turns).choices[0].message
        turns += [said.model_dump() if dumped else said, {"role": "user", "content": text}]
    assert client.chat.completions.create(model="fake", messages=turns).choices[0].message.content == ANSWER
    sent = upstream.requests[-1]["messages"]
    assert [each["role"] for each in sent] == ["user", "assistant", "user", "assistant", "user"]
    assert [each["content"] for each in sent[1::2]] == [ANSWER, ANSWER]


def test_openais_second_turn_of_a_response(client: openai.OpenAI, upstream: Upstream) -> None:
    image: Any = {"type": "input_image", "image_url": SAFE_URL, "detail": "auto"}
    turns: list[Any] = [{"role": "user", "content": [image, {"type": "input_text", "text": "Where is it?"}]}]
    first = client.responses.create(model="fake", input=turns)
    for output in (first.output, [item.model_dump() for item in first.output]):
        done = client.responses.create(model="fake", input=[*turns, *output, {"role": "user", "content": "Why?"}])
        assert done.output_text == ANSWER
        assert upstream.requests[-1]["messages"][1:] == [
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": "Why?"},
        ]


def test_openais_stream_with_options(client: openai.OpenAI, upstream: Upstream) -> None:
    with client.chat.completions.create(
        model="fake",
        messages=messages(SAFE_URL),  # type: ignore[arg-type]
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        said = "".join(each.choices[0].delta.content or "" for each in stream if each.choices)
    assert said.strip() == ANSWER and upstream.requests[0]["stream_options"] == {"include_usage": True}


def test_openais_models(client: openai.OpenAI, upstream: Upstream) -> None:
    assert client.models.retrieve("fake").id == client.models.list().data[0].id == "fake"


@pytest.fixture(params=PACKAGES)
def asking(request: pytest.FixtureRequest) -> list[str]:
    """The command of a client's package."""
    peers = ROOT / "tests" / "peers"
    if request.param == "vercel":
        node, folder = shutil.which("node"), ROOT / ".venv-vercel" / "node_modules"
        if node is None or not folder.is_dir():
            pytest.skip("no node, or no .venv-vercel; make peers")
        return [node, str(peers / "clients.mjs"), str(folder)]
    if not PYTHON.exists():
        pytest.skip("no .venv-clients; make peers")
    return [str(PYTHON), str(peers / "clients.py"), request.param]


def test_a_clients_own_package(address: str, upstream: Upstream, asking: list[str], tmp_path: Path) -> None:
    """Each way of asking gives the upstream's answer; an unsafe image gives a refusal, and never reaches upstream."""
    images = json.dumps({"safe": SAFE_URL, "unsafe": UNSAFE_URL})
    done = subprocess.run(
        [*asking, address], input=images, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) >= 6
    for way, said in found.items():
        if way.endswith("refused"):
            reason, text = said
            assert reason.replace("-", "_") == "content_filter" and SENTENCE in json.dumps(text), way
        else:
            assert said.strip() == ANSWER, way
    shown = json.dumps(upstream.requests)
    assert UNSAFE_URL not in shown and shown.count("image_url") >= 2 * 3
