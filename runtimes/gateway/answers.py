"""What clients are answered, in OpenAI's shapes: completions, chunks, refusals, and our field ``safe_vlm``."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi.responses import Response

from runtimes.gateway.images.judging import Judged
from runtimes.gateway.refusal import Refusal
from safevlm.files.json_file import parse_json

__all__ = [
    "DONE",
    "FIELD",
    "HEADER",
    "JsonResponse",
    "chunk",
    "completion",
    "error_event",
    "event",
    "safe_vlm",
    "strict_json",
    "usage",
    "usage_chunk",
    "without_probabilities",
]

FIELD = "safe_vlm"
HEADER = "X-Safe-VLM"
"""Header of a stream, whose body is the upstream's: the content of :data:`FIELD` as one line of JSON."""
DONE = b"data: [DONE]\n\n"
PROBABILITIES = frozenset(("p_unsafe", "probs"))


class JsonResponse(Response):
    """JSON in ASCII: half a surrogate pair, which models and clients do send, has no UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body's bytes."""
        return json.dumps(content, allow_nan=False).encode("ascii")


def strict_json(content: bytes) -> Any:
    """Return what JSON says that means one thing, but for lone surrogates, which models do write.

    Raises:
        ValueError: What :func:`safevlm.files.json_file.parse_json` refuses: repeated keys, NaN, too deep, too many
        items.
    """
    return parse_json(content, halves=True)


def safe_vlm(
    judged: Sequence[Judged], digest: str | None, *, probabilities: bool = False, **more: Any
) -> dict[str, Any]:
    """Return our field: ``verdict``, each image's finding, the bundle's hash; ``more`` on a block."""
    images = [each.stated(index) for index, each in enumerate(judged)]
    stated = {"verdict": "allow", "images": images, "bundle": digest, **more}
    return stated if probabilities else without_probabilities(stated)


def without_probabilities(value: Any) -> Any:
    """Return what is stated of images without any probability: they let a client search for the threshold."""
    if isinstance(value, dict):
        return {key: without_probabilities(each) for key, each in value.items() if key not in PROBABILITIES}
    return [without_probabilities(each) for each in value] if isinstance(value, list) else value


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Return OpenAI's object of token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def completion(
    model: str, text: str, *, ended: str, stated: dict[str, Any], used: dict[str, int] | None = None
) -> dict[str, Any]:
    """Return a whole chat completion of ours."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if ended == "content_filter":
        message["refusal"] = text
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": ended}],
        "usage": used or usage(0, 0),
        FIELD: stated,
    }


def chunk(
    name: str, model: str, delta: dict[str, Any], *, ended: str | None = None, stated: dict[str, Any] | None = None
) -> bytes:
    """Return one event of a streamed completion of ours; ``name`` is the completion's id, the same in all of them."""
    body: dict[str, Any] = {
        "id": name,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": ended}],
    }
    if stated is not None:
        body[FIELD] = stated
    return event(body)


def usage_chunk(name: str, model: str, used: dict[str, int]) -> bytes:
    """Return the last event of a stream whose client asked for its usage: no choices, the token counts."""
    body = {"id": name, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
    return event({**body, "choices": [], "usage": used})


def event(body: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(body).encode("ascii") + b"\n\n"


def error_event(refusal: Refusal) -> bytes:
    """Return an error as an event: what the ``openai`` client raises when a stream breaks off."""
    return event(refusal.body())
