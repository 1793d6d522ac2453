"""Why a request is not served, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any

__all__ = ["Refusal", "bad_request", "guard_error", "no_such_model", "overloaded", "upstream_error"]


class Refusal(Exception):  # noqa: N818  # an answer to a client, not an error of ours
    """An HTTP answer: status, ``error`` object, and seconds to come back in where that helps.

    Messages never hold images, prompts or keys.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry: int = 0,
        more: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message
        self.code, self.param, self.retry = code, param, retry
        self._more = more or {}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to it."""
        return {**({"Retry-After": str(self.retry)} if self.retry else {}), **self._more}

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_request(message: str, *, code: str = "invalid_request", param: str | None = None, status: int = 400) -> Refusal:
    """What the client sent cannot be taken."""
    return Refusal(status, "invalid_request_error", message, code=code, param=param)


def no_such_model(name: str) -> Refusal:
    """Nothing of that name is served."""
    return bad_request(
        f"unknown model {name[:80]!r}. GET /v1/models lists the models served here.",
        code="model_not_found",
        param="model",
        status=404,
    )


def overloaded(message: str) -> Refusal:
    """There is too much to do just now."""
    return Refusal(503, "overloaded_error", message, code="overloaded", retry=1)


def guard_error(message: str) -> Refusal:
    """An image could not be judged, so that nothing is answered about it."""
    return Refusal(503, "guard_error", message, code="guard_unavailable", retry=1)


def upstream_error(message: str, *, status: int = 502, code: str = "upstream_error") -> Refusal:
    """The language model behind the gateway did not answer as it should."""
    return Refusal(status, "upstream_error", message, code=code)
