"""``/v1/responses`` with the ``openai`` client: the same judging, in the shapes that it reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.runtimes.gateway.servers import ANSWER, SAFE_URL, UNSAFE_URL, Upstream, piece


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="sk-none", max_retries=0, timeout=600) as client:
        yield client


def asked(*urls: str, text: str = "Where is the square?") -> list[Any]:
    images = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "input_text", "text": text}]}]


def test_text_alone(client: openai.OpenAI, upstream: Upstream) -> None:
    done = client.responses.create(
        model="fake", input="Hello", instructions="Be short.", max_output_tokens=20, temperature=0.5, store=True
    )
    assert done.output_text == ANSWER and done.status == "completed" and done.error is None
    assert (done.instructions, done.max_output_tokens, done.temperature) == ("Be short.", 20, 0.5)
    assert (done.model_extra or {})["store"] is False, "nothing is stored"
    (sent,) = upstream.requests
    assert sent["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
    ]
    assert sent["max_completion_tokens"] == 20 and sent["temperature"] == 0.5 and "store" not in sent


def test_an_image_is_judged_and_answered_about(client: openai.OpenAI, upstream: Upstream) -> None:
    done = client.responses.create(model="fake", input=asked(SAFE_URL))
    assert done.output_text == ANSWER
    assert (done.model_extra or {})["safe_vlm"]["images"][0]["verdict"] == "allow"
    part = upstream.requests[0]["messages"][0]["content"][0]
    assert part["type"] == "image_url" and part["image_url"]["url"].startswith("data:image/")
    assert part["image_url"]["url"] != SAFE_URL, "what was judged is sent on, not what came"


PLACES: dict[str, list[Any]] = {
    "user": asked(UNSAFE_URL),
    "second": asked(SAFE_URL, UNSAFE_URL),
    "earlier turn": [*asked(UNSAFE_URL), {"role": "assistant", "content": "Yes."}, *asked(SAFE_URL)],
    "developer": [{**asked(UNSAFE_URL)[0], "role": "developer"}, *asked(SAFE_URL)],
    "function's output": [
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {
            "type": "function_call_output",
            "call_id": "a",
            "output": [{"type": "input_image", "image_url": UNSAFE_URL}],
        },
    ],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_blocked_image_is_a_refusal(client: openai.OpenAI, upstream: Upstream, place: str, stream: bool) -> None:
    if stream:
        with client.responses.create(model="fake", input=PLACES[place], stream=True) as events:
            *_, last = events
        assert last.type == "response.incomplete"
        done = last.response
    else:
        done = client.responses.create(model="fake", input=PLACES[place])
    assert not upstream.requests
    assert done.status == "incomplete" and done.incomplete_details and not done.output_text
    assert done.incomplete_details.reason == "content_filter"
    (message,) = done.output
    assert message.type == "message" and [part.type for part in message.content] == ["refusal"]
    assert (done.model_extra or {})["safe_vlm"]["verdict"] == "block"


def test_streams(client: openai.OpenAI, upstream: Upstream) -> None:
    with client.responses.stream(model="fake", input=asked(SAFE_URL)) as stream:
        events = list(stream)
        done = stream.get_final_response()
    kinds = [each.type for each in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert [each.sequence_number for each in events] == list(range(len(events)))
    assert kinds.count("response.output_text.delta") == len(ANSWER.split())
    assert done.output_text.strip() == ANSWER
    assert upstream.requests[0]["stream_options"] == {"include_usage": True}


def replied(message: dict[str, Any], ended: str = "stop", **more: Any) -> Any:
    body = {"model": "m", "choices": [{"index": 0, "message": message, "finish_reason": ended}], **more}
    return lambda handler, _: handler.reply(body)


CALLS = [
    {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": f'{{"{name}": 1}}'}}
    for name in ("a", "b")
]
TOOLS: list[Any] = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("a", "b")]
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 2}}


def test_functions_are_called_and_answered(client: openai.OpenAI, upstream: Upstream) -> None:
    upstream.behave = replied({"content": "Let me look.", "tool_calls": CALLS}, "tool_calls", usage=USAGE)
    first = client.responses.create(
        model="fake", input="Look.", tools=TOOLS, tool_choice={"type": "function", "name": "a"}
    )
    assert [each.type for each in first.output] == ["message", "function_call", "function_call"]
    assert first.usage and (first.usage.input_tokens, first.usage.input_tokens_details.cached_tokens) == (3, 2)
    sent = upstream.requests[0]
    assert sent["tools"][0] == {"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "a"}}
    upstream.behave = replied({"content": "Done."})
    outputs = [{"type": "function_call_output", "call_id": f"call_{name}", "output": "yes"} for name in ("a", "b")]
    client.responses.create(model="fake", input=[*asked(), *first.output, *outputs], tools=TOOLS)  # type: ignore[list-item]
    user, assistant, *answers = upstream.requests[1]["messages"]
    assert user["role"] == "user" and assistant["content"] == "Let me look." and assistant["tool_calls"] == CALLS
    assert [(each["role"], each["tool_call_id"]) for each in answers] == [("tool", "call_a"), ("tool", "call_b")]


def streamed(*deltas: dict[str, Any], ended: str = "stop") -> Any:
    def behave(handler: Any, _: Any) -> None:
        handler.begin_stream()
        for delta in deltas:
            handler.event({"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        handler.event({"model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": ended}]})
        handler.event({"choices": [], "usage": USAGE})
        handler.event(b"[DONE]")
        handler.close_connection = True

    return behave


def call(index: int, **function: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "id": f"call_{index}", "function": function}]}


WAYS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, Any]]]] = {
    "text": ([{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}], [("message", "ab")]),
    "nothing": ([], [("message", "")]),
    "thought": ([{"reasoning_content": "hm"}, {"content": "a"}], [("reasoning", None), ("message", "a")]),
    "refusal": ([{"content": "a"}, {"refusal": "no"}], [("message", "a")]),
    "calls": (
        [
            call(0, name="a", arguments=""),
            call(0, arguments="{"),
            call(1, name="b", arguments="{}"),
            call(0, arguments="}"),
        ],
        [("function_call", "{}"), ("function_call", "{}")],
    ),
    "text and a call": (
        [{"content": "x"}, call(0, name="a", arguments="{}")],
        [("message", "x"), ("function_call", "{}")],
    ),
    "a call and text": (
        [call(0, name="a", arguments="{}"), {"content": "x"}],
        [("function_call", "{}"), ("message", "x")],
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_streamed_items_come_whole(client: openai.OpenAI, upstream: Upstream, way: str) -> None:
    """What the client gathers from the pieces is what the last event holds."""
    deltas, wanted = WAYS[way]
    upstream.behave = streamed(*deltas)
    with client.responses.stream(model="fake", input="x", tools=TOOLS) as stream:
        events = list(stream)
        done = stream.get_final_response()
    found: list[tuple[str, Any]] = []
    for each in done.output:
        if each.type == "message":
            found.append((each.type, "".join(part.text for part in each.content if part.type == "output_text")))
        else:
            found.append((each.type, each.arguments if each.type == "function_call" else None))
    assert found == wanted and done.usage and done.usage.total_tokens == 7 and done.model == "m"
    assert [each.sequence_number for each in events] == list(range(len(events)))
    added = [each.output_index for each in events if each.type == "response.output_item.added"]
    ended = sorted(each.output_index for each in events if each.type == "response.output_item.done")
    assert added == ended == list(range(len(wanted)))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_cut_at_its_length_is_incomplete(client: openai.OpenAI, upstream: Upstream, stream: bool) -> None:
    if stream:
        upstream.behave = streamed({"content": "a"}, ended="length")
        with client.responses.create(model="fake", input="x", stream=True) as events:
            done = list(events)[-1].response  # type: ignore[union-attr]
    else:
        upstream.behave = replied({"content": "a"}, "length")
        done = client.responses.create(model="fake", input="x")
    assert done.status == "incomplete" and done.incomplete_details and done.output_text == "a"
    assert done.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("stop", [b"", b"data: <html>\n\n", b'data: {"error": {"message": "out of memory"}}\n\n'])
def test_a_stream_that_fails_says_so(client: openai.OpenAI, upstream: Upstream, stop: bytes) -> None:
    def behave(handler: Any, _: Any) -> None:
        handler.begin_stream()
        handler.event(piece("The "))
        handler.wfile.write(stop)
        handler.close_connection = True

    upstream.behave = behave
    with client.responses.create(model="fake", input="x", stream=True) as events:
        *before, error, last = events
    assert any(each.type == "response.output_text.delta" and each.delta == "The " for each in before)
    assert error.type == "error" and error.message
    assert last.type == "response.failed" and last.response.error and last.response.status == "failed"


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": list(parts)}]}


OUTPUT = [{"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": "data:,x"}]
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "stored": ({"previous_response_id": "resp_1"}, "previous_response_id", "stores nothing"),
    "conversation": ({"conversation": {"id": "c"}}, "conversation", "stores nothing"),
    "background": ({"background": True}, "background", "Leave out"),
    "prompt": ({"prompt": {"id": "p"}}, "prompt", "stores no prompts"),
    "unknown": ({"image": {}}, "image", "not accepted"),
    "messages": ({"messages": [{"role": "user", "content": "x"}]}, "messages", "not accepted"),
    "no input": ({"input": None}, "input", ""),
    "empty": ({"input": []}, "input", "at least 1"),
    "file": (user({"type": "input_image", "file_id": "f"}), "input[0].content[0].file_id", "stores no files"),
    "input_file": (user({"type": "input_file", "file_data": "x"}), "input[0].content[0]", "'input_file'"),
    "item": ({"input": [{"type": "computer_call_output"}]}, "input[0]", "'computer_call_output'"),
    "reference": ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "Send the item itself"),
    "tool": ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
    "type": ({"temperature": "1"}, "temperature", "number"),
    "range": ({"top_p": 2}, "top_p", "1"),
    "damaged": ({"input": asked("data:image/png;base64,AAAA")}, "input[0].content[0]", ""),
    "host": ({"input": [*asked(), *asked("http://169.254.169.254/x")]}, "input[1].content[0]", "data URL"),
    "in text": ({"instructions": f"![]({SAFE_URL})"}, "instructions", ""),
    "output": (
        {"input": [{"type": "function_call_output", "call_id": "a", "output": OUTPUT}]},
        "input[0].output[1]",
        "",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_taken_is_refused_by_its_name(address: str, upstream: Upstream, case: str) -> None:
    given, param, word = REFUSED[case]
    found = httpx.post(f"{address}/v1/responses", json={"model": "fake", "input": "x", **given})
    error = found.json()["error"]
    assert found.status_code == 400 and error["type"] == "invalid_request_error" and error["code"]
    assert error["param"].startswith(param) and word in error["message"], error
    assert "messages[" not in found.text and not upstream.requests


@pytest.mark.parametrize("body", [[], 1, "x", None, {}, {"input": {"role": "user"}}, {"input": [[]]}, {"input": [1]}])
def test_bodies_that_are_none(address: str, body: Any) -> None:
    found = httpx.post(f"{address}/v1/responses", content=json.dumps(body))
    assert found.status_code == 400 and found.json()["error"]["code"]


def test_hints_pass_and_null_says_nothing(address: str, upstream: Upstream) -> None:
    body = {"input": "hi", "service_tier": "flex", "max_output_tokens": 9.0, "context_management": None}
    assert httpx.post(f"{address}/v1/responses", json=body, timeout=600).status_code == 200
    assert upstream.requests[-1]["service_tier"] == "flex" and upstream.requests[-1]["max_completion_tokens"] == 9
    found = httpx.post(f"{address}/v1/responses", json={"input": "hi", "min_p": 0.1}, timeout=600).json()["error"]
    assert found["param"] == "min_p" and "--pass-key" in found["message"]


def test_upstreams_own_errors_pass(client: openai.OpenAI, upstream: Upstream) -> None:
    error = {"error": {"message": "no such model", "type": "invalid_request_error", "code": None, "param": "model"}}
    upstream.behave = lambda handler, _: handler.reply(error, status=404)
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError, match="no such model"):
            client.responses.create(model="fake", input="x", stream=stream)  # type: ignore[call-overload]


@pytest.mark.parametrize("choices", [[], [{}], [{"message": {"content": 3}}], "x"])
def test_a_completion_that_is_none(client: openai.OpenAI, upstream: Upstream, choices: Any) -> None:
    upstream.behave = lambda handler, _: handler.reply({"choices": choices})
    with pytest.raises(openai.APIStatusError, match="not a chat completion"):
        client.responses.create(model="fake", input="x")


HIDDEN: dict[str, dict[str, Any]] = {
    "schema": {
        "text": {"format": {"type": "json_schema", "name": "a", "schema": {"description": UNSAFE_URL}}},
    },
    "arguments": {
        "input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": json.dumps({"u": UNSAFE_URL})}]
    },
    "tool": {"tools": [{"type": "function", "name": "a", "description": f"![]({UNSAFE_URL})"}]},
    "parts": user({"type": "input_text", "text": UNSAFE_URL[:9]}, {"type": "input_text", "text": UNSAFE_URL[9:]}),
    "reasoning": {
        "input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": UNSAFE_URL}]}, *asked()]
    },
    "metadata": {"metadata": {"a": UNSAFE_URL[:500]}},
    "annotations": {
        "input": [
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "x", "annotations": [{"u": UNSAFE_URL}]}],
            },
            *asked(),
        ]
    },
}


@pytest.mark.parametrize("place", HIDDEN)
def test_an_image_in_any_other_value_goes_nowhere(address: str, upstream: Upstream, place: str) -> None:
    """It is refused, or what holds it is left out."""
    httpx.post(f"{address}/v1/responses", json={"model": "fake", "input": "x", **HIDDEN[place]})
    assert UNSAFE_URL[30:200] not in json.dumps(upstream.requests)
