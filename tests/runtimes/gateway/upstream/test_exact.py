"""``--exact upstream``: what the guard is unsure of is settled by the upstream's verdict, or not answered about."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from runtimes.gateway.app import Gateway, create_app
from runtimes.guard.bundle import open_bundle
from runtimes.guard.policy import Limits, Policy
from runtimes.vllm_guard.verdict import Identity, image_stated, stated
from safevlm.errors import InputError
from tests.runtimes.gateway.servers import ANSWER, SAFE_URL, Upstream, _Upstream, answer, messages, serving

UNSURE = Policy(guard=Limits(block=1.0, allow=0.0))
"""A policy that leaves every image to the exact verdict."""
Params = Callable[[dict[str, Any]], Any]


def identity(bundle: Path) -> Identity:
    manifest = open_bundle(bundle).manifest
    assert manifest.source.head_sha256 is not None, "an export states it"
    return Identity(head=manifest.source.head_sha256, classes=tuple(manifest.classes))


def verdict(guard: Identity, safe: float, *, usual: bool = True) -> dict[str, Any]:
    rest = (1 - safe) / (len(guard.classes) - 1)
    row = [safe if name == "safe" else rest for name in guard.classes]
    return stated(guard, [image_stated(row, guard.classes, usual=usual)])


def is_probe(body: dict[str, Any]) -> bool:
    return body.get("max_tokens") == 1


def behave(upstream: Upstream, params: Params) -> None:
    """Have the upstream answer as vLLM does: with ``kv_transfer_params``, in answers that are no streams."""

    def answered(handler: _Upstream, body: dict[str, Any]) -> None:
        if body.get("stream"):
            answer(handler, body)
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
        whole = {"id": "x", "object": "chat.completion", "created": 1, "model": "fake", "choices": [choice]}
        found = params(body)
        handler.reply(whole if found is KeyError else {**whole, "kv_transfer_params": found})

    upstream.behave = answered


def ask(url: str, *urls: str, **more: Any) -> httpx.Response:
    body = {"model": "fake", "messages": messages(*urls or (SAFE_URL,)), **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)


def opened(bundle: Path, upstream: Upstream, policy: Policy = UNSURE) -> Gateway:
    return Gateway.open(bundle, upstream=upstream.url, exact=True, policy=policy)


def test_the_exact_verdict_settles_what_the_guard_is_unsure_of(bundle: Path, upstream: Upstream) -> None:
    guard, safe = identity(bundle), [1.0]
    behave(upstream, lambda body: verdict(guard, safe[0]))
    with serving(opened(bundle, upstream)) as url:
        upstream.requests.clear()
        allowed = ask(url)
        assert allowed.json()["choices"][0]["message"]["content"] == ANSWER
        probe, request = upstream.requests
        assert is_probe(probe) and len(probe["messages"]) == 1 and not is_probe(request)
        assert probe["messages"][0]["content"][0] == request["messages"][0]["content"][0], "the very image"
        assert "kv_transfer_params" not in allowed.text
        streamed = ask(url, stream=True)
        assert ANSWER.split()[0] in streamed.text and "kv_transfer_params" not in streamed.text
        safe[0] = 0.0
        upstream.requests.clear()
        for stream in (False, True):
            blocked = ask(url, stream=stream)
            assert "content_filter" in blocked.text and "exact" in blocked.text and ANSWER not in blocked.text
        assert all(is_probe(each) for each in upstream.requests), "nothing was asked about it"


def test_each_unsure_image_is_settled_by_itself(bundle: Path, upstream: Upstream) -> None:
    guard = identity(bundle)
    behave(upstream, lambda body: verdict(guard, 1.0))
    with serving(opened(bundle, upstream)) as url:
        upstream.requests.clear()
        assert ask(url, SAFE_URL, SAFE_URL).status_code == 200
        assert [is_probe(each) for each in upstream.requests] == [True, True, False]


def test_what_the_guard_is_sure_of_costs_no_request(bundle: Path, upstream: Upstream) -> None:
    guard = identity(bundle)
    behave(upstream, lambda body: verdict(guard, 0.0))
    with serving(opened(bundle, upstream, Policy(guard=Limits(block=1.0, allow=0.999), confirm=False))) as url:
        upstream.requests.clear()
        assert ask(url).json()["choices"][0]["message"]["content"] == ANSWER
        assert not any(is_probe(each) for each in upstream.requests)


@pytest.mark.parametrize(
    "spoiled",
    [
        "nothing",
        "null",
        "error",
        "other head",
        "other classes",
        "unusual",
        "two images",
        "not a number",
        "HTTP 500",
    ],
)
def test_without_a_verdict_nothing_is_answered(bundle: Path, upstream: Upstream, spoiled: str) -> None:
    guard = identity(bundle)
    good = verdict(guard, 1.0)
    bad: dict[str, Any] = {
        "nothing": KeyError,
        "null": None,
        "error": stated(guard, None, "the worker wrote no verdict"),
        "other head": verdict(Identity(head="0" * 64, classes=guard.classes), 1.0),
        "other classes": verdict(Identity(head=guard.head, classes=guard.classes[::-1]), 1.0),
        "unusual": verdict(guard, 1.0, usual=False),
        "two images": stated(guard, [*good["safe_vlm"]["images"] * 2]),
        "not a number": json.loads(json.dumps(good).replace("1.0", "1e9")),
    }
    behave(upstream, lambda body: good)
    with serving(opened(bundle, upstream)) as url:
        if spoiled == "HTTP 500":
            upstream.behave = lambda handler, body: handler.reply({"error": {"message": "no"}}, 500)
        else:
            behave(upstream, lambda body: bad[spoiled])
        upstream.requests.clear()
        for stream in (False, True):
            done = ask(url, stream=stream)
            assert done.status_code == 503 and ANSWER not in done.text, done.text
        assert all(is_probe(each) for each in upstream.requests)


@pytest.mark.parametrize("kind", ["nothing", "other head", "other classes", "error"])
def test_an_upstream_of_another_guard_or_none_is_refused_at_the_start(
    bundle: Path, upstream: Upstream, kind: str
) -> None:
    guard = identity(bundle)
    found, said = {
        "nothing": (KeyError, "gives no exact verdicts"),
        "other head": (verdict(Identity(head="0" * 64, classes=guard.classes), 1.0), "guard head has SHA-256"),
        "other classes": (verdict(Identity(head=guard.head, classes=guard.classes[::-1]), 1.0), "other classes"),
        "error": (stated(guard, None, "the worker wrote no verdict"), "wrote no verdict"),
    }[kind]
    behave(upstream, lambda body: found)
    app = create_app(opened(bundle, upstream))
    with pytest.raises(InputError, match=said), TestClient(app):
        pass
    assert isinstance(app.state.failure, InputError)


def test_a_bundle_that_does_not_say_its_head_is_refused(bundle: Path, upstream: Upstream, tmp_path: Path) -> None:
    old = Path(shutil.copytree(bundle, tmp_path / "old"))
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["source"]["head_sha256"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="Export the bundle again"):
        opened(old, upstream)


def test_exact_verdicts_of_an_upstream_need_one(bundle: Path) -> None:
    with pytest.raises(InputError, match="needs --upstream"):
        Gateway.open(bundle, exact=True)


def test_verdicts_of_vllm_never_reach_a_client_of_any_gateway(address: str, upstream: Upstream, bundle: Path) -> None:
    behave(upstream, lambda body: verdict(identity(bundle), 1.0))
    done = ask(address)
    assert done.status_code == 200 and "kv_transfer_params" not in done.text
