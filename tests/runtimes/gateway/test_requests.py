"""A chat request in types: what goes upstream is written from them, and nothing of the client's passes beside them."""

from __future__ import annotations

import copy
import json
import typing
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage, completion_create_params

from models.errors import InputError
from runtimes.gateway import chat_messages, chat_types, requests
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal
from runtimes.gateway.requests import ChatRequest, parse_chat
from runtimes.gateway.typed import Typed
from tests.runtimes.gateway.chat_bodies import ASKED, CALL, every_key, image, text
from tests.runtimes.gateway.servers import SAFE_URL, messages

OPTIONS = GatewayOptions(pass_keys=frozenset({"guided_json", "top_k"}))
QUESTION = [{"role": "user", "content": "hello"}]
MARK = "data:image/png;base64,iVBORw0KGgo="


def body_of(parsed: ChatRequest) -> dict[str, Any]:
    return parsed.upstream_body([f"judged {index}" for index in range(len(parsed.images))])


def refusal_of(body: Any, options: GatewayOptions = OPTIONS) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse_chat(body, options)
    assert caught.value.status in (400, 413)
    return caught.value


# -- the reference --------------------------------------------------------------------------------------


def hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def literals(hint: Any) -> set[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return set(typing.get_args(hint))
    return set().union(*map(literals, typing.get_args(hint)))


def test_every_key_of_openai_is_known() -> None:
    """A release of the ``openai`` package with another key, or another word for one, fails here."""
    for kind in (
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    ):
        wanted = hints(kind)
        assert set(wanted) - set(chat_types.Chat.model_fields) == {"audio"}
    ours = hints(chat_types.Chat)
    for key in ("reasoning_effort", "service_tier", "verbosity", "prompt_cache_retention"):
        assert literals(ours[key]) == literals(wanted[key]), key
    from openai.types import chat, shared_params

    pairs: list[tuple[Any, Any]] = [
        (chat.chat_completion_content_part_image_param.ImageURL, chat_messages.ImageUrl),
        (chat.ChatCompletionContentPartImageParam, chat_messages.ImagePart),
        (chat.ChatCompletionContentPartTextParam, chat_messages.TextPart),
        (shared_params.FunctionDefinition, chat_types.FunctionDefinition),
        (chat.ChatCompletionFunctionToolParam, chat_types.FunctionTool),
        (chat.ChatCompletionCustomToolParam, chat_types.CustomTool),
        (chat.ChatCompletionStreamOptionsParam, chat_types.StreamOptions),
        (chat.ChatCompletionPredictionContentParam, chat_types.Prediction),
        (completion_create_params.PromptCacheOptions, chat_types.PromptCacheOptions),
        (completion_create_params.WebSearchOptions, chat_types.WebSearchOptions),
        (completion_create_params.Moderation, chat_types.Moderation),
    ]
    for theirs, typed in pairs:
        assert set(hints(theirs)) <= set(typed.model_fields), typed
    assert literals(hints(pairs[0][0])["detail"]) == literals(hints(chat_messages.ImageUrl)["detail"])
    turns = {key for kind in typing.get_args(chat.ChatCompletionMessageParam) for key in hints(kind)}
    assert turns | set(ChatCompletionMessage.model_fields) <= {*chat_messages.Message.model_fields, "audio"}


def test_a_request_with_every_key_is_written_again() -> None:
    body = every_key()
    assert set(body) == set(chat_types.Chat.model_fields), "the grammar of these tests has every key"
    parsed = parse_chat(copy.deepcopy(body), OPTIONS)
    sent = body_of(parsed)
    same = set(body) - {"messages", "modalities"}
    assert {key: sent[key] for key in same} == {key: body[key] for key in same}
    assert set(sent) == same | {"messages"}
    assert [each["role"] for each in sent["messages"]] == [each["role"] for each in body["messages"]]
    assert [each.where for each in parsed.images] == [
        "messages[2].content[2].image_url.url",
        "messages[2].content[3].image_url",
    ]
    assert sent["messages"][2]["content"][2]["image_url"] == {"url": "judged 0", "detail": "low"}
    assert parsed.stream and parsed.model == "m"
    again = body_of(parse_chat({**sent, "messages": [ASKED]}, OPTIONS))
    assert {**again, "messages": sent["messages"]} == sent


# -- nothing passes beside the types --------------------------------------------------------------------

PAYLOADS = st.recursive(
    st.sampled_from([MARK, f"![]({MARK})", "https://evil.example/a.png", MARK.upper(), None, True, 7, 0.5, "", "low"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(st.sampled_from(["url", "type", "image_url", "text", "content", "messages", MARK]), inner),
        inner.map(lambda each: {"type": "image_url", "image_url": each}),
        inner.map(lambda each: {"url": SAFE_URL, "detail": each}),
        inner.map(lambda each: [{"role": "user", "content": [{"type": "image_url", "image_url": each}]}]),
    ),
    max_leaves=4,
)
NEW_KEYS = st.sampled_from(
    [
        "extra_body",
        "images",
        "image_url",
        "api_base",
        "url",
        "file",
        "detail",
        "uuid",
        "schema",
        "guided_json",
        "a",
        MARK,
    ]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, (dict, list)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*path, key))


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from strings(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from strings(each)


def words() -> set[str]:
    """Return the names and words of all types."""
    kinds = [kind for module in (chat_messages, chat_types) for kind in vars(module).values()]
    typed = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Typed)]
    named = {field.alias or name for kind in typed for name, field in kind.model_fields.items()}
    return named.union(*(literals(hint) for kind in typed for hint in hints(kind).values()))


