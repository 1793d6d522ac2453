"""What a chat request asks of a model in this process, read from its plain body."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from runtimes.gateway.refusal import Refusal, bad_request
from runtimes.language.writing import Decoding
from safevlm.errors import QuestionError
from safevlm.network.dialogue import Role, Turn

__all__ = ["Asked", "read_asked", "wants_usage"]

MOST_NEW_TOKENS = 4096
MOST_STOPS, LONGEST_STOP = 4, 256
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
PLAIN_KEYS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("n", (1,)),
    ("tools", ([],)),
    ("functions", ([],)),
    ("tool_choice", ("none", "auto")),
    ("function_call", ("none", "auto")),
    ("logprobs", (False,)),
    ("top_logprobs", (0,)),
    ("response_format", ({"type": "text"},)),
    ("frequency_penalty", (0,)),
    ("presence_penalty", (0,)),
    ("logit_bias", ({},)),
    ("modalities", (["text"],)),
)
"""Keys that change an answer's form, and the values that our own runners, which cannot do that, serve."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A dialogue about one image; ``max_new_tokens`` is None where the client leaves it to us.

    ``numbers`` are those of the messages that the turns came from.
    """

    turns: tuple[Turn, ...]
    numbers: tuple[int, ...]
    max_new_tokens: int | None
    decoding: Decoding
    include_usage: bool

    def refusal(self, error: QuestionError) -> Refusal:
        """Return the refusal of a dialogue that the model cannot answer."""
        param = "messages" if error.turn is None else f"messages[{self.numbers[error.turn]}].{error.key}"
        return bad_request(str(error), code=error.code, param=param)


def read_asked(body: dict[str, Any], images: int) -> Asked:
    """Read a checked body that holds so many images. Raises Refusal, 400, with the key that cannot be served."""
    for key, served in PLAIN_KEYS:
        value = body.get(key)
        if value is not None and value not in served:
            raise bad_request(f"the model in this server gives one plain answer. Leave out {key!r}.", param=key)
    if images != 1:
        raise bad_request(
            f"the model in this server answers about exactly one image; {images} were sent.", param="messages"
        )
    turns = {number: turn for number, each in enumerate(body["messages"]) if (turn := _turn(each, number)) is not None}
    return Asked(
        turns=tuple(turns.values()),
        numbers=tuple(turns),
        max_new_tokens=_new_tokens(body),
        decoding=Decoding(
            temperature=_number(body, "temperature", 0.0, 2.0),
            top_p=_number(body, "top_p", 1.0, 1.0),
            seed=_seed(body.get("seed")),
            stop=_stop(body.get("stop")),
        ),
        include_usage=wants_usage(body),
    )


def wants_usage(body: dict[str, Any]) -> bool:
    """Say whether a stream is to end with its token counts."""
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def _turn(message: dict[str, Any], number: int) -> Turn | None:
    """Return a message as a turn, None for a system text that says nothing: it is as if it was not there.

    Several texts are lines of one, and the image stands before them, as the model was trained.
    """
    role = ROLES.get(message["role"])
    if role is None:
        raise _unserved(
            "the model in this server accepts only system, developer, user and assistant messages.", f"[{number}].role"
        )
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise _unserved(f"the model in this server cannot call tools. Leave out {key!r}.", f"[{number}].{key}")
    content = message.get("content") or message.get("refusal") or ""
    parts = content if isinstance(content, list) else [content]
    kinds = [part.get("type") for part in parts if isinstance(part, dict)]
    texts = (part if isinstance(part, str) else part.get("text", part.get("refusal")) for part in parts)
    text = "\n".join(each for each in texts if isinstance(each, str))
    image = "image_url" in kinds
    return None if role == "system" and not image and not text.strip() else Turn(role, text, image)


def _unserved(message: str, place: str) -> Refusal:
    return bad_request(message, code="unsupported_value", param=f"messages{place}")


def _new_tokens(body: dict[str, Any]) -> int | None:
    for key in ("max_completion_tokens", "max_tokens"):
        value = body.get(key)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= MOST_NEW_TOKENS:
            raise bad_request(
                f"{key} must be a whole number from 1 to {MOST_NEW_TOKENS}.", code="invalid_value", param=key
            )
        return value
    return None


def _number(body: dict[str, Any], key: str, default: float, most: float) -> float:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or math.isnan(value):
        raise bad_request(f"{key} must be a number from 0 to {most:g}.", code="invalid_value", param=key)
    return float(value)


def _seed(value: Any) -> int | None:
    if value is not None and (type(value) is not int or not -(2**63) <= value < 2**63):
        raise bad_request("seed must be a whole number of 64 bits.", code="invalid_value", param="seed")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    texts = [] if value in (None, "") else [value] if isinstance(value, str) else value
    fits = isinstance(texts, list) and len(texts) <= MOST_STOPS
    if not fits or not all(isinstance(each, str) and 0 < len(each) <= LONGEST_STOP for each in texts):
        raise bad_request(
            f"stop must be a string or a list of at most {MOST_STOPS} strings, of 1 to {LONGEST_STOP} characters each.",
            code="invalid_value",
            param="stop",
        )
    return tuple(texts)
