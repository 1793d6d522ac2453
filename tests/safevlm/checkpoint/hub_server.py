"""A stand-in for the hub: a real HTTP server on this machine that speaks what huggingface_hub asks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits by their hash, each file name -> bytes; ``refs`` are branches and tags."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    token: str | None = None
    gated: bool = False


@dataclass
class StandInHub:
    repositories: Mapping[str, Repository]
    url: str = ""
    log: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of every request, in order."""
    broken: int | None = None
    """Status that every request gets."""

    def fetched(self) -> set[str]:
        """Names of the files whose content was sent."""
        return {path.split("/resolve/")[1].split("/", 1)[1] for verb, path in self.log if self._is_content(verb, path)}

    @staticmethod
    def _is_content(verb: str, path: str) -> bool:
        return verb == "GET" and "/resolve/" in path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def serve(hub: StandInHub) -> Iterator[StandInHub]:
    """Run the server on a free port of the loopback device while the context lasts."""

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            return

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.log.append((self.command, path))
            if hub.broken is not None:
                return self._send(hub.broken, b"broken")
            parts = path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            parts = parts[2:] if api else parts
            repository = hub.repositories.get("/".join(parts[:2]))
            sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if repository is None:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if repository.token is not None and sent != repository.token:
                if repository.gated:
                    return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
                return self._send(401, b"{}", {"X-Error-Message": "Invalid username or password."})
            kind, revision = parts[2], parts[3]
            commit = repository.refs.get(revision, revision)
            if commit not in repository.commits:
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = repository.commits[commit]
            if kind == "revision":
                about = {"id": "/".join(parts[:2]), "sha": commit, "siblings": [{"rfilename": f} for f in files]}
                return self._send(200, json.dumps(about).encode())
            if kind == "tree":
                rows = [
                    {"type": "file", "path": name, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
                    for name, raw in files.items()
                ]
                return self._send(200, json.dumps(rows).encode())
            raw = files.get("/".join(parts[4:]))
            if kind != "resolve" or raw is None:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            tag = hashlib.sha1(raw).hexdigest()
            return self._send(200, raw, {"ETag": f'"{tag}"', "X-Repo-Commit": commit})

        def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