WORDS = words()


def put(body: Any, path: tuple[Any, ...], value: Any, *, key: str | None = None) -> None:
    """Put a value in the place of another, or beside it under a key of its own."""
    parent = body
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1] if key is None or not isinstance(parent, dict) else key] = value


def only_what_was_looked_at_passes(body: Any) -> bool:
    """Parse a request and say whether it passed. What is passed on is a text that was looked through, a word of the
    types or a judged image; what is not is refused in a sentence of ours."""
    seen: set[str] = set()
    before = json.dumps(body)
    with (
        patch.object(requests, "check_texts", lambda texts, *_: seen.update(strings(list(texts)))),
        patch.object(requests, "check_free", lambda value, *_: seen.update(strings(value))),
    ):
        try:
            parsed = parse_chat(body, OPTIONS)
        except Refusal as refusal:
            assert refusal.status in (400, 413) and refusal.code
            assert len(refusal.message) < 400 and "\n" not in refusal.message and "pydantic" not in refusal.message
            return False
    judged = [f"judged {index}" for index in range(len(parsed.images))]
    sent = body_of(parsed)
    assert set(strings(sent)) <= seen.union(judged, WORDS, OPTIONS.pass_keys)
    assert set(sent) <= set(chat_types.Chat.model_fields) | OPTIONS.pass_keys
    shown = [part for turn in sent["messages"] if isinstance(turn["content"], list) for part in turn["content"]]
    assert [part["image_url"]["url"] for part in shown if part["type"] == "image_url"] == judged
    assert json.dumps(body) == before, "the client's body is not changed"
    return True


def test_nothing_in_any_one_place_passes_unseen() -> None:
    passed = 0
    for path in [each for each in places(every_key()) if each]:
        for value in (
            MARK,
            f"![]({MARK})",
            {"url": MARK},
            [MARK],
            {"type": "image_url", "image_url": MARK},
            image(MARK),
        ):
            body = json.loads(json.dumps(every_key()))
            put(body, path, value)
            passed += only_what_was_looked_at_passes(body)
    assert passed > 200, "text and free values pass"


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.data())
def test_whatever_goes_upstream_was_looked_at_or_judged(data: st.DataObject) -> None:
    body = json.loads(json.dumps(every_key()))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([each for each in places(body) if each]))
        put(body, path, data.draw(PAYLOADS), key=data.draw(st.none() | NEW_KEYS))
    only_what_was_looked_at_passes(body)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.sampled_from(sorted(chat_types.Chat.model_fields)), PAYLOADS)
