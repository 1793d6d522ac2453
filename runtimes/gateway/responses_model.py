"""The body of ``POST /v1/responses``, typed: what is taken, and nothing else. Unknown keys are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

__all__ = [
    "FunctionCall",
    "FunctionCallOutput",
    "FunctionChoice",
    "InputImage",
    "InputText",
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


class _Typed(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Breakpoint(_Typed):
    """A hint for a cache, which is left out."""

    mode: Literal["explicit"]
    ttl: Literal["30m", "12h"] | None = None


class InputText(_Typed):
    """Text of a message or of a function's output."""

    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: Breakpoint | None = None


class InputImage(_Typed):
    """An image: a data URL, or an http(s) URL where the server allows the host."""

    type: Literal["input_image"]
    image_url: str = Field(json_schema_extra={"format": "image-url"})
    detail: Literal["auto", "low", "high", "original"] | None = None
    file_id: None = None
    prompt_cache_breakpoint: Breakpoint | None = None


class OutputText(_Typed):
    """What the model said in an earlier turn."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class OutputRefusal(_Typed):
    """What was refused in an earlier turn."""

    type: Literal["refusal"]
    refusal: str


class Message(_Typed):
    """A message of any role, from a client or from an earlier answer."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Annotated[InputText | InputImage | OutputText | OutputRefusal, Field(discriminator="type")]]
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCall(_Typed):
    """A function that the model called in an earlier turn."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None
    namespace: None = None
    caller: None = None
    async_: Literal[False] | None = Field(default=None, alias="async")


class FunctionCallOutput(_Typed):
    """What a called function returned: text, or parts, images among them."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Annotated[InputText | InputImage, Field(discriminator="type")]]
    id: str | None = None
    status: Status | None = None
    name: str | None = None
    namespace: None = None
    caller: None = None


class ReasoningText(_Typed):
    """A piece of an earlier turn's reasoning."""

    type: Literal["summary_text", "reasoning_text"]
    text: str


class ReasoningItem(_Typed):
    """An earlier turn's reasoning, which is left out."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


def _kind(item: Any) -> Any:
    given = item.get("type") if isinstance(item, Mapping) else getattr(item, "type", None)
    return "message" if given is None else given


Item = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class PlainFormat(_Typed):
    """Text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(_Typed):
    """JSON of a schema."""

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class Text(_Typed):
    """The form of the answer."""

    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class FunctionTool(_Typed):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(_Typed):
    """The function that is to be called."""

    type: Literal["function"]
    name: str


class Reasoning(_Typed):
    """How long to think; summaries are a hint that is left out."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class StreamOptions(_Typed):
    """Of a stream; there is no padding to leave out."""

    include_obfuscation: bool | None = None


class ResponseBody(_Typed):
    """The body of ``POST /v1/responses``. ``store`` is read and nothing is stored, as the answer says."""

    input: str | Annotated[list[Item], Field(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    text: Text | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    max_tool_calls: int | None = Field(default=None, ge=1)
    background: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
