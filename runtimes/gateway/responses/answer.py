"""A chat completion as the answer of ``/v1/responses``: the Response object and the items of its output."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from runtimes.gateway.answers import FIELD
from runtimes.gateway.refusal import upstream_error
from runtimes.gateway.responses.model import ResponseBody

__all__ = [
    "Call",
    "Chat",
    "Delta",
    "begun",
    "call_item",
    "ended",
    "new_id",
    "part_of",
    "read",
    "said_item",
    "usage",
    "whole",
]

INCOMPLETE = {"content_filter": "content_filter", "length": "max_output_tokens"}
"""Chat's reasons to end early, and theirs."""


class _Function(BaseModel):
    name: str | None = None
    arguments: str | None = None


class Call(BaseModel):
    index: int = 0
    id: str | None = None
    function: _Function = _Function()


class Delta(BaseModel):
    """A message, whole or a piece of it."""

    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Call] | None = None

    @property
    def thought(self) -> str:
        """The reasoning, under either of the names that servers have for it."""
        return self.reasoning_content or self.reasoning or ""

    @property
    def text(self) -> str:
        """The answer's text: nothing where it only repeats a refusal."""
        return "" if self.content is None or self.content == self.refusal else self.content


class _Choice(BaseModel):
    message: Delta | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class Chat(BaseModel):
    model: str | None = None
    choices: list[_Choice] = []
    usage: dict[str, Any] | None = None


def read(body: Any) -> Chat:
    """Return the needed parts of a chat completion or chunk. Raises Refusal, 502, for anything else."""
    try:
        return Chat.model_validate(body)
    except ValidationError:
        raise upstream_error("the upstream's answer is not a chat completion.") from None


def new_id(kind: str) -> str:
    """Return an id such as ``msg_…``."""
    return f"{kind}_{uuid.uuid4().hex}"


def begun(asked: ResponseBody, stated: dict[str, Any] | None) -> dict[str, Any]:
    """Return a Response object with nothing in it yet: what was asked, and our field where there is one."""
    said = asked.model_dump(by_alias=True, exclude_none=True)
    reasoning = {"effort": None, "summary": None, **said.get("reasoning", {})}
    text = {"format": {"type": "text"}, **said.get("text", {})}
    tools = [{"parameters": None, "strict": None, **tool} for tool in said.get("tools", [])]
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": said.get("metadata", {}),
        "model": asked.model or "",
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": reasoning,
        "store": False,
        "temperature": asked.temperature,
        "text": text,
        "tool_choice": said.get("tool_choice", "auto"),
        "tools": tools,
        "top_p": asked.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": asked.user,
        **({} if stated is None else {FIELD: stated}),
    }


def ended(
    response: dict[str, Any], output: list[dict[str, Any]], reason: str | None, used: dict[str, Any] | None
) -> dict[str, Any]:
    """Return a Response object that has come to its end, for chat's ``reason``."""
    why = INCOMPLETE.get(reason or "")
    return {
        **response,
        "status": "completed" if why is None else "incomplete",
        "incomplete_details": None if why is None else {"reason": why},
        "output": output,
        "usage": used,
    }


def whole(asked: ResponseBody, completion: dict[str, Any]) -> dict[str, Any]:
    """Return the Response of a chat completion. Raises Refusal, 502, for one that holds no answer."""
    chat = read(completion)
    message = chat.choices[0].message if chat.choices else None
    if message is None:
        raise upstream_error("the upstream's answer is not a chat completion.")
    reason = chat.choices[0].finish_reason
    status = "incomplete" if reason in INCOMPLETE else "completed"
    output = []
    if message.thought:
        output.append(said_item(new_id("rs"), status, [("reasoning_text", message.thought)]))
    calls = message.tool_calls or []
    said = [("output_text", message.text)] if message.text or (message.refusal is None and not calls) else []
    said += [] if message.refusal is None else [("refusal", message.refusal)]
    if said:
        output.append(said_item(new_id("msg"), status, said))
    output += [call_item(new_id("fc"), status, each) for each in calls]
    first = begun(asked, completion.get(FIELD))
    return ended({**first, "model": chat.model or first["model"]}, output, reason, usage(chat.usage))


def said_item(name: str, status: str, parts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return a message of the output, or by its name (``rs_…``) what the model thought, of parts by type and text."""
    content = [part_of(kind, text) for kind, text in parts]
    if name.startswith("rs_"):
        return {"id": name, "type": "reasoning", "summary": [], "content": content}
    return {"id": name, "type": "message", "role": "assistant", "status": status, "content": content}


def part_of(kind: str, text: str) -> dict[str, Any]:
    """Return a part of a message or of reasoning."""
    if kind == "refusal":
        return {"type": kind, "refusal": text}
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return {"type": kind, "text": text, **more}


def call_item(name: str, status: str, call: Call) -> dict[str, Any]:
    """Return a call of a function, as an item of the output."""
    return {
        "id": name,
        "type": "function_call",
        "status": status,
        "call_id": call.id or new_id("call"),
        "name": call.function.name or "",
        "arguments": call.function.arguments or "",
    }


def usage(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return chat's ``usage`` under the names that it has here; None where the upstream counted nothing."""
    if given is None:
        return None

    def number(of: Any, key: str) -> int:
        found = of.get(key) if isinstance(of, dict) else None
        return found if isinstance(found, int) else 0

    prompt, answer = number(given, "prompt_tokens"), number(given, "completion_tokens")
    cached = number(given.get("prompt_tokens_details"), "cached_tokens")
    thought = number(given.get("completion_tokens_details"), "reasoning_tokens")
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": number(given, "total_tokens") or prompt + answer,
    }