def test_any_value_of_any_key_is_taken_or_refused_by_its_place(key: str, value: Any) -> None:
    try:
        sent = body_of(parse_chat({"messages": QUESTION, key: value}, OPTIONS))
    except Refusal as refusal:
        assert refusal.param is not None and refusal.param.startswith(key)
        return
    assert key not in sent or key == "messages" or sent[key] == value


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"extra_body": {"messages": messages(MARK)}}, "extra_body"),
        ({"extra_body": {"images": [MARK]}}, "extra_body"),
        ({"extra_body": {"api_base": "https://evil.example"}}, "extra_body"),
        ({"api_base": "https://evil.example"}, "api_base"),
        ({"fallbacks": [{"model": "x", "messages": messages(MARK)}]}, "fallbacks"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": "1"}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"n": 1.5}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a", {"b": MARK}]}, "stop[1]"),
        ({"logit_bias": {"word": 1}}, "logit_bias.word"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"tool_choice": {"type": "function", "function": {"name": "f", "url": MARK}}}, "tool_choice.function.url"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "image"}]}, "tools[0].type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"prediction": {"type": "content", "content": [image()]}}, "prediction.content[0].type"),
        (
            {"messages": [{"role": "user", "content": [text("a"), image(detail={"url": MARK})]}]},
            "…[1].image_url.detail",
        ),
        ({"messages": [{"role": "user", "content": [image(uuid="a")]}]}, "…[0].image_url.uuid"),
        ({"messages": [{"role": "user", "content": [{**image(), "image_url": None}]}]}, "…[0].image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]}, "…[0].type"),
        (
            {"messages": [{"role": "user", "content": [text("a", cache_control={"type": MARK})]}]},
            "…[0].cache_control.type",
        ),
        ({"messages": [{"role": "user", "content": "a", "images": [MARK]}]}, "messages[0].images"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "content": "a", "audio": {"id": "x"}}]}, "messages[0].audio"),
        ({"messages": [{"role": "user", "content": "half \ud83d"}]}, "messages[0].content"),
        ({"metadata": {"half": "\ude00"}}, "metadata"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_place_of_what_is_wrong(more: dict[str, Any], param: str) -> None:
    refusal = refusal_of({"messages": QUESTION, **more})
    assert refusal.param == param.replace("…[", "messages[0].content[", 1)
    assert refusal.code and refusal.message.endswith(".") and MARK not in refusal.message


def test_an_unknown_key_is_named() -> None:
    refusal = refusal_of({"messages": QUESTION, "min_p": 0.1})
    assert refusal.code == "unknown_parameter" and "'min_p'" in refusal.message and "--pass-key" in refusal.message
    assert "--pass-key" not in refusal_of({"messages": QUESTION, "api_base": "x"}).message
    part = {**image(), "video_url": {}}
    assert (
        "of type 'image_url' has the key 'video_url'"
        in refusal_of({"messages": [{**ASKED, "content": [part]}]}).message
    )


@pytest.mark.parametrize("value", [None, [], {}, ""], ids=str)
def test_keys_that_say_nothing_are_dropped(value: Any) -> None:
    names = {*chat_types.Chat.model_fields, *chat_types.Chat.EMPTY} - {"messages"}
    assert body_of(parse_chat({"messages": QUESTION, **dict.fromkeys(names, value)}, OPTIONS)) == {"messages": QUESTION}


# -- keys of the operator -------------------------------------------------------------------------------


def test_a_key_that_is_allowed_is_looked_through() -> None:
    body = {"messages": QUESTION, "guided_json": {"type": "object"}, "top_k": 3}
    assert body_of(parse_chat(body, OPTIONS)) == body
    seen: list[Any] = []
    with patch.object(requests, "check_free", lambda value, where, _: seen.append((where, value))):
        parse_chat(body, OPTIONS)
    assert ("guided_json", {"type": "object"}) in seen
    assert refusal_of({**body, "guided_json": MARK}).param == "guided_json"
    assert refusal_of(body, GatewayOptions()).param == "guided_json"


@pytest.mark.parametrize(
    "name",
    [
        *("messages", "images", "image_url", "api_base", "base_url", "model_list", "extra_body", "extra_headers"),
        *("api_key", "mm_processor_kwargs", "multi_modal_data", "prompt_embeds", "fallbacks", "user_config", "prompt"),
        *(
            "chat_template",
            "kv_transfer_params",
            "temperature",
            "",
            "a b",
            "a.b",
            "Ümlaut",
            "documents",
            "custom_llm_provider",
        ),
    ],
)
def test_keys_that_no_operator_may_pass(name: str) -> None:
    with pytest.raises(InputError, match="--pass-key"):
        GatewayOptions(pass_keys=frozenset({name}))


def test_keys_that_operators_do_pass() -> None:
    names = (
        "guided_json guided_regex guided_choice top_k min_p repetition_penalty chat_template_kwargs structured_outputs"
    )
    more = "ignore_eos min_tokens stop_token_ids grammar cache_prompt thinking enable_thinking timings_per_token"
    GatewayOptions(pass_keys=frozenset([*names.split(), *more.split()]))
    with pytest.raises(InputError, match="vllm, llama-server"):
        GatewayOptions(upstream_kind="ollama")
