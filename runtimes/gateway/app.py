"""The gateway's routes: every image is judged before anything goes upstream, and it fails closed.

::

    from runtimes.gateway.app import Gateway, create_app

    app = create_app(Gateway.open("build/guard", upstream="http://127.0.0.1:8000/v1"))
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from models.errors import InputError, SafeVLMError
from runtimes.gate import Gate
from runtimes.gate_command import open_gate
from runtimes.gate_result import GateResult, refusal_text
from runtimes.gateway.answers import FIELD, HEADER, JsonResponse, completion, safe_vlm, usage, without_probabilities
from runtimes.gateway.asked import Asked, read_asked, wants_usage
from runtimes.gateway.cors import add_cors
from runtimes.gateway.embedded import Embedded, Told
from runtimes.gateway.judging import Judged, Judging
from runtimes.gateway.metrics import Metrics
from runtimes.gateway.openapi import openapi_document
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal, no_such_model
from runtimes.gateway.requests import ChatRequest, parse_chat, parse_guard
from runtimes.gateway.responses_api import as_response
from runtimes.gateway.responses_request import parse_response
from runtimes.gateway.serving import (
    DRAINING,
    NOTES,
    ClientGone,
    Served,
    check_key,
    gone,
    or_gone,
    read_body,
    refused,
    unrouted,
)
from runtimes.gateway.streams import EventsResponse, answer_events, failure, refusal_events, rest
from runtimes.gateway.threads import off_loop
from runtimes.gateway.upstream import Events, HttpUpstream
from runtimes.judge import Guard
from runtimes.policy import Policy

__all__ = ["Gateway", "create_app"]


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
        options = options or GatewayOptions()
        if upstream is not None and (model is not None or bundle is None):
            raise InputError("--upstream goes with --bundle and without --model: the model is upstream.")
        if upstream is not None:
            assert bundle is not None
            guard = Guard.open(bundle, runtime, precision=precision, threads=threads, view=options.view)
            gate = Gate(guard, None, policy)
        else:
            gate = open_gate(
                bundle, model, policy=policy, runtime=runtime, precision=precision, threads=threads, view=options.view
            )
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
            options=options,
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
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        with ExitStack() as opened:
            try:
                opened.enter_context(self.gateway.gate)
            except SafeVLMError as error:
                app.state.failure = error
                raise
            async with AsyncExitStack() as held:
                await held.enter_async_context(self.judging)
                if self.http is not None:
                    await held.enter_async_context(self.http)
                else:
                    self.embedded = await held.enter_async_context(
                        Embedded(self.gateway.gate, self.gateway.name, self.metrics)
                    )
                yield

    # -- routes -----------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        check_key(request, self.gateway.client_key)
        return await self._answered(request, await read_body(request, self.options, parse_chat))

    async def responses(self, request: Request) -> Response:
        check_key(request, self.gateway.client_key)
        asked = await read_body(request, self.options, parse_response)
        try:
            return as_response(asked, await self._answered(request, asked.chat))
        except Refusal as refusal:
            raise asked.named(refusal) from None

    async def _answered(self, request: Request, parsed: ChatRequest) -> Response:
        """Answer a chat request, whose images are judged before anything else."""
        notes = request.scope[NOTES]
        notes["images"] = len(parsed.images)
        asked = None
        if self.embedded is not None:
            asked = read_asked(parsed.plain, len(parsed.images))
            await or_gone(request, self.embedded.check(asked))
        begun = time.perf_counter()
        judged = await or_gone(request, self.judging.judge(parsed.images))
        notes["guard_ms"] = round((time.perf_counter() - begun) * 1000, 1)
        for index, each in enumerate(judged):
            reason = self._stops(each)
            if reason is not None:
                return self._blocked(request, parsed, judged, index, reason)
        if self.embedded is not None and asked is not None:
            return await self._embedded(request, parsed, judged[0], asked, self.embedded)
        assert self.http is not None
        return await self._passed_on(request, parsed, judged, self.http)

    async def guard_images(self, request: Request) -> Response:
        check_key(request, self.gateway.client_key)
        images = await read_body(request, self.options, parse_guard)
        judged = await or_gone(request, self.judging.judge(images))
        data = [
            {**each.stated(index), "probs": dict(zip(self.guard.classes, map(float, each.probs), strict=True))}
            for index, each in enumerate(judged)
        ]
        if not self.options.show_probabilities:
            data = without_probabilities(data)
        return JsonResponse({"object": "list", "bundle": self.gateway.gate.digest, "data": data})

    async def models(self, request: Request) -> Response:
        check_key(request, self.gateway.client_key)
        if self.http is not None:
            passed = await self.http.models(self._headers(request))
            return await off_loop(passed.size, lambda: JsonResponse(passed.body, passed.status, passed.headers))
        return JsonResponse({"object": "list", "data": [self._own_model()]})

    async def model(self, request: Request, name: str) -> Response:
        check_key(request, self.gateway.client_key)
        if self.http is not None:
            passed = await self.http.models(self._headers(request), name)
            return await off_loop(passed.size, lambda: JsonResponse(passed.body, passed.status, passed.headers))
        if name != self.gateway.name:
            raise no_such_model(name)
        return JsonResponse(self._own_model())

    async def live(self) -> Response:
        """Say that the process answers, whatever it depends on."""
        return JsonResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Say whether requests should be sent here, and why not."""
        reasons = []
        if request.scope.get("state", {}).get(DRAINING):
            reasons.append("the server is shutting down")
        if self._stuck:
            reasons.append("the guard is stuck")
        if self.http is not None and not await self.http.reachable():
            reasons.append("the upstream is unreachable")
        stated = {"status": "not ready" if reasons else "ready", "reasons": reasons}
        return JsonResponse(stated, status_code=503 if reasons else 200)

    @property
    def _stuck(self) -> bool:
        return not self.judging.batching.working or self.gateway.gate.stuck > 0

    async def health(self) -> Response:
        stuck = self._stuck
        upstream = "embedded" if self.http is None else "ok" if await self.http.reachable() else "unreachable"
        stated = {"status": "stuck" if stuck else "ok", "guard": "stuck" if stuck else "ready", "upstream": upstream}
        return JsonResponse(stated, status_code=503 if stuck else 200)

    async def described(self) -> Response:
        asks, passes = self.gateway.client_key is not None, self.http is not None
        return JsonResponse(openapi_document(self.options, key=asks, upstream=passes))

    async def numbers(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # -- what becomes of a request ----------------------------------------------------------------------

    def _stops(self, judged: Judged) -> str | None:
        """Return why an image is not answered about, None where it may be."""
        finding, policy = judged.finding, self.gateway.gate.policy
        image = f"the image as other readers show it ({judged.view})" if judged.hidden else "the image"
        if finding.verdict == "block":
            return f"the standalone guard blocks {image}"
        settled = self.embedded is not None and self.embedded.settles and not judged.hidden
        if finding.verdict == "unsure" and not settled and (finding.review or policy.still_unsure == "block"):
            about = f" of {image}" if judged.hidden else ""
            return f"the standalone guard is unsure{about}, and there is no exact verdict to settle it"
        return None

    def _blocked(
        self, request: Request, parsed: ChatRequest, judged: Sequence[Judged], index: int, reason: str
    ) -> Response:
        harm = judged[index].finding.harm or judged[index].finding.label
        stated = self._stated(
            judged,
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
            return JsonResponse(completion(parsed.model, text, ended="content_filter", stated=stated))
        return EventsResponse(refusal_events(parsed.model, text, stated, include_usage=wants_usage(parsed.plain)))

    async def _passed_on(
        self, request: Request, parsed: ChatRequest, judged: Sequence[Judged], upstream: HttpUpstream
    ) -> Response:
        body = parsed.upstream_body([each.url for each in judged])
        stated = self._stated(judged)
        request.scope[NOTES]["outcome"] = "allowed"
        headers = self._headers(request)
        if not parsed.stream:
            passed = await or_gone(request, upstream.complete(body, headers))
            answer = {**passed.body, FIELD: stated}
            return await off_loop(passed.size, lambda: JsonResponse(answer, passed.status, passed.headers))
        found = await or_gone(request, upstream.stream(body, headers))
        if not isinstance(found, Events):
            return JsonResponse({**found.body, FIELD: stated}, status_code=found.status, headers=found.headers)
        return EventsResponse(found, found.aclose, {HEADER: json.dumps(stated)})

    async def _embedded(
        self, request: Request, parsed: ChatRequest, judged: Judged, asked: Asked, embedded: Embedded
    ) -> Response:
        told = embedded.answer(judged, asked)
        pieces: list[str] = []
        try:
            first = await or_gone(request, _first(told))
            if first.result is None and not parsed.stream:
                pieces.append(first.piece or "")
                first = await or_gone(request, rest(told, pieces))
        except BaseException:
            await told.aclose()
            raise
        result = first.result
        if result is not None and (result.verdict == "block" or result.error is not None):
            return self._not_answered(request, parsed, judged, result)
        request.scope[NOTES]["outcome"] = "allowed"
        stated = self._stated([judged])
        if not parsed.stream:
            assert result is not None  # what follows a piece was collected to its end
            used = usage(result.prompt_tokens, result.completion_tokens)
            ended = result.finish_reason or "stop"
            text = result.answer or ""
            return JsonResponse(completion(parsed.model, text, ended=ended, stated=stated, used=used))
        return EventsResponse(
            answer_events(parsed.model, first, told, stated, include_usage=asked.include_usage),
            told.aclose,
            {HEADER: json.dumps(stated)},
        )

    def _not_answered(self, request: Request, parsed: ChatRequest, judged: Judged, result: GateResult) -> Response:
        """Answer what the gate blocked after the standalone guard let it pass: by the exact verdict, or an error."""
        if result.finding is None:
            raise failure(result)
        finding = result.finding
        harm = finding.harm or finding.label
        stated = self._stated(
            [judged],
            verdict="block",
            stage=result.stage,
            image=0,
            label=finding.label,
            harm=harm,
            p_unsafe=round(finding.p_unsafe, 6),
            reason=result.reason,
        )
        return self._refuse(request, parsed, harm, result.stage, stated)

    def _own_model(self) -> dict[str, Any]:
        return {"id": self.gateway.name, "object": "model", "created": 0, "owned_by": "safevlm-edge"}

    def _stated(self, judged: Sequence[Judged], **more: Any) -> dict[str, Any]:
        return safe_vlm(judged, self.gateway.gate.digest, probabilities=self.options.show_probabilities, **more)

    def _headers(self, request: Request) -> dict[str, str]:
        headers = dict(request.headers)
        if self.gateway.client_key is not None:
            headers.pop("authorization", None)  # it was for this server
        return headers


def create_app(gateway: Gateway) -> FastAPI:
    """Return the application, for uvicorn or any other ASGI server; its parts are opened when it starts.

    ``app.state.failure`` is the error that kept them from opening, if one did.
    """
    metrics = Metrics()
    running = _Running(gateway, metrics)
    app = FastAPI(lifespan=running.lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.failure = None
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


async def _first(told: AsyncIterator[Told]) -> Told:
    return await told.__anext__()
