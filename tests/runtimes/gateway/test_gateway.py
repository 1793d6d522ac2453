"""The gateway as clients meet it: the real ``openai`` client, a real socket, a real guard."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from starlette.testclient import TestClient

from runtimes.gate.gate import Gate
from runtimes.gateway.app import Gateway, create_app
from runtimes.gateway.images.batching import Batching
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.serving.serving import DRAINING
from runtimes.guard.judge import Guard
from safevlm.images.image import to_rgb
from tests.runtimes.gateway.servers import (
    ANSWER,
    SAFE,
    SAFE_URL,
    UNSAFE,
    UNSAFE_URL,
    Upstream,
    data_url,
    free_port,
    messages,
    noise,
    png,
    serving,
)

KEY = "sk-secret-0123456789"


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=600) as client:
        yield client


def test_an_allowed_image_is_answered_about(client: openai.OpenAI, upstream: Upstream) -> None:
    done = client.chat.completions.create(model="fake", messages=messages(SAFE_URL), temperature=0.5)  # type: ignore[arg-type]
    assert done.choices[0].message.content == ANSWER and done.choices[0].finish_reason == "stop"
    stated = done.model_extra["safe_vlm"] if done.model_extra else {}
    assert stated["verdict"] == "allow" and stated["images"][0]["verdict"] == "allow"
    sent = upstream.requests[0]
    assert sent["temperature"] == 0.5 and sent["model"] == "fake"
    assert upstream.headers_seen[0]["authorization"] == f"Bearer {KEY}"


def test_upstream_is_shown_what_the_guard_saw(client: openai.OpenAI, upstream: Upstream) -> None:
    """Transparency composited, EXIF turned upright, nothing of the file but its picture."""
    layered = SAFE.convert("RGBA").transpose(Image.Transpose.ROTATE_90)
    layered.putalpha(250)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    layered.save(buffer, "PNG", exif=exif)
    client.chat.completions.create(model="fake", messages=messages(data_url(buffer.getvalue())))  # type: ignore[arg-type]
    url = upstream.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    wanted = to_rgb(Image.open(io.BytesIO(buffer.getvalue())))
    assert not sent.info and not sent.getexif()
    np.testing.assert_array_equal(np.asarray(sent.convert("RGB")), np.asarray(wanted))


def in_large(scene: Image.Image) -> str:
    """Return a scene in the corner of an image of five times its size."""
    canvas = Image.new("RGB", (5 * scene.width, 5 * scene.height), "white")
    canvas.paste(scene, (4 * scene.width, 0))
    return data_url(png(canvas))


@pytest.mark.parametrize("view", ["tiles", "judged", "whole"])
def test_of_a_large_image_no_more_goes_upstream_than_was_judged(bundle: Path, upstream: Upstream, view: Any) -> None:
    with Guard.open(bundle, view=view) as guard:
        size = guard.runner.preprocessing
        (unsafe,) = guard.judge([base64.b64decode(in_large(UNSAFE).partition(",")[2])])
    options = GatewayOptions(view=view)
    with (
        serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=600) as client,
    ):
        client.chat.completions.create(model="fake", messages=messages(in_large(SAFE)))  # type: ignore[arg-type]
        refused = client.chat.completions.create(model="fake", messages=messages(in_large(UNSAFE)))  # type: ignore[arg-type]
    stated = refused.model_extra["safe_vlm"]["images"][0] if refused.model_extra else {}
    assert stated["verdict"] == unsafe.verdict and stated.get("view") == unsafe.view, "as check says"
    if view == "tiles":
        assert unsafe.verdict == "block" and unsafe.view is not None and unsafe.view.startswith("tile ")
    url = upstream.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    most = {"tiles": 2 * 7 / 3, "judged": 1, "whole": 5 * SAFE.width / size.width}[view]
    assert sent.width <= most * size.width and sent.height <= most * size.height


def test_an_image_behind_alpha_is_judged_and_never_reaches_upstream(
    client: openai.OpenAI, address: str, upstream: Upstream
) -> None:
    hidden = UNSAFE.convert("RGBA")
    hidden.putalpha(0)
    url = data_url(png(hidden))
    done = client.chat.completions.create(model="fake", messages=messages(url))  # type: ignore[arg-type]
    stated = (done.model_extra or {})["safe_vlm"]
    assert stated["verdict"] == "block" and "as other programs show it (" in stated["reason"]
    assert stated["images"][0]["view"] != "on white" and not upstream.requests
    row, plain = httpx.post(f"{address}/v1/guard", json={"images": [url, UNSAFE_URL]}).json()["data"]
    assert row["verdict"] == "block"
    assert "view" not in plain


@pytest.mark.parametrize("place", ["user", "system", "tool", "second of two"])
def test_a_blocked_image_never_reaches_upstream(client: openai.OpenAI, upstream: Upstream, place: str) -> None:
    asked = messages(SAFE_URL, UNSAFE_URL) if place == "second of two" else messages(UNSAFE_URL)
    if place in ("system", "tool"):
        asked = [{**asked[0], "role": place, "tool_call_id": "1"}, *messages(SAFE_URL)]
        if place == "system":
            del asked[0]["tool_call_id"]
    done = client.chat.completions.create(model="fake", messages=asked)  # type: ignore[arg-type]
    choice = done.choices[0]
    assert choice.finish_reason == "content_filter"
    assert choice.message.content and choice.message.refusal == choice.message.content
    stated = (done.model_extra or {})["safe_vlm"]
    assert stated["verdict"] == "block" and stated["stage"] == "guard"
    assert stated["image"] == (1 if place == "second of two" else 0)
    assert stated["harm"].replace("_", " ") in choice.message.content
    assert not upstream.requests


def test_streams(client: openai.OpenAI, upstream: Upstream) -> None:
    with client.chat.completions.create(model="fake", messages=messages(SAFE_URL), stream=True) as stream:  # type: ignore[arg-type, call-overload]
        pieces = list(stream)
        header = json.loads(stream.response.headers["x-safe-vlm"])
    assert "".join(each.choices[0].delta.content or "" for each in pieces).strip() == ANSWER
    assert pieces[-1].choices[0].finish_reason == "stop" and header["verdict"] == "allow"
    with client.chat.completions.create(model="fake", messages=messages(UNSAFE_URL), stream=True) as stream:  # type: ignore[arg-type, call-overload]
        pieces = list(stream)
    assert "can't help" in "".join(each.choices[0].delta.content or "" for each in pieces)
    assert pieces[-1].choices[0].finish_reason == "content_filter" and len(upstream.requests) == 1


def test_text_alone_passes_and_can_be_refused(client: openai.OpenAI, upstream: Upstream, bundle: Path) -> None:
    done = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hello"}])
    assert done.choices[0].message.content == ANSWER
    assert upstream.requests == [{"model": "fake", "messages": [{"role": "user", "content": "hello"}]}]
    gateway = Gateway.open(bundle, upstream=upstream.url, options=GatewayOptions(require_image=True))
    with serving(gateway) as url:
        found = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "hello"}]})
    assert found.status_code == 400 and "only requests with an image" in found.json()["error"]["message"]


def test_verdicts_are_those_of_the_guard_and_the_gate(address: str, bundle: Path) -> None:
    pictures = [SAFE, UNSAFE, Image.fromarray(np.zeros((30, 90, 3), np.uint8))]
    found = httpx.post(f"{address}/v1/guard", json={"images": [data_url(png(each)) for each in pictures]}).json()
    with Guard.open(bundle) as guard:
        wanted = guard.judge(pictures)
        with Gate(guard, None) as gate:
            gated = [gate.ask(each, "") for each in pictures]
    for row, judgement, result in zip(found["data"], wanted, gated, strict=True):
        assert (row["verdict"], row["label"]) == (judgement.verdict, judgement.label)
        assert row["verdict"] == result.verdict
    assert found["bundle"] == gated[0].bundle


def numbers_in(value: Any) -> list[Any]:
    """Return every key of a probability and every fraction, as number or text, at any depth."""
    if isinstance(value, dict):
        keys = [key for key in value if key in ("p_unsafe", "probs")]
        return keys + [found for each in value.values() for found in numbers_in(each)]
    if isinstance(value, list):
        return [found for each in value for found in numbers_in(each)]
    if isinstance(value, str):
        return re.findall(r"\d[.,]\d|\d *%", value)
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("model", [None, "tiny-safegem"])
@pytest.mark.parametrize("shown", [False, True])
def test_clients_are_given_probabilities_only_where_the_operator_says_so(
    shown: bool, model: str | None, bundle: Path, upstream: Upstream
) -> None:
    gateway = Gateway.open(
        bundle,
        upstream=upstream.url if model is None else None,
        model=model,
        options=GatewayOptions(show_probabilities=shown),
    )
    hidden = UNSAFE.convert("RGBA")
    hidden.putalpha(0)
    stated = []
    with serving(gateway) as url:
        for image in (SAFE_URL, UNSAFE_URL, data_url(png(hidden)), noise(1)):
            stated.append(httpx.post(f"{url}/v1/guard", json={"images": [image]}, timeout=600).json())
            for stream in (False, True):
                body = {"model": "fake", "messages": messages(image), "stream": stream, "max_tokens": 2}
                found = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
                if not stream:
                    stated.append(found.json()["safe_vlm"])
                    continue
                lines = [line[6:] for line in found.text.splitlines() if line.startswith("data: {")]
                stated += [json.loads(line)["safe_vlm"] for line in lines if "safe_vlm" in line]
                if "x-safe-vlm" in found.headers:
                    stated.append(json.loads(found.headers["x-safe-vlm"]))
    assert len(stated) >= 12 and all(bool(numbers_in(each)) == shown for each in stated)


@pytest.mark.parametrize(
    "fault", ["the guard is stuck", "the upstream is unreachable or not ready", "the server is shutting down"]
)
def test_liveness_depends_on_nothing_and_readiness_says_why_not(
    fault: str, bundle: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = upstream.url if "upstream" not in fault else f"http://127.0.0.1:{free_port()}/v1"
    app = create_app(Gateway.open(bundle, upstream=address))
    with TestClient(app) as client:
        if "upstream" not in fault:
            assert client.get("/readyz").json() == {"status": "ready", "reasons": []}
        if "guard" in fault:
            monkeypatch.setattr(Batching, "working", False)
        if "shutting" in fault:
            client.app_state[DRAINING] = True
        found = client.get("/readyz")
        assert found.status_code == 503 and found.json()["reasons"] == [fault]
        assert client.get("/livez").status_code == 200


def test_models_health_and_numbers(client: openai.OpenAI, address: str, upstream: Upstream) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok", "guard": "ready", "upstream": "ok"}
    client.chat.completions.create(model="fake", messages=messages(UNSAFE_URL))  # type: ignore[arg-type]
    numbers = httpx.get(f"{address}/metrics").text
    assert 'safevlm_gateway_requests_total{outcome="blocked",path="/v1/chat/completions"}' in numbers
    assert 'stage="guard"' in numbers and "safevlm_gateway_guard_seconds_bucket" in numbers
    assert httpx.get(f"{address}/docs").status_code == 404


def access(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "safevlm.gateway.access"]


def test_the_access_log_has_no_content_and_no_key(
    client: openai.OpenAI, upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        client.chat.completions.create(model="fake", messages=messages(UNSAFE_URL, text="a private question"))  # type: ignore[arg-type]
        client.chat.completions.create(model="fake", messages=messages(SAFE_URL, text="a private question"))  # type: ignore[arg-type]
        until = time.monotonic() + 600
        while len(access(caplog)) < 2 and time.monotonic() < until:  # a line is written once its answer is sent
            time.sleep(0.01)
    lines = [json.loads(record.getMessage()) for record in access(caplog)]
    assert [line["outcome"] for line in lines] == ["blocked", "allowed"]
    assert lines[0]["label"] and lines[0]["images"] == 1 and lines[0]["status"] == 200
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "openai"))]
    everything = "\n".join(record.getMessage() for record in ours)
    for secret in (KEY, "private question", ANSWER, SAFE_URL[30:90], "127.0.0.1"):
        assert secret not in everything


def test_requests_that_come_together_are_judged_together(bundle: Path, upstream: Upstream) -> None:
    import concurrent.futures

    gateway = Gateway.open(
        bundle, upstream=upstream.url, options=GatewayOptions(batch=8, batch_wait=0.3, show_probabilities=True)
    )
    assert gateway.gate.guard is not None
    calls: list[int] = []
    infer = gateway.gate.guard.runner.infer

    def counted(rgb: Any, **more: Any) -> Any:
        calls.append(len(rgb))
        return infer(rgb, **more)

    gateway.gate.guard.runner.infer = counted  # type: ignore[method-assign]
    with serving(gateway) as url, concurrent.futures.ThreadPoolExecutor(16) as pool:
        bodies = [{"images": [noise(seed)]} for seed in range(16)]
        found = list(pool.map(lambda body: httpx.post(f"{url}/v1/guard", json=body, timeout=600).json(), bodies))
    assert sum(calls) == 16 and len(calls) <= 8 and max(calls) > 1
    with Guard.open(bundle) as guard:
        for seed, each in enumerate(found):
            wanted = guard.judge([base64.b64decode(noise(seed).partition(",")[2])])[0]
            assert each["data"][0]["probs"] == pytest.approx(dict(wanted.probs), abs=1e-4)


def test_a_client_key_is_asked_for_and_not_passed_on(bundle: Path, upstream: Upstream) -> None:
    gateway = Gateway.open(bundle, upstream=upstream.url, client_key="ours", key="theirs")
    with serving(gateway) as url:
        body = {"model": "fake", "messages": messages(SAFE_URL)}
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 401
        refused = httpx.post(f"{url}/v1/guard", json={"images": [SAFE_URL]}, headers={"Authorization": "Bearer no"})
        assert refused.json()["error"]["code"] == "invalid_api_key"
        found = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer ours"})
    assert found.status_code == 200 and upstream.headers_seen[0]["authorization"] == "Bearer theirs"


# -- a language model in the same process ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["checkpoint", "gguf"])
def test_the_embedded_model_answers_as_the_gate_does(
    kind: str, bundle: Path, gguf_folder: Callable[[str], Path]
) -> None:
    model = "tiny-safegem" if kind == "checkpoint" else str(gguf_folder("tiny-safegem"))
    gateway = Gateway.open(bundle if kind == "checkpoint" else None, model=model)
    with serving(gateway) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        done = client.chat.completions.create(model="any", messages=messages(SAFE_URL), max_tokens=24)  # type: ignore[arg-type]
        with client.chat.completions.create(  # type: ignore[call-overload]
            model="any", messages=messages(SAFE_URL), max_tokens=24, stream=True
        ) as stream:
            pieces = [each.choices[0].delta.content or "" for each in stream]
        blocked = client.chat.completions.create(model="any", messages=messages(UNSAFE_URL))  # type: ignore[arg-type]
        assert client.models.list().data[0].id == Path(model).name
        assert httpx.get(f"{url}/healthz").json()["upstream"] == "embedded"
        for asked, word in (
            ([{"role": "user", "content": "hello"}], "exactly one image; 0"),
            (messages(SAFE_URL, SAFE_URL), "exactly one image; 2"),
            ([{"role": "assistant", "content": "yes"}, *messages(SAFE_URL)], "alternates user and assistant"),
        ):
            with pytest.raises(openai.BadRequestError, match=word):
                client.chat.completions.create(model="any", messages=asked)  # type: ignore[arg-type]
        tool = {"type": "function", "function": {"name": "f"}}
        for key, value in (("n", 2), ("tools", [tool]), ("logprobs", True)):
            with pytest.raises(openai.BadRequestError, match=f"Leave out '{key}'"):
                client.chat.completions.create(model="any", messages=messages(SAFE_URL), **{key: value})  # type: ignore[arg-type, call-overload]
        with pytest.raises(openai.BadRequestError, match="whole number"):
            client.chat.completions.create(model="any", messages=messages(SAFE_URL), max_tokens=0)  # type: ignore[arg-type]
    with Gate(gateway.gate.guard, gateway.gate.language) as gate:
        wanted = gate.ask(SAFE, "Where is the square?", max_new_tokens=24).answer
    assert done.choices[0].message.content == wanted == "".join(pieces)
    assert len(pieces) > 3, "it came in pieces"
    assert blocked.choices[0].finish_reason == "content_filter"


def test_the_exact_verdict_blocks_what_the_guard_allowed(bundle: Path) -> None:
    from runtimes.guard.policy import Limits, Policy

    policy = Policy(guard=Limits.model_construct(block=2.0, allow=2.0), exact=Limits(block=0.5, allow=0.5))
    with (
        serving(Gateway.open(bundle, model="tiny-safegem", policy=policy)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        done = client.chat.completions.create(model="any", messages=messages(UNSAFE_URL))  # type: ignore[arg-type]
        with client.chat.completions.create(model="any", messages=messages(UNSAFE_URL), stream=True) as stream:  # type: ignore[arg-type, call-overload]
            pieces = list(stream)
    assert done.choices[0].finish_reason == "content_filter"
    assert (done.model_extra or {})["safe_vlm"]["stage"] == "exact"
    assert pieces[-1].choices[0].finish_reason == "content_filter"
