"""The server loop: uvicorn with the deadlines it lacks, and an end that breaks off nobody without a word.

uvicorn gives a half-sent head and a client that does not read all the time in the world. granian, on hyper, was tried:
its deadline for heads starts with their first byte, a client that does not read holds it, its end included, for ever,
and it takes no socket of ours. So the deadlines are here, on uvicorn's own HTTP/1.1 connection.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import select
import socket
import threading
from collections.abc import Collection
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal, bad_request, overloaded
from runtimes.gateway.serving.metrics import Metrics
from runtimes.gateway.serving.serving import DRAINING, shutting_down, unserved
from safevlm.terminal.commandline import leave

__all__ = ["GatewayServer"]

MAX_HEAD = 32 * 1024
MAX_HEADERS = 100
FREE_CHUNKS, BYTES_A_CHUNK = 1024, 64
"""A body may come in so many pieces, and in one more for each 64 bytes: a million chunks of one byte cost seconds."""
KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than clients keep theirs (httpx and openai: 5 s), so that none
sends a request just when it is closed."""
BACKLOG = 256
OTHER_FILES = 512
"""Files beside the clients' connections: those upstream, those waiting to be accepted, bundles, pipes."""
LINGER_SECONDS = 1.0
"""After the signal to end: for a request that is on its way on an open connection."""
LAST_WORDS_SECONDS = 2.0
"""Seconds after the time for shutting down, to send the errors that report it."""


class GatewayServer(uvicorn.Server):
    """Serve an application on a socket that listens already: ``run(sockets=[bound])``.

    SIGTERM and Ctrl-C let what is being served end, within ``shutdown_timeout`` seconds; a second one ends at once.
    """

    def __init__(self, app: FastAPI, options: GatewayOptions, *, shutdown_timeout: float = 30) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=MAX_HEAD,
            timeout_keep_alive=KEEP_ALIVE,
        )
        super().__init__(config)
        self.shutdown_timeout = shutdown_timeout
        self.server_state: Connections = Connections(options, _room_for(options.max_connections), app.state.metrics)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in good order; at the second signal, at once."""
        if self.should_exit:
            self.force_exit = True
            watchdog = threading.Timer(LAST_WORDS_SECONDS, leave, [0])
            watchdog.daemon = True
            watchdog.start()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept what has knocked already, finish or tell it, and close."""
        state = self.server_state
        self.lifespan.state[DRAINING] = True  # what comes from now on is told so, see Served
        state.default_headers = [*state.default_headers, CLOSE_HEADER]
        await _accepted(sockets or [])
        for server in self.servers:
            server.close()
        for each in sockets or []:
            each.close()
        for connection in list(state.connections):
            connection.shutdown()
        until = asyncio.get_running_loop().time() + self.shutdown_timeout
        await self._until_empty(until - max(0.0, self.shutdown_timeout - LINGER_SECONDS), state.connections)
        for connection in state.waiting:
            connection.end_waiting(shutting_down())
        await self._until_empty(until, state.connections, state.tasks)
        await self._cut_off()
        if not self.force_exit:
            await self.lifespan.shutdown()

    async def _cut_off(self) -> None:
        """End what is still being served; it gets a moment to say so to its client."""
        state, loop = self.server_state, asyncio.get_running_loop()
        for task in state.tasks:
            task.cancel()
        await self._until_empty(loop.time() + LAST_WORDS_SECONDS, state.tasks)
        for connection in state.connections:
            connection.transport.close()
        await self._until_empty(loop.time() + LAST_WORDS_SECONDS, state.connections)
        for connection in state.connections:
            connection.transport.abort()

    async def _until_empty(self, until: float, *served: Collection[object]) -> None:
        loop = asyncio.get_running_loop()
        while any(served) and loop.time() < until and not self.force_exit:
            await asyncio.sleep(0.02)


async def _accepted(sockets: list[socket.socket]) -> None:
    """Let the loop accept the connections that wait in the sockets' queues: closing a socket would reset them."""
    for _ in range(BACKLOG):
        if not select.select(sockets, [], [], 0)[0]:
            return
        await asyncio.sleep(0)


