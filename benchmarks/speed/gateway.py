"""What a gateway costs: an allowed request beside asking the upstream itself, blocks a second, time to a first token.

Upstream, gateway and clients are processes of their own. The upstream answers at once, so that what is measured is the
gateway; allowed requests go to it directly and through the gateway in turns, so that a slow moment hits both.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.speed import gateway_servers
from benchmarks.speed.gateway_servers import require_httpx, server
from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from safevlm.errors import InputError, SafeVLMError
from safevlm.terminal.child import module_arguments

__all__ = [
    "GatewayOptions",
    "GatewaySpeed",
    "gateway_command",
    "gateway_table",
    "measure_gateway",
    "request_body",
    "tiny_pair",
    "two_pictures",
]

CLIENTS = 64
QUESTION = "Where is the square?"


@dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """``requests`` of each kind in each of ``rounds``; ``clients`` ask at once where many do."""

    rounds: int = 5
    requests: int = 40
    clients: int = CLIENTS

    def __post_init__(self) -> None:
        for name in ("rounds", "requests", "clients"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} is not allowed. Give at least 1.")


@dataclass(frozen=True, kw_only=True)
class GatewaySpeed:
    """Milliseconds and rates; ``first_token`` has the median milliseconds to a first piece of text by way."""

    bundle: str
    image: str
    direct_ms: tuple[float, float]
    """p50 and p95 of a request to the upstream itself."""
    gateway_ms: tuple[float, float]
    guard_ms: float
    """Mean of the guard's own calls in these requests, by the gateway's own metrics."""
    through: dict[str, float]
    """Allowed requests a second by ``clients`` at once: gateway, nginx where it is installed, the upstream itself."""
    blocks_alone: float
    """Blocked requests a second, one client."""
    blocks_together: float
    clients: int
    first_token: dict[str, float]

    @property
    def overhead_ms(self) -> tuple[float, float]:
        """What the gateway with its guard adds, at p50 and p95."""
        return self.gateway_ms[0] - self.direct_ms[0], self.gateway_ms[1] - self.direct_ms[1]

    @property
    def beside_guard_ms(self) -> tuple[float, float]:
        """The same without the guard's own time."""
        return self.overhead_ms[0] - self.guard_ms, self.overhead_ms[1] - self.guard_ms


def measure_gateway(
    bundle: Path,
    gguf: Path | None,
    options: GatewayOptions = GatewayOptions(),
    *,
    report: Callable[[str], None] = lambda _: None,
) -> GatewaySpeed:
    """Measure a gateway with the guard of ``bundle``, and the gated pair of it with the GGUF folder, if one is given.

    Raises InputError for a guard that does not tell the built-in suite's images apart; SafeVLMError when a process
    does not start.
    """
    safe, unsafe = two_pictures(bundle)
    with ExitStack() as held:
        direct = held.enter_context(gateway_servers.upstream()).url
        gateway = held.enter_context(server(gateway_command(bundle, direct, options.clients), "gateway")).url
        proxy = held.enter_context(gateway_servers.nginx(direct))
        report("requests to the gateway")
        ways = {"gateway": gateway, **({} if proxy is None else {"nginx": proxy.url}), "upstream": direct}
        measured = asyncio.run(_ask_all(ways, safe, unsafe, options))
    first = {} if gguf is None else _first_tokens(bundle, gguf, safe, options, report)
    return GatewaySpeed(
        bundle=bundle.name,
        image=f"{safe.width}x{safe.height} PNG",
        clients=options.clients,
        first_token=first,
        **measured,
    )


def gateway_command(bundle: Path, upstream: str, clients: int) -> list[str]:
    """Return what Python is given to serve a bundle before an upstream, for so many clients at once."""
    bounds = ("--queue", max(64, clients), "--max-concurrent", 2 * clients)
    given = ("--bundle", bundle, "--upstream", f"{upstream}/v1", "--port", 0, *bounds)
    return module_arguments("runtimes.gateway", *given)


