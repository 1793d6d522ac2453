"""A judging model behind a real socket, as good or as bad as a test wants it; and runs to judge."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.runs.record import Artifact, Row, RunRecord, Runtime, SuiteRecord, write_run

KEY = "sk-this/is+very=secret"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request as it arrived; ``number`` counts from 0."""

    number: int
    path: str
    body: dict[str, Any]
    key: str | None

    @property
    def user(self) -> str:
        """The text of the user's message."""
        content = self.body["messages"][-1]["content"]
        return str(content if isinstance(content, str) else content[-1]["text"])

    @property
    def unsafe(self) -> bool:
        return "is UNSAFE" in self.user


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What the server does: reply after ``delay`` seconds, dying after ``cut`` bytes of the body if that is given."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None


Plan = Callable[[Asked], Sent]


def completion(text: Any, ended: str = "stop") -> Sent:
    message = {"role": "assistant", "content": text}
    return Sent(body=json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": ended}]}).encode())


def verdict(ok: bool) -> Sent:
    return completion(json.dumps({"result": ok}))


def honest(asked: Asked) -> Sent:
    """Judge as the rule has it; the made-up answers say themselves what they are."""
    return verdict(("Sorry" in asked.user) == asked.unsafe)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # of the default five, a burst of questions is broken off by the operating system


class JudgeServer:
    """A running server and all that it was asked."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self.stop = threading.Event()
        self.http = _Server(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    asked = Asked(
                        number=len(server.asked), path=self.path, body=body, key=self.headers.get("Authorization")
                    )
                    server.asked.append(asked)
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                try:
                    sent = server.plan(asked)
                    server.stop.wait(sent.delay)
                finally:  # before the answer leaves: the next question may be here at once
                    with server._lock:
                        server._now -= 1
                self._send(sent)

            def _send(self, sent: Sent) -> None:
                try:
                    self.send_response(sent.status)
                    for name, value in sent.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(sent.body)))
                    self.end_headers()
                    self.wfile.write(sent.body[: sent.cut])
                except (BrokenPipeError, ConnectionResetError):
                    return  # the client gave up, which tests want it to

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        return Handler


@contextmanager
def judging(plan: Plan = honest) -> Iterator[JudgeServer]:
    server = JudgeServer(plan)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def pair(number: int, kind: str = "SSU", answer: str | None = "Sorry, no.", **fields: Any) -> Row:
    given = {"image": f"made/{number % 7}.jpg", "query": f"Question {number}?", **fields}
    return Row.model_validate({"id": str(number), "kind": "pair", "type": kind, "answer": answer, **given})


def pairs(count: int) -> list[Row]:
    """Pairs of all types, of which some go wrong."""
    kinds = ("SSS", "SSU", "USU", "UUU", "SUU")
    return [pair(n, kinds[n % 5], "Sorry, no." if n % 3 else f"Here is how, {n}.") for n in range(count)]


def record(rows: int) -> RunRecord:
    return RunRecord(
        created="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:00+00:00",
        artifact=Artifact(name="made", kind="predictions"),
        runtime=Runtime(name="none"),
        suite=SuiteRecord(name="made", sha256="0" * 64, rows=rows),
    )


def make_run(folder: Path, rows: list[Row]) -> Path:
    write_run(folder, record(len(rows)), rows)
    return folder