def _room_for(connections: int) -> int:
    """Raise this process's limit of open files, and return how many connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + BACKLOG + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    fit = max(1, soft // 2)
    logging.getLogger(__name__).warning(
        "%d connections at once instead of %d: this process may open %d files", fit, connections, soft
    )
    return fit


class Connections(ServerState):
    """The connections of a server: those that wait for a request, oldest first, make room for new ones."""

    def __init__(self, options: GatewayOptions, limit: int, metrics: Metrics) -> None:
        super().__init__()
        self.options, self.limit, self.metrics = options, limit, metrics
        self.fresh: dict[Connection, None] = {}
        """Those that have not sent a request yet."""
        self.kept: dict[Connection, None] = {}
        """Those that wait for a further one."""

    @property
    def waiting(self) -> tuple[Connection, ...]:
        """All that wait for a request, in the order in which they give way."""
        return (*self.fresh, *self.kept)

    def make_room(self, newest: Connection) -> None:
        """End the connection that has waited longest; ``newest`` itself where all others are being served."""
        if len(self.connections) > self.limit:
            next(iter(each for each in self.waiting if each is not newest), newest).give_way()


class Connection(H11Protocol):
    """uvicorn's connection, with deadlines for the head of a request and for what is written.

    Between requests one timer runs: uvicorn's own for an idle connection, ours from the first byte of a head. While
    anything waits to be sent, another looks whether the client takes some of it.
    """

    server_state: Connections

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.conn = self._parser = _Parser()
        self.logger, self.access_log = _log, False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._served: Any = None
        self._begun = self.loop.time()

    # -- asyncio's calls --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # any byte that waits is told of: pause_writing
        self._watch()
        self.server_state.make_room(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything."""
        self._stop("_head_timer")
        self._stop("_write_timer")
        self._no_longer_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came; a head no more than its limit at once, which is otherwise looked at only when it is short."""
        while data and not self.transport.is_closing():
            size = MAX_HEAD + 1 if self.conn.their_state is h11.IDLE else len(data)
            piece, data = data[:size], data[size:]
            super().data_received(piece)
        self._watch()

    def pause_writing(self) -> None:
        """Start to look whether the client reads."""
        super().pause_writing()
        if self._write_timer is None:
            self._look_again(self.loop.time())

    def resume_writing(self) -> None:
        """All is sent."""
        super().resume_writing()
        self._stop("_write_timer")

    # -- uvicorn's calls --------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer anything that is not HTTP, in the shape of all other errors."""
        self._refuse(bad_request(msg, status=self._parser.status))

    def shutdown(self) -> None:
        """Say in the answer, where none has begun, that the connection will be closed."""
        if self._serving:
            self.cycle.keep_alive = False
            if not self.cycle.response_started:
                self.cycle.default_headers = [*self.cycle.default_headers, CLOSE_HEADER]

    # -- deadlines --------------------------------------------------------------------------------------

    @property
    def _serving(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """Set the timer for a head where one is being waited for."""
        if self.transport.is_closing() or self._serving:
            self._stop("_head_timer")
            self._no_longer_waiting()
            if self._served is not self.cycle:
                self._served, self._begun = self.cycle, self.loop.time()
            return
        queue = self.server_state.fresh if self.cycle is None else self.server_state.kept
        queue.setdefault(self)
        if self.conn.trailing_data[0]:  # half a head that came with an earlier request: this connection is not idle
            self._unset_keepalive_if_required()
        if self._head_timer is None and self.timeout_keep_alive_task is None:
            self._head_timer = self.loop.call_later(self.server_state.options.header_timeout, self._head_is_late)

    def _head_is_late(self) -> None:
        seconds = self.server_state.options.header_timeout
        self.end_waiting(bad_request(f"the request did not arrive within {seconds:g} s.", code="timeout", status=408))

    def end_waiting(self, refusal: Refusal) -> None:
        """Close a connection without a request; a client that has sent half of one gets the reason."""
        if self.conn.trailing_data[0] and self.conn.our_state is h11.IDLE:
            self._refuse(refusal)
        else:
            self.transport.close()

    def give_way(self) -> None:
        """Close for a newer connection; there are too many."""
        self._no_longer_waiting()
        self.server_state.connections.discard(self)
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self._refuse(
                overloaded(f"{self.server_state.limit} connections are open, the maximum. Try again in a second.")
            )

    def _look_again(self, since: float) -> None:
        """Look again when the client must have taken some, or when the answer's time is over."""
        options, now = self.server_state.options, self.loop.time()
        left = self._begun + options.total_timeout - now
        wait = min(options.write_timeout, left) if left > 0 else options.write_timeout
        size = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(wait, self._check_written, size, since)

    def _check_written(self, size: int, since: float) -> None:
        options, now = self.server_state.options, self.loop.time()
        taken = self.transport.get_write_buffer_size() < size
        over = now - self._begun - options.total_timeout
        if not taken or (over >= 0 and now - since >= options.write_timeout):
            self.transport.abort()
        else:
            self._look_again(since)

    # -- parts ------------------------------------------------------------------------------------------

    def _refuse(self, refusal: Refusal) -> None:
        """Answer without the application, and close."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = json.dumps(refusal.body()).encode("ascii")
            headers = {
                "content-type": "application/json",
                "content-length": str(len(content)),
                "connection": "close",
                "x-request-id": unserved(refusal, self.server_state.metrics),
                **refusal.headers,
            }
            reason = HTTPStatus(refusal.status).phrase.encode()
            parts = (
                h11.Response(status_code=refusal.status, headers=list(headers.items()), reason=reason),
                h11.Data(data=content),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(part) or b"" for part in parts))
        self.transport.close()

    def _no_longer_waiting(self) -> None:
        self.server_state.fresh.pop(self, None)
        self.server_state.kept.pop(self, None)

    def _stop(self, timer: str) -> None:
        handle: asyncio.TimerHandle | None = getattr(self, timer)
        if handle is not None:
            handle.cancel()
            setattr(self, timer, None)


class _Parser(h11.Connection):
    """h11's parser with limits on the number of headers and of a body's pieces; ``status`` is of its last refusal."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD)
        self.status = 400
        self._pieces = self._bytes = 0

    def next_event(self) -> Any:
        """Return the next event. Raises h11.RemoteProtocolError for anything that is not HTTP, or too much of it."""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._pieces = self._bytes = 0
                if len(event.headers) > MAX_HEADERS:
                    raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
            elif isinstance(event, h11.Data):
                self._pieces += 1
                self._bytes += len(event.data)
                if self._pieces > FREE_CHUNKS + self._bytes // BYTES_A_CHUNK:
                    raise h11.RemoteProtocolError("the chunks of the body are too small")
        except h11.RemoteProtocolError as error:
            self.status = error.error_status_hint
            raise
        return event


_log = logging.getLogger(f"{__name__}.connection")
_log.setLevel(logging.ERROR)  # uvicorn warns of every client that speaks no HTTP
