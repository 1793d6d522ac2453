"""OpenAI's chat request as types: every key that is taken, with its type and range.

The reference is ``openai.types.chat.completion_create_params``. What goes upstream is written from these types and from
nothing else, so a key that has no type here cannot pass.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from runtimes.gateway.chat_messages import CacheControl, Message, TextPart
from runtimes.gateway.typed import CONTENT, TOOL, AtMost, Between, Free, Label, Name, Typed

__all__ = ["Chat"]

WHOLE_MAX = 2**31 - 1


class FunctionDefinition(Typed):
    """A function that a model may call; its parameters are a JSON schema."""

    name: Name
    description: str | None = None
    parameters: Free | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class FunctionTool(Typed):
    """A tool with a JSON schema."""

    type: Literal["function"] = "function"
    function: FunctionDefinition
    cache_control: CacheControl | None = None


class Grammar(Typed):
    """A grammar of a custom tool's input."""

    definition: str
    syntax: Literal["lark", "regex"]


class CustomFormat(Typed):
    """The form of a custom tool's input."""

    type: Literal["text", "grammar"]
    grammar: Grammar | None = None


class CustomDefinition(Typed):
    """A tool that takes plain text."""

    name: Name
    description: str | None = None
    format: CustomFormat | None = None


class CustomTool(Typed):
    """A tool without a schema."""

    type: Literal["custom"]
    custom: CustomDefinition


Tool = Annotated[Annotated[FunctionTool, Tag("<function>")] | Annotated[CustomTool, Tag("<custom>")], TOOL]


class Named(Typed):
    """A tool, by its name."""

    name: Name


class AllowedTools(Typed):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[Free], Field(fail_fast=True)]


class ToolChoice(Typed):
    """The tool that is to be called, or those that may be."""

    type: Literal["function", "custom", "allowed_tools"]
    function: Named | None = None
    custom: Named | None = None
    allowed_tools: AllowedTools | None = None


def _kind_of_choice(given: Any) -> str | None:
    return "<word>" if isinstance(given, str) else "<object>" if isinstance(given, (dict, Typed)) else None


CHOICE = Discriminator(_kind_of_choice, custom_error_type="wanted", custom_error_message="a word or an object")


class JsonSchema(Typed):
    """A JSON schema that an answer is to follow."""

    name: Name
    description: str | None = None
    schema_: Free | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Typed):
    """The form of an answer; ``schema`` beside ``json_object`` is llama-server's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Free | None = Field(default=None, alias="schema")


class Prediction(Typed):
    """Text that the answer is expected to hold."""

    type: Literal["content"]
    content: Annotated[
        Annotated[str, Tag("<string>")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("<parts>")],
        CONTENT,
    ]


class StreamOptions(Typed):
    """What a stream holds beside the answer; ``continuous_usage_stats`` is vLLM's."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class Location(Typed):
    """Where a search is made from, roughly."""

    city: Label | None = None
    country: Label | None = None
    region: Label | None = None
    timezone: Label | None = None


class UserLocation(Typed):
    """The same, with the word that it is rough."""

    type: Literal["approximate"]
    approximate: Location


class WebSearchOptions(Typed):
    """How an upstream that searches the web does it."""

    search_context_size: Literal["low", "medium", "high"] | None = None
    user_location: UserLocation | None = None


class PromptCacheOptions(Typed):
    """What an upstream keeps in its cache of prompts."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None


class ModerationStep(Typed):
    """What an upstream's own moderation does."""

    mode: Literal["score", "block"]


class ModerationPolicy(Typed):
    """Before the answer, and after it."""

    input: ModerationStep | None = None
    output: ModerationStep | None = None


class Moderation(Typed):
    """An upstream's own moderation."""

    model: Name
    policy: ModerationPolicy | None = None


def _kind_of_stop(given: Any) -> str | None:
    return "<word>" if isinstance(given, str) else "<list>" if isinstance(given, list) else None


StopWord = Annotated[str, Between(1, 1024)]
Stop = Annotated[
    Annotated[StopWord, Tag("<word>")] | Annotated[list[StopWord], Field(fail_fast=True, max_length=16), Tag("<list>")],
    Discriminator(_kind_of_stop, custom_error_type="wanted", custom_error_message="text or a list of texts"),
]
Whole = Annotated[int, Between(-(2**63), 2**63 - 1)]
Length = Annotated[int, Between(1, WHOLE_MAX)]
Penalty = Annotated[float, Between(-2, 2)]


class Chat(Typed):
    """A request. Of the sound that OpenAI's can ask for there is none: only text is answered."""

    EMPTY: ClassVar = frozenset(
        ("audio", "extra_body", "extra_headers", "extra_query", "image_urls", "images", "timeout")
    )
    """Keys that clients leave empty and that have no meaning otherwise, beside those of the type, are dropped so."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=10_000)]
    model: Annotated[str, Between(1, 256)] | None = None
    frequency_penalty: Penalty | None = None
    function_call: (
        Annotated[
            Annotated[Literal["none", "auto"], Tag("<word>")] | Annotated[Named, Tag("<object>")],
            CHOICE,
        ]
        | None
    ) = None
    functions: Annotated[list[FunctionDefinition], Field(fail_fast=True, max_length=1024)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Between(-100, 100)]],
            AtMost(4096),
        ]
        | None
    ) = None
    logprobs: bool | None = None
    max_completion_tokens: Length | None = None
    max_tokens: Length | None = None
    metadata: Annotated[dict[Annotated[str, Between(1, 64)], Any], AtMost(64)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    moderation: Moderation | None = None
    n: Annotated[int, Between(1, 128)] | None = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    presence_penalty: Penalty | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: Label | None = None
    seed: Whole | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    stop: Stop | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Between(0, 2)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[ToolChoice, Tag("<object>")],
            CHOICE,
        ]
        | None
    ) = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=1024)] | None = None
    top_logprobs: Annotated[int, Between(0, 20)] | None = None
    top_p: Annotated[float, Between(0, 1)] | None = None
    user: Label | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    web_search_options: WebSearchOptions | None = None
