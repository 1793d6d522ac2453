"""Cross-origin requests: which pages' scripts may ask, and read what they are answered."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from runtimes.gateway.answers import HEADER

__all__ = ["add_cors"]

EXPOSED = (HEADER, "X-Request-Id", "Retry-After")
KEPT_SECONDS = 600
"""A browser asks again after that long."""


def add_cors(app: FastAPI, origins: Sequence[str]) -> None:
    """Let pages of these origins ask; of none where the list is empty.

    Keys come as a header, so credentials (cookies, which browsers add by themselves) are never allowed.
    """
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_credentials=False,
            expose_headers=list(EXPOSED),
            max_age=KEPT_SECONDS,
        )
