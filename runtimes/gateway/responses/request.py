"""A request of ``/v1/responses`` as the chat request that it stands for, which is judged and answered like any other.

Each key has a type here; what is written into the chat request is then checked by :func:`parse_chat` with all else.
What names something that OpenAI stores (``previous_response_id``, ``file_id``, ``item_reference``…) is refused by
name: nothing is stored here. Earlier turns' reasoning and ids, and keys that are hints, are read and left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from runtimes.gateway.chat.misfits import misfit, place, unknown
from runtimes.gateway.chat.requests import ChatRequest, parse_chat
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal, bad_request
from runtimes.gateway.responses.model import (
    FunctionCall,
    FunctionCallOutput,
    FunctionChoice,
    InputImage,
    InputText,
    Message,
    OutputRefusal,
    OutputText,
    PlainFormat,
    ReasoningItem,
    ResponseBody,
    SchemaFormat,
    Text,
)
from safevlm.terminal.printable import shortened

__all__ = ["Asked", "parse_response"]

STORED = "this server stores nothing. Send the whole conversation as 'input'."
ITEM = "names a stored item, but this server stores nothing. Send the item itself (clients do so with 'store': false)."
REFUSED = {
    "previous_response_id": STORED,
    "conversation": STORED,
    "prompt": "this server stores no prompts. Send 'instructions' and 'input'.",
    "background": "background answers are not supported. Leave out 'background'.",
    "file_id": "this server stores no files. Send the image itself as 'image_url', a data URL.",
    "top_logprobs": "log probabilities are served by /v1/chat/completions only.",
}
"""Known keys that are refused unless empty, with the message for the client."""
NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "messages": "input",
}
"""Keys of a chat request that are written here, and what the client calls them."""
_PLACE = re.compile(r"messages\[(\d+)\](?:\.(content|tool_calls)\[(\d+)\])?")
_TOOL = re.compile(r"(tools\[\d+\])\.function\b")
_TAG = re.compile(r"\.?<\w+>")
_NAME = re.compile(r"\b(?:" + "|".join(NAMES) + r")\b")


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """A request of ``/v1/responses``, the chat request that is served for it, and where its messages come from."""

    body: ResponseBody
    chat: ChatRequest
    places: Mapping[str, str]

    def named(self, refusal: Refusal) -> Refusal:
        """Return a refusal of the chat request in the names of this one."""
        return _named(refusal, self.places)


def parse_response(body: Any, options: GatewayOptions) -> Asked:
    """Check a request and translate it. Raises Refusal, 400."""
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object.")
    try:
        typed = ResponseBody.model_validate({key: body[key] for key in body if key not in options.pass_keys})
    except ValidationError as error:
        raise _refused(error) from None
    chat, places = _Conversation().of(typed)
    passed = {key: body[key] for key in body if key in options.pass_keys}
    try:
        return Asked(body=typed, chat=parse_chat({**passed, **chat}, options), places=places)
    except Refusal as refusal:
        raise _named(refusal, places) from None


class _Conversation:
    """Messages as they are gathered from items, and the place that each has in the request."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.places: dict[str, str] = {}

    def of(self, body: ResponseBody) -> tuple[dict[str, Any], Mapping[str, str]]:
        """Return the chat request and its messages' places."""
        if body.instructions is not None:
            self._add("instructions", role="system", content=body.instructions)
        if isinstance(body.input, str):
            self._add("input", role="user", content=body.input)
        else:
            for number, item in enumerate(body.input):
                self._take(item, f"input[{number}]")
        return {"messages": self.messages, **_settings(body)}, self.places

    def _add(self, where: str, **message: Any) -> None:
        self.places[f"messages[{len(self.messages)}]"] = where
        self.messages.append(message)

    def _take(self, item: Message | FunctionCall | FunctionCallOutput | ReasoningItem, where: str) -> None:
        if isinstance(item, Message):
            role = "system" if item.role == "developer" else item.role  # few families' templates know the other
            self._add(where, role=role, content=self._content(item.content, f"{where}.content"))
        elif isinstance(item, FunctionCall):
            if not self.messages or self.messages[-1]["role"] != "assistant":
                self._add(where, role="assistant", content=None)
            calls = self.messages[-1].setdefault("tool_calls", [])
            self.places[f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"] = where
            function = {"name": item.name, "arguments": item.arguments}
            calls.append({"id": item.call_id, "type": "function", "function": function})
        elif isinstance(item, FunctionCallOutput):
            content = self._content(item.output, f"{where}.output")
            self._add(where, role="tool", tool_call_id=item.call_id, content=content)

    def _content(
        self, given: str | Sequence[InputText | InputImage | OutputText | OutputRefusal], where: str
    ) -> str | list[dict[str, Any]]:
        if isinstance(given, str):
            return given
        parts = [_part(each) for each in given]
        if len(parts) == 1 and parts[0]["type"] == "text":
            return str(parts[0]["text"])
        for number in range(len(parts)):
            self.places[f"messages[{len(self.messages)}].content[{number}]"] = f"{where}[{number}]"
        return parts


def _part(part: InputText | InputImage | OutputText | OutputRefusal) -> dict[str, Any]:
    if isinstance(part, InputImage):
        kept = {} if part.detail is None else {"detail": part.detail}
        return {"type": "image_url", "image_url": {"url": part.image_url, **kept}}
    return {"type": "text", "text": part.refusal if isinstance(part, OutputRefusal) else part.text}


def _settings(body: ResponseBody) -> dict[str, Any]:
    """Return what a chat request says beside its messages."""
    text, choice = body.text or Text(), body.tool_choice
    found: dict[str, Any] = {
        "model": body.model,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "response_format": None if text.format is None else _format(text.format),
        "verbosity": text.verbosity,
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
        "service_tier": body.service_tier,
        "user": body.user,
        "stream": body.stream,
    }
    if body.stream:
        found["stream_options"] = {"include_usage": True}
    if body.tools:
        found["tools"] = [
            {"type": "function", "function": each.model_dump(exclude={"type"}, exclude_none=True)}
            for each in body.tools
        ]
        if isinstance(choice, FunctionChoice):
            found["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            found["tool_choice"] = choice
        found["parallel_tool_calls"] = body.parallel_tool_calls
    return {key: value for key, value in found.items() if value is not None}


def _format(form: PlainFormat | SchemaFormat) -> dict[str, Any]:
    if isinstance(form, PlainFormat):
        return {"type": form.type}
    return {"type": "json_schema", "json_schema": form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)}


def _named(refusal: Refusal, places: Mapping[str, str]) -> Refusal:
    def named(text: str) -> str:
        text = _PLACE.sub(lambda found: _place(found, places), text).replace(".image_url.url", ".image_url")
        return _NAME.sub(lambda found: NAMES[found.group()], _TOOL.sub(r"\1", text))

    param = None if refusal.param is None else named(refusal.param)
    return Refusal(
        refusal.status, refusal.kind, named(refusal.message), code=refusal.code, param=param, retry=refusal.retry
    )


def _place(found: re.Match[str], places: Mapping[str, str]) -> str:
    whole, message = found.group(), f"messages[{found.group(1)}]"
    if whole in places:
        return places[whole]
    return places[message] + whole[len(message) :] if message in places else whole


def _refused(error: ValidationError) -> Refusal:
    """Return the refusal of an invalid body: the first thing that is wrong with it."""
    for found in error.errors(include_url=False):
        steps = [step for step in found["loc"] if _TAG.fullmatch(str(step)) is None]
        where, key = place(steps), str(steps[-1]) if steps else ""
        if found["type"] == "extra_forbidden" and len(steps) == 1:
            return unknown(key)
        if key in REFUSED and found["type"] in ("none_required", "literal_error", "less_than_equal"):
            return bad_request(f"{where}: {REFUSED[key]}", code="unsupported_parameter", param=where)
        if found["type"] == "kind":
            kind = found["input"].get("type") if isinstance(found["input"], dict) else None
            other = f"is of type '{shortened(str(kind))}': it must be {found['msg']}."
            message = ITEM if kind == "item_reference" else other
            return bad_request(f"{where} {message}", code="unsupported_content", param=where)
    told = misfit(error)
    param = None if told.param is None else _TAG.sub("", told.param)
    return Refusal(told.status, told.kind, _TAG.sub("", told.message), code=told.code, param=param)
