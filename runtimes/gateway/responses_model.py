"""The body of ``POST /v1/responses``, typed: what is taken, and nothing else.

The reference is ``openai.types.responses.response_create_params``. Beside what asks for something stand keys that are
hints or say what was so in an earlier turn: they are read and left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from runtimes.gateway.chat_messages import CacheBreakpoint
from runtimes.gateway.chat_types import CHOICE, Length
from runtimes.gateway.typed import CONTENT, Between, Free, Label, Name, Typed, tag_of

__all__ = [
    "FunctionCall",
    "FunctionCallOutput",
    "FunctionChoice",
    "InputImage",
    "InputText",
    "Item",
    "Message",
    "OutputRefusal",
    "OutputText",
    "PlainFormat",
    "ReasoningItem",
    "ResponseBody",
    "SchemaFormat",
    "Text",
]

Status = Literal["in_progress", "completed", "incomplete"]


Strictly = BeforeValidator(lambda given: given if isinstance(given, bool) else str(given))
"""0 is no ``False``, though Python has them equal."""


def _by_type(*kinds: str, otherwise: str | None = None) -> Discriminator:
    def kind_of(given: Any) -> str | None:
        kind = tag_of(given, "type") or otherwise
        return f"<{kind}>" if kind in kinds else None

    find: Callable[[Any], str | None] = kind_of
    wanted = ", ".join(f"'{kind}'" for kind in kinds)
    return Discriminator(find, custom_error_type="kind", custom_error_message=f"of type {wanted}")


class InputText(Typed):
    """Text of a message or of a function's output."""

    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class InputImage(Typed):
    """An image: a data URL, or an http(s) URL where the server allows the host."""

    type: Literal["input_image"]
    image_url: Annotated[str, Field(min_length=1)]
    detail: Literal["auto", "low", "high", "original"] | None = None
    file_id: None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class OutputText(Typed):
    """What the model said in an earlier turn."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class OutputRefusal(Typed):
    """What was refused in an earlier turn."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[InputImage, Tag("<input_image>")]
    | Annotated[OutputText, Tag("<output_text>")]
    | Annotated[OutputRefusal, Tag("<refusal>")],
    _by_type("input_text", "input_image", "output_text", "refusal"),
]
OutputPart = Annotated[
    Annotated[InputText, Tag("<input_text>")] | Annotated[InputImage, Tag("<input_image>")],
    _by_type("input_text", "input_image"),
]


class Message(Typed):
    """A message of any role, from a client or from an earlier answer."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[
        Annotated[str, Tag("<string>")] | Annotated[list[Part], Field(fail_fast=True), Tag("<parts>")], CONTENT
    ]
    id: Label | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCall(Typed):
    """A function that the model called in an earlier turn."""

    type: Literal["function_call"]
    call_id: Label
    name: Name
    arguments: str
    id: Label | None = None
    status: Status | None = None
    namespace: None = None
    caller: None = None
    async_: Annotated[Literal[False], Strictly] | None = Field(default=None, alias="async")


class FunctionCallOutput(Typed):
    """What a called function returned: text, or parts, images among them."""

    type: Literal["function_call_output"]
    call_id: Label
    output: Annotated[
        Annotated[str, Tag("<string>")] | Annotated[list[OutputPart], Field(fail_fast=True), Tag("<parts>")], CONTENT
    ]
    id: Label | None = None
    status: Status | None = None
    name: Label | None = None
    namespace: None = None
    caller: None = None


class ReasoningText(Typed):
    """A piece of an earlier turn's reasoning."""

    type: Literal["summary_text", "reasoning_text"]
    text: str


class ReasoningItem(Typed):
    """An earlier turn's reasoning, which is left out."""

    type: Literal["reasoning"]
    id: Label | None = None
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


Item = Annotated[
    Annotated[Message, Tag("<message>")]
    | Annotated[FunctionCall, Tag("<function_call>")]
    | Annotated[FunctionCallOutput, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    _by_type("message", "function_call", "function_call_output", "reasoning", otherwise="message"),
]


class PlainFormat(Typed):
    """Text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(Typed):
    """JSON of a schema."""

    type: Literal["json_schema"]
    name: Name
    schema_: Free = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


Format = Annotated[
    Annotated[PlainFormat, Tag("<text>")]
    | Annotated[PlainFormat, Tag("<json_object>")]
    | Annotated[SchemaFormat, Tag("<json_schema>")],
    _by_type("text", "json_object", "json_schema"),
]


class Text(Typed):
    """The form of the answer."""

    format: Format | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class FunctionTool(Typed):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: Free | None = None
    strict: bool | None = None


class FunctionChoice(Typed):
    """The function that is to be called."""

    type: Literal["function"]
    name: Name


class Reasoning(Typed):
    """How long to think; summaries are a hint that is left out."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class StreamOptions(Typed):
    """Of a stream; there is no padding to leave out."""

    include_obfuscation: bool | None = None


MetadataKey = Annotated[str, Field(max_length=64)]
MetadataText = Annotated[str, Field(max_length=512)]


class ResponseBody(Typed):
    """The body. ``store`` is read and nothing is stored, as the answer says."""

    input: Annotated[
        Annotated[str, Tag("<string>")] | Annotated[list[Item], Field(fail_fast=True, min_length=1), Tag("<parts>")],
        CONTENT,
    ]
    model: Annotated[str, Between(1, 256)] | None = None
    instructions: str | None = None
    max_output_tokens: Length | None = None
    temperature: Annotated[float, Between(0, 2)] | None = None
    top_p: Annotated[float, Between(0, 1)] | None = None
    text: Text | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=1024)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[FunctionChoice, Tag("<object>")],
            CHOICE,
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    metadata: Annotated[dict[MetadataKey, MetadataText], Field(max_length=16)] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    max_tool_calls: Length | None = None
    background: Annotated[Literal[False], Strictly] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
