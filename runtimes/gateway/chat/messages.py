"""The messages of a chat request as types, in the shapes in which clients send them back.

The reference is the ``openai`` package's; beside it stand the keys that clients and servers add to earlier turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, GetCoreSchemaHandler, Tag, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from runtimes.gateway.chat.typed import CONTENT, TOOL, Between, Label, Name, Typed, is_empty, tag_of

__all__ = ["CacheControl", "ImagePart", "Message", "TextPart"]


class CacheControl(Typed):
    """Anthropic's mark of what is kept in a cache, which LiteLLM passes on."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class CacheBreakpoint(Typed):
    """OpenAI's mark of the same."""

    mode: Literal["explicit"]
    ttl: Literal["30m", "12h"] | None = None


class TextPart(Typed):
    """Text; ``annotations`` are of an answer and mean nothing in a question."""

    DROPPED = frozenset({"annotations"})

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None
    annotations: list[Any] | None = None


class RefusalPart(Typed):
    """What a model said in place of an answer."""

    type: Literal["refusal"]
    refusal: str


class _Address:
    """Marks text that is a URL; one error for whatever is none."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        text = core_schema.str_schema(strict=True, min_length=1)
        return core_schema.custom_error_schema(
            text, custom_error_type="image", custom_error_message="an image is a URL"
        )


ImageAddress = Annotated[str, _Address()]


class ImageUrl(Typed):
    """Where an image is; ``format`` is the client's word for what its bytes say themselves."""

    DROPPED = frozenset({"format"})

    url: ImageAddress
    detail: Literal["auto", "low", "high", "original"] | None = None
    format: Label | None = None


def _kind_of_url(given: Any) -> str | None:
    return "<url>" if isinstance(given, str) else "<object>" if isinstance(given, (dict, ImageUrl)) else None


class ImagePart(Typed):
    """An image, by URL; once the request is parsed, ``image_url`` holds none of the client's."""

    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[ImageAddress, Tag("<url>")] | Annotated[ImageUrl, Tag("<object>")],
        Discriminator(_kind_of_url, custom_error_type="image", custom_error_message="an image is a URL"),
    ]
    cache_control: CacheControl | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None

    @property
    def url(self) -> str:
        """What the client gave."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url

    def forget(self) -> None:
        """Drop the client's URL, whose bytes are already read, so that no copy of it is kept or passed on."""
        detail = None if isinstance(self.image_url, str) else self.image_url.detail
        self.image_url = ImageUrl.model_construct(url="", detail=detail)

    def written(self, urls: Iterator[str]) -> dict[str, Any]:
        """Return the part with the next of the judged images."""
        shown = {"url": next(urls)}
        if isinstance(self.image_url, ImageUrl) and self.image_url.detail is not None:
            shown["detail"] = self.image_url.detail
        return {**super().written(urls), "image_url": shown}


def _kind_of_part(given: Any) -> str | None:
    if isinstance(given, str):
        return "<plain>"
    kind = tag_of(given, "type")
    return f"<{kind}>" if kind in ("text", "refusal", "image_url") else None


Part = Annotated[
    Annotated[str, Tag("<plain>")]
    | Annotated[TextPart, Tag("<text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(_kind_of_part, custom_error_type="part", custom_error_message="an unsupported part"),
]


Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Part], Field(fail_fast=True, max_length=10_000), Tag("<parts>")],
    CONTENT,
]

# -- turns ----------------------------------------------------------------------------------------------


class Function(Typed):
    """A call of a function: its name, and JSON in text; ``parsed_arguments`` is the openai client's reading of it."""

    DROPPED = frozenset({"parsed_arguments"})

    name: Name
    arguments: str
    parsed_arguments: Any = None


class FunctionCall(Typed):
    """A function that a model called; ``index`` is its place in a stream."""

    DROPPED = frozenset({"index", "provider_specific_fields"})

    id: Label | None = None
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None
    provider_specific_fields: Any = None


class CustomInput(Typed):
    """A call of a tool that takes plain text."""

    name: Name
    input: str


class CustomCall(Typed):
    """A custom tool that a model called."""

    DROPPED = frozenset({"index"})

    id: Label | None = None
    type: Literal["custom"]
    custom: CustomInput
    index: int | None = None


ToolCall = Annotated[Annotated[FunctionCall, Tag("<function>")] | Annotated[CustomCall, Tag("<custom>")], TOOL]


class Thinking(Typed):
    """A block of reasoning in Anthropic's form, which LiteLLM sends back."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    cache_control: CacheControl | None = None


class ReasoningDetail(Typed):
    """A block of reasoning in OpenRouter's form."""

    type: Literal["reasoning.text", "reasoning.summary", "reasoning.encrypted"]
    text: str | None = None
    summary: str | None = None
    data: str | None = None
    signature: str | None = None
    id: Label | None = None
    format: Label | None = None
    index: int | None = None


class Message(Typed):
    """A turn. Answers come back as clients keep them: with null and empty keys, and some that only an answer has."""

    DROPPED = frozenset({"annotations", "parsed", "provider_specific_fields"})
    ANSWERS: ClassVar = ("tool_calls", "function_call", "refusal", "reasoning_content", "reasoning")
    BLOCKS: ClassVar = ("reasoning_details", "thinking_blocks")
    EMPTY: ClassVar = ("audio", "images", "reasoning_items")
    """Keys that could hold media: accepted only when empty."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: Annotated[str, Between(0, 128)] | None = None
    tool_call_id: Label | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    function_call: Function | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: Annotated[list[ReasoningDetail], Field(fail_fast=True)] | None = None
    thinking_blocks: Annotated[list[Thinking], Field(fail_fast=True)] | None = None
    cache_control: CacheControl | None = None
    annotations: Any = None
    parsed: Any = None
    provider_specific_fields: Any = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("role"), str):
            raise PydanticCustomError("wanted", "an object with a role")
        return {key: value for key, value in given.items() if key not in cls.EMPTY or not is_empty(value)}

    @model_validator(mode="after")
    def _of_its_role(self) -> Message:
        other = () if self.role == "assistant" else (*self.ANSWERS, *self.BLOCKS)
        for key in (*other, *(() if self.role == "tool" else ("tool_call_id",))):
            if getattr(self, key):
                raise PydanticCustomError("role_key", "not allowed for this role", {"key": key, "role": self.role})
        if self.content is None and self.role not in ("assistant", "function"):
            raise PydanticCustomError("no_content", "content is missing", {"key": "content"})
        return self

    def written(self, urls: Iterator[str]) -> dict[str, Any]:
        """Return the turn; plain strings among the parts become text parts, empty keys are left out."""
        found = super().written(urls)
        found = {key: value for key, value in found.items() if key == "content" or not is_empty(value)}
        if isinstance(self.content, list):
            parts = found["content"]
            found["content"] = [{"type": "text", "text": each} if isinstance(each, str) else each for each in parts]
        elif self.content is None:
            found["content"] = None
        return found

    def images(self) -> Iterator[tuple[int, ImagePart]]:
        """Yield the images and their places among the parts."""
        for place, part in enumerate(self.content if isinstance(self.content, list) else ()):
            if isinstance(part, ImagePart):
                yield place, part
