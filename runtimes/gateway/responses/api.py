"""``/v1/responses``: what was answered as a chat, as the Response or the events that stand for it."""

from __future__ import annotations

import json

from fastapi.responses import Response, StreamingResponse

from runtimes.gateway.answers import HEADER, JsonResponse
from runtimes.gateway.responses.answer import whole
from runtimes.gateway.responses.events import response_events
from runtimes.gateway.responses.request import Asked

__all__ = ["as_response"]


def as_response(asked: Asked, answered: Response) -> Response:
    """Return the answer of a chat request as that of ``/v1/responses``; an error stays what it is.

    Raises Refusal, 502, for a completion that is none.
    """
    if isinstance(answered, StreamingResponse):
        stated = answered.headers.get(HEADER)
        chunks = answered.body_iterator
        answered.body_iterator = response_events(asked.body, chunks, None if stated is None else json.loads(stated))  # type: ignore[arg-type]
        return answered
    if answered.status_code != 200:
        return answered
    return JsonResponse(whole(asked.body, json.loads(bytes(answered.body))))
