"""Serve: ``python -m runtimes.gateway --bundle DIR --upstream http://127.0.0.1:8000/v1``."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from runtimes.gateway.serving.config import PREFIX, check_environment, config_option, naming_its_line
from runtimes.gateway.serving.logs import LineHandler
from runtimes.guard.bundle import open_bundle
from runtimes.guard.options import precision_option, runtime_option
from runtimes.guard.policy import read_policy
from runtimes.guard.random_weights import warn_of_random_weights
from runtimes.images.view_option import view_option
from safevlm.errors import InputError, MissingExtraError
from safevlm.terminal.api_key import read_key
from safevlm.terminal.commandline import leave, run
from safevlm.terminal.options import answering_model_option, threads_option

MEBIBYTE = 2**20
ENDING_SECONDS = 1.0


@click.command(name="gateway", context_settings={"auto_envvar_prefix": PREFIX})
@config_option()
@click.option("--bundle", type=click.Path(path_type=Path), help="Folder of the guard bundle.")
@click.option("--upstream", metavar="URL", help="OpenAI-compatible server to put the guard in front of.")
@click.option(
    "--exact",
    type=click.Choice(["upstream"]),
    help="Settle unsure images by the upstream's own exact verdict: vLLM started by runtimes.vllm.",
)
@answering_model_option
@click.option(
    "--policy",
    type=click.Path(path_type=Path),
    help="TOML or JSON file with an action per class: block, allow or review.",
)
@runtime_option
@precision_option
@threads_option
@view_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0 takes any free port.",
)
@click.option("--allow-host", multiple=True, help="Host that images may be fetched from; repeatable.  [default: none]")
@click.option("--allow-private-hosts", is_flag=True, help="Allow private addresses for --allow-host.")
@click.option("--require-image", is_flag=True, help="Refuse requests without an image.")
@click.option(
    "--upstream-kind",
    type=click.Choice(["unknown", "vllm", "llama-server", "openai", "tgi", "litellm"]),
    default="unknown",
    show_default=True,
    help="Server behind the gateway; an unknown one gets no text that some servers turn into images.",
)
@click.option(
    "--pass-key", multiple=True, help="Request key beyond OpenAI's to pass upstream, such as guided_json; repeatable."
)
@click.option(
    "--formats",
    default="JPEG,PNG,WEBP,GIF,BMP",
    show_default=True,
    help="Image formats to decode, separated by commas.",
)
@click.option("--decode-timeout", type=float, default=5.0, show_default=True, help="CPU seconds to decode one image.")
@click.option(
    "--decode-memory-mb",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Memory to decode one image, in MiB.",
)
@click.option(
    "--cors-origin", multiple=True, metavar="ORIGIN", help="Origin whose pages may send requests (CORS); repeatable."
)
@click.option(
    "--upstream-key-env",
    metavar="NAME",
    help="Environment variable with the upstream's key, for clients that send none.",
)
@click.option(
    "--upstream-key-file", type=click.Path(path_type=Path), help="File with the upstream's key; read again at SIGHUP."
)
@click.option("--api-key-env", metavar="NAME", help="Environment variable with the key that clients must send.")
@click.option(
    "--client-keys", type=click.Path(path_type=Path), help="TOML file of clients: hashed keys and limits per minute."
)
@click.option(
    "--show-probabilities",
    is_flag=True,
    help="Send p_unsafe and probs to clients, who can then search for the thresholds.",
)
@click.option(
    "--max-body-mb",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Maximum size of a request body in MiB.",
)
@click.option(
    "--max-images",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Maximum number of images in a request.",
)
@click.option(
    "--max-concurrent",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Maximum number of concurrent requests.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Maximum batch size of the guard."
)
@click.option(
    "--batch-wait-ms", type=float, default=5.0, show_default=True, help="Milliseconds to wait for a batch to fill."
)
@click.option(
    "--queue", type=click.IntRange(min=1), default=64, show_default=True, help="Maximum number of queued images."
)
@click.option("--guard-timeout", type=float, default=30.0, show_default=True, help="Seconds.")
@click.option(
    "--idle-timeout",
    type=float,
    default=60.0,
    show_default=True,
    help="Seconds that the upstream may be silent during a stream.",
)
@click.option("--total-timeout", type=float, default=600.0, show_default=True, help="Seconds for a whole answer.")
@click.option(
    "--header-timeout", type=float, default=15.0, show_default=True, help="Seconds for a request's header to arrive."
)
@click.option(
    "--write-timeout", type=float, default=30.0, show_default=True, help="Seconds that a client may stop reading."
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Maximum number of open connections.",
)
@click.option(
    "--shutdown-timeout",
    type=click.IntRange(min=0),
    default=30,
    show_default=True,
    help="Seconds for open requests to finish after SIGTERM.",
)
def main(host: str, port: int, shutdown_timeout: int, **given: Any) -> int:
    """Serve chat completions, models and verdicts under /v1, and /livez, /readyz, /healthz and /metrics.

    Every image is judged first. SIGTERM and Ctrl-C let what is being served end, then exit with 0. One JSON line per
    request goes to standard output.
    """
    asked_to_reload = threading.Event()
    signal.signal(signal.SIGHUP, lambda *_: asked_to_reload.set())  # by itself it would end what is still starting
    try:
        from runtimes.gateway.app import create_app
        from runtimes.gateway.serving.server import GatewayServer
        from runtimes.gateway.serving.serving import ACCESS
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("uvicorn", "fastapi", "httpx", "prometheus_client"):
            raise
        raise MissingExtraError(str(error.name), "gateway", "the gateway") from error
    gateway, bound = _opened(host, port, given)
    with closing(bound):
        app = create_app(gateway)
        server = GatewayServer(app, gateway.options, shutdown_timeout=shutdown_timeout)
        logging.getLogger("uvicorn.error").addFilter(lambda _: app.state.failure is None)  # reported below
        for number in (signal.SIGTERM, signal.SIGINT):  # until uvicorn has its own, and when it raises them again
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        signal.signal(signal.SIGHUP, lambda *_: app.state.reload_soon())
        if asked_to_reload.is_set():
            app.state.reload_soon()
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"serving on http://{shown}:{bound.getsockname()[1]}", err=True)
        with _lines_written(ACCESS), suppress(SystemExit):  # uvicorn's 3 for a start that failed; here it is REGRESSION
            server.run(sockets=[bound])
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):  # the interpreter's own end would be broken off
        signal.signal(number, signal.SIG_IGN)
    if app.state.failure is not None:
        raise app.state.failure
    if not _threads_end():  # the interpreter would wait for them, and a library's may crash at its end
        leave(0 if server.started else 1)
    return 0 if server.started else 1


def _threads_end() -> bool:
    """Wait briefly for the threads of gate and gateway to end, as requested; return whether they did."""
    until = time.monotonic() + ENDING_SECONDS
    ours = [each for each in threading.enumerate() if each.name.startswith("gate")]
    for each in ours:
        each.join(max(0.0, until - time.monotonic()))
    return not any(each.is_alive() for each in ours)


def _opened(host: str, port: int, given: dict[str, Any]) -> tuple[Any, socket.socket]:
    """Return the gateway, and a socket that listens. Raises what names the line of an option from a file."""
    from runtimes.gateway.serving.serving import listening
    from runtimes.gateway.upstream.address import check_speaks_http

    context = click.get_current_context()
    try:
        check_environment(context, others={given["upstream_key_env"], given["api_key_env"]})
        gateway = _gateway(given)
        if gateway.upstream is not None:
            check_speaks_http(gateway.upstream)
        return replace(gateway, again=lambda: _gateway(given)), listening(host, port)
    except InputError as error:
        raise naming_its_line(context, error) from error


def _gateway(given: dict[str, Any]) -> Any:
    from runtimes.gateway.app import Gateway
    from runtimes.gateway.options import GatewayOptions
    from runtimes.gateway.serving.clients import read_clients

    options = GatewayOptions(
        max_body=given["max_body_mb"] * MEBIBYTE,
        max_images=given["max_images"],
        max_concurrent=given["max_concurrent"],
        guard_timeout=given["guard_timeout"],
        idle_timeout=given["idle_timeout"],
        total_timeout=given["total_timeout"],
        batch=given["batch"],
        batch_wait=given["batch_wait_ms"] / 1000,
        queue=given["queue"],
        require_image=given["require_image"],
        hosts=frozenset(given["allow_host"]),
        private_hosts=given["allow_private_hosts"],
        upstream_kind=given["upstream_kind"],
        pass_keys=frozenset(given["pass_key"]),
        header_timeout=given["header_timeout"],
        write_timeout=given["write_timeout"],
        max_connections=given["max_connections"],
        cors_origins=given["cors_origin"],
        show_probabilities=given["show_probabilities"],
        view=given["view"],
        formats=tuple(each.strip().upper() for each in given["formats"].split(",")),
        decode_timeout=given["decode_timeout"],
        decode_memory=given["decode_memory_mb"] * MEBIBYTE,
    )
    if given["bundle"] is None and given["model"] is None:
        raise InputError("nothing to serve: give --bundle (and --upstream or --model), or --model with a GGUF folder.")
    bundle = None if given["bundle"] is None else open_bundle(given["bundle"])
    gateway = Gateway.open(
        bundle,
        upstream=given["upstream"],
        exact=given["exact"] == "upstream",
        model=given["model"],
        policy=None if given["policy"] is None else read_policy(given["policy"]),
        options=options,
        key=_upstream_key(given),
        client_key=_key(given["api_key_env"]),
        runtime=given["runtime"],
        precision=given["precision"],
        threads=given["threads"],
    )
    warn_of_random_weights(bundle, gateway.gate.language)
    if given["client_keys"] is None:
        return gateway
    if given["api_key_env"] is not None:
        raise InputError("--client-keys and --api-key-env both say who may ask: give one of them.")
    return replace(gateway, clients=read_clients(given["client_keys"]))


def _upstream_key(given: dict[str, Any]) -> str | None:
    from runtimes.gateway.serving.private_file import read_key_file

    if given["upstream_key_file"] is None:
        return _key(given["upstream_key_env"])
    if given["upstream_key_env"] is not None:
        raise InputError("--upstream-key-file and --upstream-key-env both give the upstream's key: give one of them.")
    return read_key_file(given["upstream_key_file"])


def _key(variable: str | None) -> str | None:
    return None if variable is None else read_key(variable, needed=True)


@contextmanager
def _lines_written(access: str) -> Iterator[None]:
    """Write access lines to standard output and warnings to standard error; nobody waits for their readers."""
    out, err = LineHandler(sys.stdout.fileno()), LineHandler(sys.stderr.fileno(), "errors")
    out.setFormatter(logging.Formatter("%(message)s"))
    logger, root = logging.getLogger(access), logging.getLogger()
    logger.addHandler(out)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    root.addHandler(err)
    try:
        yield
    finally:
        root.removeHandler(err)
        for each in (out, err):
            each.finish(ENDING_SECONDS)


if __name__ == "__main__":
    run(main)
