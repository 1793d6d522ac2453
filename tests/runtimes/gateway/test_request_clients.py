"""Chat requests as clients send them: their earlier turns, their data URLs, their JSON."""

from __future__ import annotations

import base64
import copy
from typing import Any
from urllib.parse import quote

import pytest
from openai.types.chat import ChatCompletionMessage

from runtimes.gateway.answers import strict_json
from runtimes.gateway.requests import parse_chat, parse_guard
from tests.runtimes.gateway.chat_bodies import ASKED, CALL, CLIENTS, every_key
from tests.runtimes.gateway.servers import SAFE, SAFE_URL, messages, png
from tests.runtimes.gateway.test_requests import OPTIONS, body_of, refusal_of

# -- clients as they are --------------------------------------------------------------------------------


@pytest.mark.parametrize("client", CLIENTS)
def test_the_turns_of_clients_pass(client: str) -> None:
    given_turns, wanted = copy.deepcopy(CLIENTS[client])
    parsed = parse_chat({"model": "m", "messages": given_turns, "stream_options": {"include_usage": True}}, OPTIONS)
    assert all(each.content == png(SAFE) for each in parsed.images) and parsed.images
    sent = parsed.upstream_body([SAFE_URL] * len(parsed.images))
    assert sent == {"model": "m", "messages": wanted, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("dumped", ["exclude_unset", "whole"])
def test_the_openai_clients_answer_is_the_next_turn(dumped: str) -> None:
    found = ChatCompletionMessage.model_validate(
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm", "refusal": None}
    )
    turn = found.model_dump(mode="json", exclude_unset=dumped == "exclude_unset")
    sent = body_of(
        parse_chat({"messages": [ASKED, turn, {"role": "tool", "tool_call_id": "1", "content": "x"}]}, OPTIONS)
    )
    call = {key: CALL[key] for key in ("id", "type", "function")}
    assert sent["messages"][1] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [call],
    }


def with_nulls(value: Any) -> Any:
    """Return JSON with a null key of no meaning in each object."""
    if isinstance(value, dict):
        return {**{key: with_nulls(each) for key, each in value.items()}, "of_another_version": None}
    return [with_nulls(each) for each in value] if isinstance(value, list) else value


FREE = ("metadata", "tools", "functions", "response_format", "tool_choice", "logit_bias")
"""Keys with free-form values, in which null is a value like any other."""


def test_null_says_nothing_wherever_it_stands() -> None:
    body = {key: value for key, value in every_key().items() if key not in FREE}
    assert body_of(parse_chat(with_nulls(body), OPTIONS)) == body_of(parse_chat(body, OPTIONS))
    call = {"id": "1", "type": None, "function": {"name": "f", "arguments": "{}"}}  # as a piece of a stream has it
    sent = body_of(parse_chat({"messages": [{"role": "assistant", "tool_calls": [call]}]}, OPTIONS))
    assert sent["messages"][0]["tool_calls"] == [{**call, "type": "function"}]
    assert refusal_of({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}).code == (
        "missing_required_parameter"
    )


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens", "n", "seed", "top_logprobs"])
def test_json_has_one_kind_of_number(key: str) -> None:
    sent = body_of(parse_chat({"messages": [ASKED], key: 4.0}, OPTIONS))[key]
    assert sent == 4 and type(sent) is int
    assert "whole number" in refusal_of({"messages": [ASKED], key: 4.5}).message


def test_no_limit_is_none() -> None:
    """llama-server's own page and LM Studio's examples ask so."""
    assert "max_tokens" not in body_of(parse_chat({"messages": [ASKED], "max_tokens": -1}, OPTIONS))


PACKED = base64.b64encode(png(SAFE)).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;charset=utf-8;base64,{PACKED}",
        f"DATA:IMAGE/PNG;name=a.png;Base64,{PACKED}",
        f"  data:image/png; base64, {PACKED}\n",
        f"data:;base64,{PACKED}",
        f"data:application/octet-stream;base64,{PACKED}",
        f"data:image/png;base64,{PACKED.rstrip('=')}",
        "data:image/png;base64," + PACKED.replace("+", "-").replace("/", "_"),
        f"data:image/png;base64,{quote(PACKED, safe='')}",
        "data:image/png;base64," + "\r\n".join(PACKED[at : at + 76] for at in range(0, len(PACKED), 76)),
        "data:image/png;base64," + " ".join(PACKED[at : at + 4] for at in range(0, len(PACKED), 4)),
    ],
    ids=lambda url: repr(url[:40]),
)
def test_data_urls_as_clients_write_them(url: str) -> None:
    for given_url in (url, {"url": url}):
        asked = [{"role": "user", "content": [{"type": "image_url", "image_url": given_url}]}]
        assert parse_chat({"messages": asked}, OPTIONS).images[0].content == png(SAFE)
    assert parse_guard({"images": [url]}, OPTIONS)[0].content == png(SAFE)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,plain",
        "data:image/png;base64",
        f"data:text/html;base64,{PACKED}",
        "data:image/png;base64,AAAAA",
        "data:image/png;base64,AA=A",
        "data:image/png;base64,ÄÄÄÄ",
        "https://a.example/" + "a" * 9000,
    ],
    ids=lambda url: repr(url[:40]),
)
def test_urls_that_are_none(url: str) -> None:
    assert refusal_of({"messages": messages(url)}).param == "messages[0].content[0].image_url.url"


# -- text that is read again ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": "d\\u0061ta:image/png;base64,iVBORw0KGgo="}',
        '{"a": "data:image\\/png;base64,iVBORw0KGgo="}',
        '{"a": "d\\u0061ta:image/png;base64,iVBORw0KGgo=", ',
        '{"a": "d\\u0061ta:image/png;base64,iVBORw0KGgo=", "b": NaN}',
        '{"a": 1, "a": 2}',
        "[" * 5000,
        "[" * 500 + "]" * 500,
    ],
    ids=lambda value: value[:30],
)
def test_arguments_are_looked_into_as_servers_read_them(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert refusal_of({"messages": [turn]}).param == "messages[0].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": ["data:ima", "ge/png;base64,iVBORw0KGgo="]}],
        [{"role": "user", "content": "data:ima"}, {"role": "user", "content": "ge/png;base64,iVBORw0KGgo="}],
        [{"role": "system", "content": "data:ima"}, {"role": "user", "content": "ge/png;base64,iVBORw0KGgo="}],
        [
            {
                "role": "assistant",
                "content": "a",
                "thinking_blocks": [
                    {"type": "thinking", "thinking": "data:ima", "signature": "s"},
                    {"type": "thinking", "thinking": "ge/png;base64,iVBORw0KGgo="},
                ],
            }
        ],
    ],
    ids=["parts", "turns", "system and user", "blocks"],
)
def test_text_that_templates_join_is_looked_through_as_one(turns: list[Any]) -> None:
    assert (refusal_of({"messages": turns}).param or "").startswith("messages[0]")


def test_arguments_that_are_no_json_are_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "C:\\new", '}}
    parse_chat({"messages": [{"role": "assistant", "tool_calls": [call]}]}, OPTIONS)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b'{"messages": [], "messages": [1]}', "the key 'messages' appears twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "out of range"),
        (b"[" * 100_000, "deep"),
        (b"[" * 200 + b"]" * 200, "deep"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        (b"[]," * 2_800_000, "items"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_means_several_things(content: bytes, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        strict_json(content)


def test_half_an_emoji_of_a_model_is_passed_on() -> None:
    assert strict_json(b'{"a": "\\ud83d"}') == {"a": "\ud83d"}
