"""A gateway that serves: its routes, and what becomes of a request."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from runtimes.gate.result import GateResult, refusal_text
from runtimes.gateway.answers import FIELD, HEADER, JsonResponse, completion, safe_vlm, usage, without_probabilities
from runtimes.gateway.chat.asked import Asked, read_asked, wants_usage
from runtimes.gateway.chat.requests import ChatRequest, parse_chat, parse_guard
from runtimes.gateway.gateway import Gateway
from runtimes.gateway.images.judge import Judge
from runtimes.gateway.images.judging import Judged
from runtimes.gateway.refusal import Refusal, no_such_model
from runtimes.gateway.responses.api import as_response
from runtimes.gateway.responses.request import parse_response
from runtimes.gateway.serving.metrics import Metrics
from runtimes.gateway.serving.openapi import openapi_document
from runtimes.gateway.serving.serving import (
    DRAINING,
    NOTES,
    read_body,
    while_connected,
)
from runtimes.gateway.serving.streams import EventsResponse, answer_events, failure, noted, refusal_events, rest
from runtimes.gateway.serving.threads import off_loop
from runtimes.gateway.upstream.embedded import AnswerPart, Embedded
from runtimes.gateway.upstream.exact import ExactUpstream
from runtimes.gateway.upstream.upstream import Events, HttpUpstream
from runtimes.guard.verdict import Finding, stops_at_guard
from safevlm.errors import InputError, SafeVLMError

__all__ = ["Running"]

CLIENT = "safevlm.client"
"""Key of a request's scope that holds the client."""

_log = logging.getLogger(__name__)


