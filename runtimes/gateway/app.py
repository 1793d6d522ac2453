"""The gateway's routes: every image is judged before anything goes upstream, and it fails closed.

::

    from runtimes.gateway.app import Gateway, create_app

    app = create_app(Gateway.open("build/guard", upstream="http://127.0.0.1:8000/v1"))
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from models.errors import InputError
from runtimes.gate import Gate
from runtimes.gate_command import open_gate
from runtimes.gate_result import GateResult
from runtimes.gateway.answers import DONE, FIELD, HEADER, chunk, completion, error_event, refusal_text, safe_vlm
from runtimes.gateway.embedded import Embedded
from runtimes.gateway.judging import Judged, Judging
from runtimes.gateway.metrics import Metrics
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal, bad_request, guard_error, upstream_error
from runtimes.gateway.requests import ChatRequest, parse_chat, parse_guard
from runtimes.gateway.serving import (
    NOTES,
    ClientGone,
    Served,
    broken,
    check_key,
    gone,
    or_gone,
    read_json,
    refused,
)
from runtimes.gateway.upstream import HttpUpstream
from runtimes.judge import Guard
from runtimes.policy import Policy

__all__ = ["Gateway", "create_app"]

MAX_NEW_TOKENS, MOST_NEW_TOKENS = 256, 4096
EVENTS = "text/event-stream"


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """What a gateway is made of: a guard and, behind it, an upstream's URL or a gate with a language model.

    ``key`` is sent upstream where the client sends none; ``client_key`` is asked of clients, and is not passed on.
    """

    gate: Gate
    name: str
    """Of the model in this process, as clients see it."""
    upstream: str | None = None
    options: GatewayOptions = field(default_factory=GatewayOptions)
    key: str | None = field(default=None, repr=False)
    client_key: str | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        bundle: Path | str | None,
        *,
        upstream: str | None = None,
        model: str | None = None,
        policy: Policy | None = None,
        options: GatewayOptions | None = None,
        key: str | None = None,
        client_key: str | None = None,
        runtime: str = "auto",
        precision: str | None = None,
        threads: int | None = None,
    ) -> Gateway:
        """Open a bundle, and a model (by default the bundle's own source) unless there is an ``upstream``.

        Errors: InputError for a guard that cannot judge by itself; those of :func:`open_gate`.
        """
        if upstream is not None and (model is not None or bundle is None):
            raise InputError("--upstream goes with --bundle and without --model: the model is upstream.")
        if upstream is not None:
            assert bundle is not None
            guard = Guard.open(bundle, runtime, precision=precision, threads=threads)
            gate = Gate(guard, None, policy)
        else:
            gate = open_gate(bundle, model, policy=policy, runtime=runtime, precision=precision, threads=threads)
        if gate.guard is None:
            raise InputError(
                "there is no standalone guard to put in front: the bundle (or GGUF folder) reads the language model. "
                "Make one that can judge by itself: python -m export.onnx --model M --out DIR --images DIR."
            )
        name = Path(model).name if model is not None else "safe-vlm"
        return cls(
            gate=gate,
            name=name,
            upstream=upstream,
            options=options or GatewayOptions(),
            key=key,
            client_key=client_key,
        )


class _Running:
    """A gateway that serves: the parts that are open while the application lives."""

    def __init__(self, gateway: Gateway, metrics: Metrics) -> None:
        self.gateway, self.metrics, self.options = gateway, metrics, gateway.options
        guard = gateway.gate.guard
        assert guard is not None
        self.guard = guard
        self.judging = Judging(guard, gateway.gate.policy, gateway.options, metrics)
        self.http: HttpUpstream | None = None
        self.embedded: Embedded | None = None
        if gateway.upstream is not None:
            self.http = HttpUpstream(gateway.upstream, gateway.options, metrics, key=gateway.key)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as held:
            held.enter_context(self.gateway.gate)
            await held.enter_async_context(self.judging)
            if self.http is not None:
                await held.enter_async_context(self.http)
            else:
                self.embedded = Embedded(self.gateway.gate, self.gateway.name, self.metrics)
                held.callback(self.embedded.close)
            yield

    # -- routes -----------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        check_key(request, self.gateway.client_key)
        body = await read_json(request, self.options)
        parsed = parse_chat(body, self.options)
        notes = request.scope[NOTES]
        notes["images"] = len(parsed.images)
        question = parsed.question() if self.embedded is not None else ""
        begun = time.perf_counter()
        judged = await or_gone(request, self.judging.judge(parsed.images))
        notes["guard_ms"] = round((time.perf_counter() - begun) * 1000, 1)
        for index, each in enumerate(judged):
            reason = self._stops(each)
            if reason is not None:
                return self._blocked(request, parsed, judged, index, reason)
        if self.embedded is not None:
            return await self._embedded(request, parsed, judged[0], question, self.embedded)
        assert self.http is not None
        return await self._passed_on(request, parsed, judged, self.http)

    async def guard_images(self, request: Request) -> Response:
        check_key(request, self.gateway.client_key)
        images = parse_guard(await read_json(request, self.options), self.options)
        judged = await or_gone(request, self.judging.judge(images))
        data = [
            {**each.stated(index), "probs": dict(zip(self.guard.classes, map(float, each.probs), strict=True))}
            for index, each in enumerate(judged)
        ]
        return JSONResponse({"object": "list", "bundle": self.gateway.gate.digest, "data": data})

    async def models(self, request: Request) -> Response:
        check_key(request, self.gateway.client_key)
        if self.http is not None:
            passed = await self.http.models(self._headers(request))
            return JSONResponse(passed.body, status_code=passed.status)
        model = {"id": self.gateway.name, "object": "model", "created": 0, "owned_by": "safevlm-edge"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self) -> Response:
        stuck = self.judging.batching.lane.stuck + self.gateway.gate.stuck
        upstream = "embedded" if self.http is None else "ok" if await self.http.reachable() else "unreachable"
        stated = {"status": "stuck" if stuck else "ok", "guard": "stuck" if stuck else "ready", "upstream": upstream}
        return JSONResponse(stated, status_code=503 if stuck else 200)

    async def numbers(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # -- what becomes of a request ----------------------------------------------------------------------

    def _stops(self, judged: Judged) -> str | None:
        """Return why an image is not answered about, None where it may be."""
        finding, policy = judged.finding, self.gateway.gate.policy
        if finding.verdict == "block":
            return "the standalone guard blocks the image"
        settled = self.embedded is not None and self.embedded.settles
        if finding.verdict == "unsure" and not settled and (finding.review or policy.still_unsure == "block"):
            return "the standalone guard is unsure, and there is no exact verdict to settle it"
        return None

    def _blocked(
        self, request: Request, parsed: ChatRequest, judged: Sequence[Judged], index: int, reason: str
    ) -> Response:
        harm = judged[index].finding.harm or judged[index].finding.label
        stated = safe_vlm(
            judged,
            self.gateway.gate.digest,
            verdict="block",
            stage="guard",
            image=index,
            label=judged[index].finding.label,
            harm=harm,
            p_unsafe=round(judged[index].finding.p_unsafe, 6),
            reason=reason,
        )
        return self._refuse(request, parsed, harm, "guard", stated)

    def _refuse(
        self, request: Request, parsed: ChatRequest, harm: str | None, stage: str, stated: dict[str, Any]
    ) -> Response:
        request.scope[NOTES].update(outcome="blocked", label=harm, stage=stage)
        self.metrics.blocks.labels(harm or "unknown", stage).inc()
        text = refusal_text(harm)
        if not parsed.stream:
            return JSONResponse(completion(parsed.model, text, ended="content_filter", stated=stated))
        return StreamingResponse(_refusal_events(parsed.model, text, stated), media_type=EVENTS)

    async def _passed_on(
        self, request: Request, parsed: ChatRequest, judged: Sequence[Judged], upstream: HttpUpstream
    ) -> Response:
        body = parsed.with_images(await self.judging.png_urls(judged)) if judged else parsed.body
        stated = safe_vlm(judged, self.gateway.gate.digest)
        request.scope[NOTES]["outcome"] = "allowed"
        headers = self._headers(request)
        if not parsed.stream:
            passed = await or_gone(request, upstream.complete(body, headers))
            return JSONResponse({**passed.body, FIELD: stated}, status_code=passed.status)
        found = await or_gone(request, upstream.stream(body, headers))
        if not isinstance(found, AsyncIterator):
            return JSONResponse({**found.body, FIELD: stated}, status_code=found.status)
        return StreamingResponse(found, media_type=EVENTS, headers={HEADER: json.dumps(stated)})

    async def _embedded(
        self, request: Request, parsed: ChatRequest, judged: Judged, question: str, embedded: Embedded
    ) -> Response:
        told = embedded.answer(judged, question, _new_tokens(parsed))
        pieces: list[str] = []
        try:
            first = await or_gone(request, _next(told))
            if first.result is None and not parsed.stream:
                pieces.append(first.piece or "")
                first = await or_gone(request, _rest(told, pieces))
        except BaseException:
            await told.aclose()  # type: ignore[attr-defined]
            raise
        result = first.result
        if result is not None and (result.verdict == "block" or result.error is not None):
            return self._not_answered(request, parsed, judged, result)
        request.scope[NOTES]["outcome"] = "allowed"
        stated = safe_vlm([judged], self.gateway.gate.digest)
        if not parsed.stream:
            text = (result.answer or "") if result is not None else "".join(pieces)
            return JSONResponse(completion(parsed.model, text, ended="stop", stated=stated))
        events = _answer_events(parsed.model, first.piece, result, told, stated)
        return StreamingResponse(events, media_type=EVENTS, headers={HEADER: json.dumps(stated)})

    def _not_answered(self, request: Request, parsed: ChatRequest, judged: Judged, result: GateResult) -> Response:
        """Answer what the gate blocked after the standalone guard let it pass: by the exact verdict, or an error."""
        if result.finding is None:
            raise _failure(result)
        finding = result.finding
        harm = finding.harm or finding.label
        stated = safe_vlm(
            [judged],
            self.gateway.gate.digest,
            verdict="block",
            stage=result.stage,
            image=0,
            label=finding.label,
            harm=harm,
            p_unsafe=round(finding.p_unsafe, 6),
            reason=result.reason,
        )
        return self._refuse(request, parsed, harm, result.stage, stated)

    def _headers(self, request: Request) -> dict[str, str]:
        headers = dict(request.headers)
        if self.gateway.client_key is not None:
            headers.pop("authorization", None)  # it was for this server
        return headers


def create_app(gateway: Gateway) -> FastAPI:
    """Return the application, for uvicorn or any other ASGI server; its parts are opened when it starts."""
    metrics = Metrics()
    running = _Running(gateway, metrics)
    app = FastAPI(lifespan=running.lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Served, options=gateway.options, metrics=metrics)
    for error, handler in ((Refusal, refused), (ClientGone, gone), (Exception, broken)):
        app.add_exception_handler(error, handler)
    app.add_api_route("/v1/chat/completions", running.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/guard", running.guard_images, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", running.models, methods=["GET"], response_model=None)
    app.add_api_route("/healthz", running.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", running.numbers, methods=["GET"], response_model=None)
    return app


# -- streams --------------------------------------------------------------------------------------------


async def _next(told: AsyncIterator[Any]) -> Any:
    return await told.__anext__()


async def _rest(told: AsyncIterator[Any], pieces: list[str]) -> Any:
    """Collect the pieces that follow and return what ends them."""
    async for each in told:
        if each.result is not None:
            return each
        pieces.append(each.piece)
    raise upstream_error("the answer had no end.")


async def _refusal_events(model: str, text: str, stated: dict[str, Any]) -> AsyncIterator[bytes]:
    name = f"chatcmpl-{uuid.uuid4().hex}"
    yield chunk(name, model, {"role": "assistant", "content": text, "refusal": text}, stated=stated)
    yield chunk(name, model, {}, ended="content_filter", stated=stated)
    yield DONE


async def _answer_events(
    model: str, piece: str | None, result: GateResult | None, told: Any, stated: dict[str, Any]
) -> AsyncIterator[bytes]:
    name = f"chatcmpl-{uuid.uuid4().hex}"
    try:
        yield chunk(name, model, {"role": "assistant", "content": piece or ""}, stated=stated)
        while result is None:
            each = await told.__anext__()
            result = each.result
            if each.piece is not None:
                yield chunk(name, model, {"content": each.piece})
        if result.error is not None or result.verdict == "block":
            yield error_event(_failure(result))
            return
        yield chunk(name, model, {}, ended="stop")
        yield DONE
    finally:
        with contextlib.suppress(RuntimeError):  # it may be running still when the client leaves
            await told.aclose()


def _failure(result: GateResult) -> Refusal:
    if result.error_in == "generate":
        return upstream_error("the language model failed; the answer is not whole.")
    return guard_error("the image could not be judged; nothing was answered.")


def _new_tokens(parsed: ChatRequest) -> int:
    for key in ("max_completion_tokens", "max_tokens"):
        value = parsed.body.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_NEW_TOKENS:
            raise bad_request(f"{key} must be a whole number from 1 to {MOST_NEW_TOKENS}.", param=key)
        return value
    return MAX_NEW_TOKENS
