"""Chat requests for tests: one that uses every key and place there is, and the turns of clients as they send them."""

from __future__ import annotations

from typing import Any

from tests.runtimes.gateway.servers import SAFE_URL

SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "description": "a letter"}}}
CALL = {"id": "call_1", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"a": "b"}'}}
CUSTOM_CALL = {"id": "call_2", "type": "custom", "custom": {"name": "c", "input": "words"}}


def image(url: str = SAFE_URL, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def every_key() -> dict[str, Any]:
    """Return a request with all keys that are typed, each with a value that says something."""
    cache = {"type": "ephemeral", "ttl": "5m"}
    point = {"mode": "explicit", "ttl": "30m"}
    return {
        "model": "m",
        "messages": [
            {"role": "developer", "content": "be kind", "name": "d"},
            {"role": "system", "content": [text("be brief", cache_control=cache)]},
            {
                "role": "user",
                "name": "u",
                "cache_control": cache,
                "content": [
                    "plain",
                    text("what", prompt_cache_breakpoint=point, annotations=[]),
                    {**image(detail="low", format="image/png"), "cache_control": cache},
                    {"type": "image_url", "image_url": SAFE_URL, "prompt_cache_breakpoint": point},
                ],
            },
            {
                "role": "assistant",
                "content": [text("this"), {"type": "refusal", "refusal": "not that"}],
                "refusal": "no",
                "tool_calls": [CALL, CUSTOM_CALL],
                "function_call": {"name": "f", "arguments": "{}", "parsed_arguments": {"a": 1}},
                "reasoning_content": "hm",
                "reasoning": "hm",
                "reasoning_details": [{"type": "reasoning.text", "text": "hm", "format": "x", "index": 0}],
                "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "s"}],
                "annotations": [{"type": "url_citation", "url_citation": {"url": "https://a.example"}}],
                "parsed": {"a": "b"},
                "provider_specific_fields": {"a": "b"},
                "audio": None,
            },
            {"role": "tool", "tool_call_id": "call_1", "content": [text("result")]},
            {"role": "function", "name": "f", "content": "result"},
            {"role": "user", "content": "and now?"},
        ],
        "frequency_penalty": 0.5,
        "function_call": {"name": "f"},
        "functions": [{"name": "f", "description": "does", "parameters": SCHEMA}],
        "logit_bias": {"50256": -100},
        "logprobs": True,
        "max_completion_tokens": 5,
        "max_tokens": 5,
        "metadata": {"user_profile": "a", "tags": ["b"]},
        "modalities": ["text"],
        "moderation": {"model": "omni", "policy": {"input": {"mode": "score"}, "output": {"mode": "block"}}},
        "n": 1,
        "parallel_tool_calls": False,
        "prediction": {"type": "content", "content": [text("maybe")]},
        "presence_penalty": -0.5,
        "prompt_cache_key": "k",
        "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
        "prompt_cache_retention": "24h",
        "reasoning_effort": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "s", "description": "d", "schema": SCHEMA, "strict": True},
        },
        "safety_identifier": "s",
        "seed": -1,
        "service_tier": "flex",
        "stop": ["a", "b"],
        "store": False,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 1,
        "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]}},
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "description": "does", "parameters": SCHEMA, "strict": True},
            },
            {
                "type": "custom",
                "custom": {
                    "name": "c",
                    "description": "does",
                    "format": {"type": "grammar", "grammar": {"definition": "a: b", "syntax": "lark"}},
                },
            },
        ],
        "top_logprobs": 2,
        "top_p": 0.9,
        "user": "u",
        "verbosity": "low",
        "web_search_options": {
            "search_context_size": "low",
            "user_location": {"type": "approximate", "approximate": {"city": "Bern", "country": "CH"}},
        },
    }


ASKED = {"role": "user", "content": [text("what is this?"), image()]}
ANSWERED = {"role": "assistant", "content": "a square"}
CLIENTS: dict[str, tuple[list[Any], list[Any]]] = {
    "openai: model_dump of an answer": (
        [
            ASKED,
            {
                "content": "a square",
                "refusal": None,
                "role": "assistant",
                "annotations": [],
                "audio": None,
                "function_call": None,
                "tool_calls": None,
            },
        ],
        [ASKED, ANSWERED],
    ),
    "openai against vLLM: empty calls, reasoning": (
        [ASKED, {**ANSWERED, "tool_calls": [], "reasoning_content": None, "reasoning": "it has four sides"}],
        [ASKED, {**ANSWERED, "reasoning": "it has four sides"}],
    ),
    "openai: parse()": (
        [ASKED, {**ANSWERED, "parsed": {"shape": "square"}, "refusal": None}],
        [ASKED, ANSWERED],
    ),
    "litellm: Message.model_dump": (
        [
            {
                "role": "user",
                "content": [text("what?", cache_control={"type": "ephemeral"}), image(format="image/png")],
            },
            {
                **ANSWERED,
                "tool_calls": None,
                "function_call": None,
                "provider_specific_fields": {"refusal": None},
                "images": [],
                "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "x"}],
            },
        ],
        [
            {"role": "user", "content": [text("what?", cache_control={"type": "ephemeral"}), image()]},
            {**ANSWERED, "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "x"}]},
        ],
    ),
    "langchain: strings among the parts, URL as a string, a call and its result": (
        [
            {"role": "user", "content": ["look", {"type": "image_url", "image_url": SAFE_URL}]},
            {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": None}]},
            {"role": "tool", "content": [text("found")], "tool_call_id": "call_1", "name": "f"},
        ],
        [
            {"role": "user", "content": [text("look"), image()]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "call_1", "type": "function", "function": CALL["function"]}],
            },
            {"role": "tool", "content": [text("found")], "tool_call_id": "call_1", "name": "f"},
        ],
    ),
    "vercel: an empty answer with calls": (
        [
            {"role": "system", "content": "be brief"},
            ASKED,
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", **CALL}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "found"},
        ],
        [
            {"role": "system", "content": "be brief"},
            ASKED,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "call_1", "type": "function", "function": CALL["function"]}],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "found"},
        ],
    ),
    "inspect_ai: images in several turns, detail": (
        [
            {"role": "developer", "content": "judge"},
            {"role": "user", "content": [text("first"), image(detail="auto")]},
            {"role": "assistant", "content": [text("one")]},
            {"role": "user", "content": [image(detail="high"), text("second")]},
        ],
        [
            {"role": "developer", "content": "judge"},
            {"role": "user", "content": [text("first"), image(detail="auto")]},
            {"role": "assistant", "content": [text("one")]},
            {"role": "user", "content": [image(detail="high"), text("second")]},
        ],
    ),
}
"""Of each client: the messages that it sends, and those that are to go upstream."""
