"""The gateway's routes: every image is judged before anything goes upstream, and it fails closed.

::

    from runtimes.gateway.app import Gateway, create_app

    app = create_app(Gateway.open("build/guard", upstream="http://127.0.0.1:8000/v1"))
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from runtimes.gateway.cors import add_cors
from runtimes.gateway.gateway import Gateway
from runtimes.gateway.metrics import Metrics
from runtimes.gateway.refusal import Refusal
from runtimes.gateway.running import Running
from runtimes.gateway.serving import (
    ClientGone,
    Served,
    gone,
    refused,
    unrouted,
)

__all__ = ["Gateway", "create_app"]


def create_app(gateway: Gateway) -> FastAPI:
    """Return the application, for uvicorn or any other ASGI server; its parts are opened when it starts.

    ``app.state.failure`` is the error that kept them from opening, if one did. ``app.state.reload_soon()``, from any
    thread, judges by what bundle, policy and keys are now, as soon as it serves. ``app.state.metrics`` holds what is
    counted.
    """
    metrics = Metrics()
    running = Running(gateway, metrics)
    app = FastAPI(lifespan=running.lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.failure, app.state.reload_soon, app.state.metrics = None, running.reload_soon, metrics
    app.add_middleware(Served, options=gateway.options, metrics=metrics)
    add_cors(app, gateway.options.cors_origins)  # outermost: what is refused can be read, too
    for error, handler in ((Refusal, refused), (ClientGone, gone), (HTTPException, unrouted)):
        app.add_exception_handler(error, handler)
    app.add_api_route("/v1/chat/completions", running.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/responses", running.responses, methods=["POST"], response_model=None)
    app.add_api_route("/v1/guard", running.guard_images, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", running.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", running.model, methods=["GET"], response_model=None)
    app.add_api_route("/livez", running.live, methods=["GET"], response_model=None)
    app.add_api_route("/readyz", running.ready, methods=["GET"], response_model=None)
    app.add_api_route("/healthz", running.health, methods=["GET"], response_model=None)
    app.add_api_route("/openapi.json", running.described, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", running.numbers, methods=["GET"], response_model=None)
    return app
