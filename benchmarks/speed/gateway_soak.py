"""A gateway under clients of which a third misbehave, for minutes: what honest ones get, and how its memory goes."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from benchmarks.speed.gateway import gateway_command, request_body, two_pictures
from benchmarks.speed.gateway_servers import require_httpx, server, upstream
from safevlm.errors import InputError

__all__ = ["GatewaySoak", "soak_gateway", "soak_table"]

CLIENTS = 64
READINGS = 20
MEBIBYTE = 2**20
PATH = "/v1/chat/completions"


@dataclass(frozen=True, kw_only=True)
class GatewaySoak:
    """``outcomes`` counts honest requests and faults by what became of them; ``memory`` are MiB over the time.

    Memory is the resident memory of the gateway's process and of the processes that it started, evenly spaced.
    """

    bundle: str
    seconds: float
    clients: int
    outcomes: dict[str, int]
    memory: tuple[float, ...]

    @property
    def growth(self) -> float:
        """The last fifth's mean memory over the second fifth's."""
        fifth = max(1, len(self.memory) // 5)
        early, late = self.memory[fifth : 2 * fifth] or self.memory[:1], self.memory[-fifth:]
        return sum(late) / len(late) / (sum(early) / len(early))


def soak_gateway(
    bundle: Path, minutes: float, *, clients: int = CLIENTS, report: Callable[[str], None] = lambda _: None
) -> GatewaySoak:
    """Ask a gateway with the guard of ``bundle`` for so long. Raises what ``measure_gateway`` does."""
    if minutes <= 0 or clients < 3:
        raise InputError(
            f"--soak {minutes} with --clients {clients} is too small. Give more than 0 minutes and at least 3 clients."
        )
    bodies = [request_body(each) for each in two_pictures(bundle)]
    with upstream() as behind, server(gateway_command(bundle, behind.url, clients), "gateway") as gateway:
        report(f"{clients} clients for {minutes:g} minutes")
        outcomes, memory = asyncio.run(_soak(gateway.url, gateway.pid, bodies, minutes * 60, clients))
    return GatewaySoak(
        bundle=bundle.name, seconds=minutes * 60, clients=clients, outcomes=dict(outcomes), memory=tuple(memory)
    )


def soak_table(soak: GatewaySoak) -> list[str]:
    """Return the lines of a table."""
    lines = [f"{soak.clients} clients for {soak.seconds:.0f} s, a third of them attackers"]
    lines += [f"  {outcome:28}{count:8}" for outcome, count in sorted(soak.outcomes.items())]
    lines.append("  memory, MiB: " + " ".join(f"{each:.0f}" for each in soak.memory) + f"   x {soak.growth:.2f}")
    return lines


async def _soak(
    url: str, pid: int, bodies: list[bytes], seconds: float, clients: int
) -> tuple[Counter[str], list[float]]:
    httpx = require_httpx()
    until = time.monotonic() + seconds
    outcomes: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:

        async def honest(body: bytes) -> None:
            while time.monotonic() < until:
                response = await client.post(PATH, content=body)
                outcomes[f"honest {response.status_code}"] += 1
                if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                    await asyncio.sleep(float(response.headers.get("retry-after", 1)))

        async def attacker(number: int) -> None:
            for fault, content in itertools.islice(itertools.cycle(_faults(bodies[0])), number, None):
                if time.monotonic() > until:
                    return
                if content is None:
                    outcomes[f"fault {fault}"] += await _broken_off(url, bodies[0], whole=fault == "never reads")
                    continue
                response = await client.post(PATH, content=content)
                outcomes[f"fault {fault} {response.status_code}"] += 1

        attackers = clients // 3
        asked = [honest(bodies[number % 2]) for number in range(clients - attackers)]
        memory: list[float] = []

        async def watch() -> None:
            for number in range(READINGS):
                await asyncio.sleep(max(0.0, until - time.monotonic() - seconds * (READINGS - 1 - number) / READINGS))
                memory.append(_resident(pid))

        await asyncio.gather(watch(), *asked, *(attacker(number) for number in range(attackers)))
    return outcomes, memory


def _faults(honest: bytes) -> Iterator[tuple[str, bytes | None]]:
    """Yield faults by name: a body, or None for one that is done with a socket."""
    yield "no JSON", honest[:-20]
    yield "remote URL", honest.replace(b"data:image/png;base64,", b"http://127.0.0.1/")
    yield "hidden key", honest[:-1] + b', "extra_body": {"messages": []}}'
    yield "many nodes", b'{"messages": [' + b"[]," * 500_000 + b"[]]}"
    yield "large image", honest.replace(honest[honest.index(b"base64,") + 7 : honest.index(b'"}}')], _bomb())
    yield "leaves", None
    yield "never reads", None


def _bomb() -> bytes:
    """Return a small file of a large image, in base64."""
    buffer = io.BytesIO()
    Image.new("L", (7000, 7000)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue())


async def _broken_off(url: str, body: bytes, *, whole: bool) -> int:
    """Send a part of a request and leave, or all of it and leave without reading; return 1."""
    address = urlsplit(url)
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST {PATH} HTTP/1.1\r\nHost: gateway\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    try:
        writer.write(head + (body if whole else body[: len(body) // 2]))
        await writer.drain()
    finally:
        writer.transport.abort()
    return 1


def _resident(pid: int) -> float:
    """Return the resident memory of a process and those below it, in MiB (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    below = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for each in below for child in each.read_text().split()]
    return pages * 4096 / MEBIBYTE + sum(_resident(child) for child in children)