def gateway_table(speed: GatewaySpeed) -> list[str]:
    """Return the lines of a table."""
    lines = [
        f"gateway with the guard of {speed.bundle}, {speed.image}",
        f"  allowed request    p50 {speed.gateway_ms[0]:7.2f} ms   p95 {speed.gateway_ms[1]:7.2f} ms",
        f"  upstream itself    p50 {speed.direct_ms[0]:7.2f} ms   p95 {speed.direct_ms[1]:7.2f} ms",
        f"  added              p50 {speed.overhead_ms[0]:7.2f} ms   p95 {speed.overhead_ms[1]:7.2f} ms",
        f"  of it the guard    mean {speed.guard_ms:6.2f} ms   beside it p50 {speed.beside_guard_ms[0]:.2f} ms, "
        f"p95 {speed.beside_guard_ms[1]:.2f} ms",
        f"  requests a second  {', '.join(f'{way} {rate:.1f}' for way, rate in speed.through.items())} "
        f"by {speed.clients}",
        f"  blocks a second    {speed.blocks_alone:.1f} by 1 client, {speed.blocks_together:.1f} by {speed.clients}",
    ]
    if speed.first_token:
        bare = next(iter(speed.first_token.values()))
        lines.append("time to the first text of an answer, llama.cpp:")
        lines += [f"  {way:32}{ms:8.1f} ms   x {ms / bare:.2f}" for way, ms in speed.first_token.items()]
    return lines


# -- requests -------------------------------------------------------------------------------------------


async def _ask_all(
    ways: dict[str, str], safe: Image.Image, unsafe: Image.Image, options: GatewayOptions
) -> dict[str, Any]:
    httpx = require_httpx()
    upstream, gateway = ways["upstream"], ways["gateway"]
    limits = httpx.Limits(max_connections=options.clients, max_keepalive_connections=options.clients)
    allowed, blocked = request_body(safe), request_body(unsafe)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    guard: list[tuple[float, int]] = []
    many = max(options.requests, 2 * options.clients)
    direct: list[float] = []
    through: list[float] = []
    alone: list[float] = []
    together: list[float] = []
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:

        async def ask(base: str, body: bytes, ended: str) -> float:
            begun = time.perf_counter()
            response = await client.post(f"{base}/v1/chat/completions", content=body)
            took = time.perf_counter() - begun
            if response.status_code != 200 or response.json()["choices"][0]["finish_reason"] != ended:
                raise SafeVLMError(f"{base} answered {response.status_code}: {response.text[:200]}")
            return took

        for base, body, ended in ((upstream, allowed, "stop"), (gateway, allowed, "stop"), (gateway, blocked, FILTER)):
            await ask(base, body, ended)  # connections, first runs
        for number in range(options.rounds):
            guard.append(await _guard_calls(client, gateway))
            turns = [(upstream, direct), (gateway, through)]
            for _ in range(options.requests):
                for base, times in turns if number % 2 == 0 else turns[::-1]:
                    times.append(await ask(base, allowed, "stop"))
            guard.append(await _guard_calls(client, gateway))
            for way in list(ways) if number % 2 == 0 else list(ways)[::-1]:
                begun = time.perf_counter()
                await asyncio.gather(*(ask(ways[way], allowed, "stop") for _ in range(many)))
                rates[way].append(many / (time.perf_counter() - begun))
            begun = time.perf_counter()
            for _ in range(options.requests):
                await ask(gateway, blocked, FILTER)
            alone.append(options.requests / (time.perf_counter() - begun))
            begun = time.perf_counter()
            await asyncio.gather(*(ask(gateway, blocked, FILTER) for _ in range(many)))
            together.append(many / (time.perf_counter() - begun))
    return {
        "direct_ms": _percentiles(direct),
        "gateway_ms": _percentiles(through),
        "guard_ms": _mean_ms(guard),
        "through": {way: float(np.median(rate)) for way, rate in rates.items()},
        "blocks_alone": float(np.median(alone)),
        "blocks_together": float(np.median(together)),
    }


FILTER = "content_filter"


async def _guard_calls(client: Any, gateway: str) -> tuple[float, int]:
    """Return the seconds and the number of the guard's calls so far."""
    text = (await client.get(f"{gateway}/metrics")).text
    lines = dict(line.split() for line in text.splitlines() if line.startswith("safevlm_gateway_guard_seconds_"))
    return float(lines["safevlm_gateway_guard_seconds_sum"]), int(float(lines["safevlm_gateway_guard_seconds_count"]))