class Running:
    """A gateway that serves: the parts that are open while the application lives."""

    def __init__(self, gateway: Gateway, metrics: Metrics) -> None:
        self.gateway, self.metrics, self.options = gateway, metrics, gateway.options
        self.judge = Judge(gateway, metrics)
        self._loop: asyncio.AbstractEventLoop | None = None
        """While requests are served."""
        self._reload_wanted = self._ending = False
        self._reloading: asyncio.Task[None] | None = None
        self.http: HttpUpstream | None = None
        self.embedded: Embedded | None = None
        self.exact: ExactUpstream | None = None
        if gateway.upstream is not None:
            self.http = HttpUpstream(gateway.upstream, gateway.options, metrics, key=gateway.key)
            if gateway.exact is not None:
                self.exact = ExactUpstream(self.http, gateway.exact)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        try:
            await self.judge.open()
        except SafeVLMError as error:
            app.state.failure = error
            raise
        try:
            async with AsyncExitStack() as held:
                if self.http is not None:
                    await held.enter_async_context(self.http)
                    await self._begin_exact(app)
                else:
                    self.embedded = await held.enter_async_context(
                        Embedded(self.gateway.gate, self.gateway.name, self.metrics)
                    )
                self._loop = asyncio.get_running_loop()
                if self._reload_wanted:
                    self._begin_reload()
                yield
        finally:
            self._loop, self._reload_wanted, self._ending = None, False, True
            if self._reloading is not None:
                await asyncio.wait({self._reloading})
            await self.judge.close()

    async def _begin_exact(self, app: FastAPI) -> None:
        try:
            if self.exact is not None:
                await self.exact.begin()
        except SafeVLMError as error:
            app.state.failure = error
            raise

    def reload_soon(self) -> None:
        """Reload once requests are served: from any thread, or a signal's handler. Many calls at once are one."""
        self._reload_wanted = not self._ending
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_reload)

    def _begin_reload(self) -> None:
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.create_task(self._reload())

    async def _reload(self) -> None:
        """Judge by what the gateway's files hold now: bundle, policy, keys; by the old ones while they cannot be read.

        Requests that are being judged end with the guard that they began with.
        """
        while self._reload_wanted:
            self._reload_wanted = False
            try:
                gateway = await asyncio.to_thread(self.gateway.renewed)
                if gateway.exact != self.gateway.exact:
                    raise InputError("the new bundle is of another guard than the upstream's. Restart both.")
                judge = Judge(gateway, self.metrics)
                await judge.open()
            except Exception as error:  # of any kind: what serves goes on serving
                self.metrics.reloads.labels("failed").inc()
                known = isinstance(error, SafeVLMError)
                told = str(error) if known else type(error).__name__
                _log.error("reload failed; the old bundle, policy and keys stay in use: %s", told, exc_info=not known)
                continue
            if gateway.clients is not None and self.gateway.clients is not None:
                gateway.clients.go_on(self.gateway.clients)
            if self.http is not None:
                self.http.key = gateway.key
            old, self.judge, self.gateway = self.judge, judge, gateway
            self.metrics.reloads.labels("done").inc()
            _log.warning("reloaded: bundle %s", gateway.gate.digest)
            await old.close()

    # -- routes -----------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        self._admit(request)
        return await self._answered(request, await read_body(request, self.options, parse_chat))

    async def responses(self, request: Request) -> Response:
        self._admit(request)
        asked = await read_body(request, self.options, parse_response)
        try:
            return as_response(asked, await self._answered(request, asked.chat))
        except Refusal as refusal:
            raise asked.named(refusal) from None

    async def _answered(self, request: Request, parsed: ChatRequest) -> Response:
        """Answer a chat request, whose images are judged before anything else."""
        notes = request.scope[NOTES]
        self._count_images(request, len(parsed.images))
        asked = None
        if self.embedded is not None:
            asked = read_asked(parsed.plain, len(parsed.images))
            await while_connected(request, self.embedded.check(asked))
        begun = time.perf_counter()
        judge = self.judge
        with judge.held() as judging:
            judged = await while_connected(request, judging.judge(parsed.images))
        notes["guard_ms"] = round((time.perf_counter() - begun) * 1000, 1)
        for index, each in enumerate(judged):
            reason = self._stops(each, judge)
            if reason is not None:
                return self._blocked(request, parsed, judged, index, reason)
        if self.embedded is not None and asked is not None:
            return await self._embedded(request, parsed, judged[0], asked, self.embedded)
        assert self.http is not None
        if self.exact is not None:
            asking = self.exact.stops(judged, judge.policy, parsed.model, self._headers(request))
            stopped = await while_connected(request, asking)
            if stopped is not None:
                index, found, reason = stopped.index, stopped.finding, stopped.reason
                return self._blocked(request, parsed, judged, index, reason, stage="exact", finding=found)
        return await self._passed_on(request, parsed, judged, self.http)

    async def guard_images(self, request: Request) -> Response:
        self._admit(request)
        images = await read_body(request, self.options, parse_guard)
        self._count_images(request, len(images))
        judge = self.judge
        with judge.held() as judging:
            judged = await while_connected(request, judging.judge(images))
        data = [
            {**each.stated(index), "probs": dict(zip(judge.guard.classes, map(float, each.probs), strict=True))}
            for index, each in enumerate(judged)
        ]
        if not self.options.show_probabilities:
            data = without_probabilities(data)
        return JsonResponse({"object": "list", "bundle": judge.digest, "data": data})

    async def models(self, request: Request) -> Response:
        self._admit(request)
        if self.http is not None:
            passed = await self.http.models(self._headers(request))
            return await off_loop(passed.size, lambda: JsonResponse(passed.body, passed.status, passed.headers))
        return JsonResponse({"object": "list", "data": [self._own_model()]})

    async def model(self, request: Request, name: str) -> Response:
        self._admit(request)
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
            reasons.append("the upstream is unreachable or not ready")
        stated = {"status": "not ready" if reasons else "ready", "reasons": reasons}
        return JsonResponse(stated, status_code=503 if reasons else 200)

    @property
    def _stuck(self) -> bool:
        return self.judge.stuck

    async def health(self) -> Response:
        stuck = self._stuck
        upstream = "embedded" if self.http is None else "ok" if await self.http.reachable() else "unreachable"
        stated = {"status": "stuck" if stuck else "ok", "guard": "stuck" if stuck else "ready", "upstream": upstream}
        return JsonResponse(stated, status_code=503 if stuck else 200)

    async def described(self) -> Response:
        asks, passes = self.gateway.clients is not None, self.http is not None
        return JsonResponse(openapi_document(self.options, key=asks, upstream=passes))

    async def numbers(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # -- what becomes of a request ----------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        """Raise Refusal, 401 or 429, for a client that may not ask, or not now."""
        clients = self.gateway.clients
        if clients is None:
            return
        client = clients.find(request.headers.get("authorization", ""))
        request.scope[NOTES]["client"] = client.name
        request.scope[CLIENT] = client
        client.take("requests")

    def _count_images(self, request: Request, count: int) -> None:
        request.scope[NOTES]["images"] = count
        client = request.scope.get(CLIENT)
        if client is not None:
            client.take("images", count)

    def _stops(self, judged: Judged, judge: Judge) -> str | None:
        """Return why an image is not answered about, None where it may be."""
        settles = self.exact is not None or (self.embedded is not None and self.embedded.settles)
        hidden = judged.view if judged.hidden else None
        return stops_at_guard(judged.finding, judge.policy, settles=settles, hidden=hidden)

    def _blocked(
        self,
        request: Request,
        parsed: ChatRequest,
        judged: Sequence[Judged],
        index: int,
        reason: str,
        *,
        stage: str = "guard",
        finding: Finding | None = None,
    ) -> Response:
        """Refuse by the guard's finding on an image, or by a later stage's."""
        finding = finding or judged[index].finding
        harm = finding.harm or finding.label
        stated = self._stated(
            judged,
            verdict="block",
            stage=stage,
            image=index,
            label=finding.label,
            harm=harm,
            p_unsafe=round(finding.p_unsafe, 6),
            reason=reason,
        )
        return self._refuse(request, parsed, harm, stage, stated)

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
            passed = await while_connected(request, upstream.complete(body, headers))
            answer = {**passed.body, FIELD: stated}
            return await off_loop(passed.size, lambda: JsonResponse(answer, passed.status, passed.headers))
        found = await while_connected(request, upstream.stream(body, headers))
        if not isinstance(found, Events):
            return JsonResponse({**found.body, FIELD: stated}, status_code=found.status, headers=found.headers)
        return EventsResponse(noted(found, request.scope[NOTES]), found.aclose, {HEADER: json.dumps(stated)})

    async def _embedded(
        self, request: Request, parsed: ChatRequest, judged: Judged, asked: Asked, embedded: Embedded
    ) -> Response:
        told = embedded.answer(judged, asked)
        pieces: list[str] = []
        try:
            first = await while_connected(request, _first(told))
            if first.result is None and not parsed.stream:
                pieces.append(first.piece or "")
                first = await while_connected(request, rest(told, pieces))
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
        events = answer_events(parsed.model, first, told, stated, include_usage=asked.include_usage)
        return EventsResponse(
            noted(events, request.scope[NOTES]),
            told.aclose,
            {HEADER: json.dumps(stated)},
        )

    def _not_answered(self, request: Request, parsed: ChatRequest, judged: Judged, result: GateResult) -> Response:
        """Answer what the gate blocked after the standalone guard let it pass: by the exact verdict, or an error."""
        if result.finding is None:
            raise failure(result)
        return self._blocked(request, parsed, [judged], 0, result.reason, stage=result.stage, finding=result.finding)

    def _own_model(self) -> dict[str, Any]:
        return {"id": self.gateway.name, "object": "model", "created": 0, "owned_by": "safevlm-edge"}

    def _stated(self, judged: Sequence[Judged], **more: Any) -> dict[str, Any]:
        digest = judged[0].bundle if judged else self.judge.digest
        return safe_vlm(judged, digest, probabilities=self.options.show_probabilities, **more)

    def _headers(self, request: Request) -> dict[str, str]:
        headers = dict(request.headers)
        if self.gateway.clients is not None:
            headers.pop("authorization", None)  # it was for this server
        return headers


async def _first(told: AsyncIterator[AnswerPart]) -> AnswerPart:
    return await told.__anext__()