def _mean_ms(readings: Sequence[tuple[float, int]]) -> float:
    """Return the mean milliseconds of the calls between each first and second reading."""
    pairs = list(zip(readings[::2], readings[1::2], strict=True))
    seconds = sum(after[0] - before[0] for before, after in pairs)
    return 1000 * seconds / sum(after[1] - before[1] for before, after in pairs)


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(np.array(seconds) * 1000, [50, 95])
    return float(low), float(high)


def request_body(picture: Image.Image) -> bytes:
    """Return a chat request about an image."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]}).encode()


def two_pictures(bundle: Path) -> tuple[Image.Image, Image.Image]:
    """Return an image that the guard allows and one that it blocks."""
    from runtimes.guard.judge import Guard

    pictures = [draw(each.scene) for each in build_suite("test", pairs=100, questions=0).pictures]
    with Guard.open(bundle) as guard:
        verdicts = [each.verdict for each in guard.judge(pictures)]
    if not {"allow", "block"} <= set(verdicts):
        raise InputError(
            f"{bundle}: its guard cannot distinguish the drawn images. Give a bundle of a tiny checkpoint."
        )
    return pictures[verdicts.index("allow")], pictures[verdicts.index("block")]


# -- time to the first token ----------------------------------------------------------------------------


def _first_tokens(
    bundle: Path, gguf: Path, picture: Image.Image, options: GatewayOptions, report: Callable[[str], None]
) -> dict[str, float]:
    """Return the median milliseconds from an opened image to the first piece of text, way by way, in turns."""
    from runtimes.gate.gate import Gate
    from runtimes.gate.open import open_gate
    from runtimes.language.llamacpp_language import LlamaCppLanguageRunner

    report("llama.cpp, time to the first token")
    ways: dict[str, Callable[[Image.Image], float]] = {}
    with ExitStack() as held:
        runner = held.enter_context(LlamaCppLanguageRunner(gguf))
        size = runner.artifact.manifest.preprocessing

        def bare(picture: Image.Image) -> float:
            begun = time.perf_counter()
            handle = runner.prefill(size.apply(picture), QUESTION).handle
            next(runner.stream(handle, 8), "")
            return time.perf_counter() - begun

        def gated(gate: Gate) -> Callable[[Image.Image], float]:
            def ask(picture: Image.Image) -> float:
                first: list[float] = []
                begun = time.perf_counter()
                gate.ask(picture, QUESTION, max_new_tokens=2, on_text=lambda _: first.append(time.perf_counter()))
                if not first:
                    raise SafeVLMError("the gate blocked the image that its guard allowed")
                return first[0] - begun

            return ask

        ways["no gate"] = bare
        ways["gate, guard on ONNX Runtime"] = gated(held.enter_context(open_gate(bundle, str(gguf))))
        alone = open_gate(None, str(gguf))
        if alone.guard is not None:
            ways["gate, guard on llama.cpp"] = gated(held.enter_context(alone))
        else:
            ways["exact verdict alone"] = gated(held.enter_context(alone))
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(1 + options.rounds * 4):
            for way in list(ways) if number % 2 else list(ways)[::-1]:
                changed = picture.copy()
                changed.putpixel((0, 0), (number % 256, 0, 0))  # another image, so that no image is remembered
                times[way].append(ways[way](changed))
    return {way: float(np.median(taken[1:]) * 1000) for way, taken in times.items()}


@contextmanager
def tiny_pair(bundle: Path | None, gguf: Path | None, report: Callable[[str], None]) -> Iterator[tuple[Path, Path]]:
    """Yield a bundle and a GGUF folder: those given, otherwise tiny-safegem's, made for the purpose."""
    from export.gguf.artifact import GgufOptions, export_gguf
    from export.onnx import ExportOptions, export_guard
    from safevlm.checkpoint.checkpoint import open_checkpoint

    with tempfile.TemporaryDirectory(prefix="safevlm-speed-") as scratch:
        checkpoint = open_checkpoint("tiny-safegem")
        if bundle is None:
            bundle = Path(scratch) / "tiny-safegem"
            report("exporting a guard")
            export_guard(checkpoint, bundle, ExportOptions(embeddings=True))
        if gguf is None:
            gguf = Path(scratch) / "gguf"
            export_gguf(checkpoint, gguf, GgufOptions(type="f16"), report)
        yield bundle, gguf
